"""Networks are chosen by the names that people give, or by what is on their machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from dataset_tools.errors import UserError
from dataset_tools.estimators.choose import Cue, choose, not_at_hand
from dataset_tools.networks import NETWORKS, SUGGESTED, Network
from dataset_tools.weights import missing_message

CUES: tuple[Cue, ...] = get_args(Cue)
OF_CUES = [row for row in NETWORKS.values() if row.purpose in CUES]


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of networks on a machine that has none yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put(weights: Path, name: str) -> None:
    """Something is there by the names of a network's files."""
    for file in NETWORKS[name].files:
        path = weights / name / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something")


def model(folder: Path, model_type: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


@pytest.mark.parametrize("row", OF_CUES, ids=lambda row: row.name)
def test_of_a_network_of_the_table_the_table_says_what_runs_it(row: Network) -> None:
    """Whether its weights are here or not: opening it tells."""
    settings = choose(row.purpose, row.name)
    assert (settings.kind, settings.weights) == (row.kind, row.name)


@pytest.mark.parametrize("cue", CUES)
def test_without_a_name_it_is_what_is_here_and_what_is_suggested_goes_first(weights: Path, cue: Cue) -> None:
    fetched = [row.name for row in OF_CUES if row.purpose == cue and (row.hub or row.url)]
    others = [name for name in fetched if name != SUGGESTED[cue]]
    with pytest.raises(UserError) as missing:
        choose(cue, None)
    assert str(missing.value) == missing_message([SUGGESTED[cue]])
    put(weights, others[-1])
    assert choose(cue, None).weights == others[-1]
    put(weights, SUGGESTED[cue])
    assert choose(cue, None).weights == SUGGESTED[cue]


def test_what_comes_with_the_package_is_taken_by_its_name_alone(weights: Path) -> None:
    """It is always here, and knows no photographs."""
    assert choose("instances", "drawn-people").weights == "drawn-people"
    with pytest.raises(UserError, match="mild weights pull"):
        choose("instances", None)


def test_of_several_cues_those_are_named_of_which_nothing_is_here(weights: Path) -> None:
    put(weights, "openpose")
    assert not_at_hand(["instances", "pose", "parsing"]) == [SUGGESTED["instances"], SUGGESTED["parsing"]]


def test_a_hub_id_of_the_table_is_its_network() -> None:
    row = NETWORKS[SUGGESTED["instances"]]
    assert choose("instances", row.hub).weights == row.name


@pytest.mark.parametrize(
    ("cue", "model_type", "kind"),
    [
        ("instances", "mask2former", "transformers"),
        ("instances", "rf_detr", "transformers"),
        ("pose", "vitpose", "vitpose"),
        ("parsing", "segformer", "segformer"),
    ],
)
def test_of_a_folder_its_configuration_says_what_runs_it(tmp_path: Path, cue: Cue, model_type: str, kind: str) -> None:
    folder = model(tmp_path / "model", model_type)
    settings = choose(cue, folder)
    assert (settings.kind, settings.weights) == (kind, folder)


@pytest.mark.parametrize(("cue", "kind"), [("instances", "maskrcnn"), ("pose", "openpose"), ("parsing", "schp")])
def test_a_file_and_a_folder_of_files_are_of_the_networks_that_come_so(tmp_path: Path, cue: Cue, kind: str) -> None:
    file = tmp_path / "files" / "own.pth"
    file.parent.mkdir()
    file.write_bytes(b"something")
    assert [choose(cue, str(path)).kind for path in (file, file.parent)] == [kind, kind]


def test_what_the_user_must_mend_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": ')
    networks = {"pose": model(tmp_path / "a", "vitpose"), "instances": model(tmp_path / "b", "mask2former")}
    for cue, name, message in (
        ("pose", "schp-lip", "schp-lip is a network for parsing; for pose there are openpose, "),
        ("instances", "sdxl-inpainting", "sdxl-inpainting is a network for base; for instances there are maskrcnn, "),
        ("parsing", networks["pose"], "is a vitpose; for parsing, a model of the transformers library is a segformer"),
        ("pose", networks["instances"], "is a mask2former; for pose, a model of the transformers library is a vitpose"),
        ("pose", str(broken), "broken/config.json is no configuration of the transformers library"),
        ("pose", "vitpose-bse", "vitpose-bse are no network of the table, no folder, file or hub id"),
    ):
        with pytest.raises(UserError, match=message):
            choose(cue, name)
