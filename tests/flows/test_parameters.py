"""What Prefect's server and its form are told of the parameters of flows."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from dataset_tools.settings import Settings
from flows.build_dataset import build_dataset
from flows.evaluate import evaluate
from flows.pipeline import recipe_path
from flows.pretrain_base import PretrainRecipe, pretrain_base
from flows.select_plates import select_plates
from flows.settings import BuildSettings
from flows.train import TrainRecipe, train
from mild.evaluation.review import ReviewSettings
from mild.evaluation.settings import EvaluateSettings


@pytest.mark.parametrize(
    ("flow", "settings", "recipe", "dotted", "value"),
    [
        (build_dataset, BuildSettings, ("build", "sample"), "composite.seed", 7),
        (train, TrainRecipe, ("train", "paper"), "train.mild.lora.rank", 7),
        (evaluate, EvaluateSettings, ("evaluate", "sample"), "resamples", 777),
        (pretrain_base, PretrainRecipe, ("pretrain", "nano"), "pretrain.unet.steps", 777),
        (select_plates, ReviewSettings, ("review", "sample"), "seed", 777),
    ],
)
def test_the_settings_of_a_flow_are_fields_of_a_valid_schema_and_mean_what_their_file_means(
    flow: Flow[..., Any], settings: type[Settings], recipe: tuple[str, str], dotted: str, value: int
) -> None:
    """By JSON schema's own metaschema and as Prefect's server checks; what a form sends can be changed like a file."""
    schema = parameter_schema(flow).model_dump(mode="json")
    jsonschema.Draft202012Validator.check_schema(schema)
    is_valid_schema(schema)
    shown = schema["definitions"][settings.__name__]["properties"]
    assert set(shown) == set(settings.model_fields)
    assert all(shown[name].get("description") for name in shown)

    place = recipe_path(*recipe)
    sent = json.loads(settings.load(place).model_dump_json())
    others = dict.fromkeys(schema["required"], "x")
    assert not validate(others | {"settings": place}, schema)
    assert not validate(others | {"settings": sent}, schema)
    assert validate(others | {"settings": sent | {"sent": 1}}, schema)
    assert settings.load(settings.model_validate(sent), {dotted: value}) == settings.load(place, {dotted: value})
