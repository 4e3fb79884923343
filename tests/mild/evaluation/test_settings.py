from __future__ import annotations

import pytest

from dataset_tools.errors import UserError
from mild.evaluation.settings import EvaluateSettings


def test_defaults_are_the_papers() -> None:
    """Section G.1: 25 DDIM steps."""
    assert EvaluateSettings().inference_steps == 25


def test_a_kind_alone_is_the_method_or_metric_as_it_is_by_default() -> None:
    short = EvaluateSettings(methods=["telea", "mild"], metrics=["psnr"])
    assert short == EvaluateSettings(methods=[{"kind": "telea"}, {"kind": "mild"}], metrics=[{"kind": "psnr"}])
    assert [method.name for method in short.methods] == ["telea", "mild"]


def test_differences_are_taken_to_the_base_in_the_same_pipeline_where_it_is_run() -> None:
    """Else to the first method, or to what is named: a method or an arm."""
    assert EvaluateSettings(methods=["telea", "sdxl-inpaint", "mild", "base"]).compared_with() == "base"
    assert EvaluateSettings(methods=["telea", "mild"]).compared_with() == "telea"
    arms = [{"kind": "mild", "name": f"a{seed}", "arm": "full"} for seed in range(2)]
    assert EvaluateSettings(methods=["telea", *arms], baseline="full").compared_with() == "full"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"methods": ["lamaa"]}, "methods"),
        ({"methods": ["mild", "mild"]}, "mild is named twice"),
        ({"methods": [{"kind": "telea", "name": "mask"}]}, "mask is what the masks' own files are called"),
        ({"methods": [{"kind": "telea", "name": "../up"}]}, "name"),
        ({"datasets": {"a": {"masks": ["none"]}}}, "masks"),
        ({"datasets": {"a": {"masks": ["exact", "exact"]}}}, "names one of them twice"),
        ({"metrics": [{"kind": "fid", "reference_pictures": "person-free"}]}, "needs person_free"),
        ({"baseline": "full"}, "is none of the methods"),
        ({"methods": ["base", {"kind": "mild", "arm": "full", "below": "full"}]}, "none of the others: base"),
        ({"methods": [{"kind": "mild", "name": f"full{n}", "arm": "full"} for n in ("", "-1")]}, "full is the name of"),
        ({"datasets": {"a": {"place": "https://user:PASSWORD9@host/ds"}}}, "carries a password"),
        ({"person_free": {"place": "https://host/ds?token=SECRET9"}}, "carries a password"),
        ({"inference_step": 3}, "inference_steps"),
        ({"inference_steps": 1001}, "inference_steps"),
        ({"methods": [{"kind": "mild", "inference_steps": 1001}]}, "inference_steps"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        EvaluateSettings.check(values, origin="test")
