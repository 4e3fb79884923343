from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import encode_png
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.command import CommandMethod
from mild.evaluation.settings import EvaluateSettings

starts_a_process = pytest.mark.process


def erased(method: CommandMethod, setup: Setup, case: Case, seed: int = 0) -> np.ndarray:
    (result,) = method.open(setup).erase([case], [seed])
    return result


def shell(program: str, **values: Any) -> CommandMethod:
    return CommandMethod(command=("sh", "-c", program), **values)


@starts_a_process
def test_a_program_is_given_picture_mask_and_prompt_as_files(case: Case, setup: Setup, tmp_path: Path) -> None:
    """A program that only takes down what it finds, and hands its own picture back."""
    program = tmp_path / "take-down.sh"
    program.write_text(
        '#!/bin/sh\ncp "$2" "$3" "$4" "$1"\npwd >"$1/cwd"\nprintf %s "$6 $7" >"$1/words"\ncp "$2" "$5"\n'
    )
    program.chmod(0o755)
    words = ["{image}", "{mask}", "{prompt}", "{result}", "{seed}", '{folder}: {"a": {}}']
    method = CommandMethod(command=(str(program), str(tmp_path), *words), prompt="Weg, größer: the {categories}!")
    case = replace(case, categories=("Person", "Dog"))
    result = erased(method, setup, case, seed=123)
    with Image.open(tmp_path / "image.png") as picture, Image.open(tmp_path / "mask.png") as mask:
        assert (picture.mode, mask.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(picture), case.image)
        assert np.array_equal(np.asarray(mask), case.hole * np.uint8(255))
    assert (tmp_path / "prompt.txt").read_bytes() == "Weg, größer: the person and dog!".encode()
    folder = (tmp_path / "cwd").read_text().strip()
    assert (tmp_path / "words").read_text() == f'123 {folder}: {{"a": {{}}}}'
    assert not Path(folder).exists(), "it vanishes"
    assert np.array_equal(result, case.image)


@starts_a_process
def test_pixels_outside_the_hole_are_put_back_unless_they_are_to_be_judged(
    case: Case, setup: Setup, tmp_path: Path
) -> None:
    made = 255 - case.image
    (tmp_path / "made.png").write_bytes(encode_png(made))
    method = CommandMethod(command=("cp", str(tmp_path / "made.png"), "{result}"))
    assert np.array_equal(erased(method, setup, case), np.where(case.hole[..., None], made, case.image))
    as_it_came = method.model_copy(update={"keep_outside": False})
    assert np.array_equal(erased(as_it_came, setup, case), made)
    assert as_it_came.title != method.title


@starts_a_process
def test_each_case_has_a_folder_and_a_seed_of_its_own(make_case: Callable[..., Case], setup: Setup) -> None:
    """A program that leaves a grey of the seed's value."""
    program = (
        "import sys; from PIL import Image; folder, seed = sys.argv[1:];"
        "Image.new('L', Image.open(folder + '/image.png').size, int(seed)).save(folder + '/result.png')"
    )
    method = CommandMethod(command=(sys.executable, "-c", program, "{folder}", "{seed}"))
    cases = [make_case(1, height=45, width=51), make_case(2)]
    for seed, case, result in zip((7, 200), cases, method.open(setup).erase(cases, [7, 200]), strict=True):
        assert (result[case.hole] == seed).all()


@starts_a_process
@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("printf 'out of\\r\\nmemory\\n \\n' >&2; exit 3", "sh ended with exit code 3: memory"),
        ("cp image.png result.png; exit 1", "sh ended with exit code 1: without a word on stderr"),
        ("kill -KILL $$", "sh was ended by signal 9: without a word on stderr"),
        ("echo done >&2", "sh: result.png: there is no such file"),
        ("echo text >result.png", "sh: result.png: not a JPEG, PNG"),
        ("cp small.png result.png", "sh: result.png: 9x7 pixels, where the picture has 51x45"),
    ],
)  # fmt: skip
def test_a_picture_that_failed_tells_why(case: Case, setup: Setup, tmp_path: Path, program: str, named: str) -> None:
    (tmp_path / "small.png").write_bytes(encode_png(np.zeros((7, 9, 3), np.uint8)))
    with pytest.raises(UserError) as caught:
        erased(shell(program.replace("small.png", str(tmp_path / "small.png"))), setup, case)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


@pytest.fixture
def listening(tmp_path: Path) -> Any:
    """A pipe that a program can hold open: its path, and what reads all that was written once nobody holds it."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    yield tmp_path / "pipe", lambda: os.read(reader, 100)
    os.close(reader)


@starts_a_process
@pytest.mark.parametrize("time_limit", [0.5, None])
def test_nothing_of_a_program_lives_on_when_its_time_is_up_or_it_ended(
    case: Case, setup: Setup, listening: Any, time_limit: float | None
) -> None:
    """Its child would write to the pipe after a while, and holds it open until then."""
    pipe, read = listening
    end = "wait" if time_limit else "exit 0"
    program = f"exec 3>'{pipe}'; (sleep 20; echo alive >&3) & cp image.png result.png; {end}"
    if time_limit is None:
        erased(shell(program), setup, case)
    else:
        with pytest.raises(UserError, match=r"^sh was killed after 0\.5 s, its time_limit$"):
            erased(shell(program, time_limit=time_limit), setup, case)
    assert read() == b""


@starts_a_process
def test_a_program_that_is_no_program_is_named(case: Case, setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\0\1\2")
    (tmp_path / "data").chmod(0o755)
    method = CommandMethod(command=(str(tmp_path / "data"),))
    with pytest.raises(UserError, match="data cannot be started: Exec format error"):
        erased(method, setup, case)


@starts_a_process
def test_a_program_by_a_relative_path_is_relative_to_where_the_evaluation_runs(
    case: Case, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.sh").write_text("#!/bin/sh\ncp image.png result.png\n")
    (tmp_path / "run.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(erased(CommandMethod(command=("./run.sh",)), setup, case), case.image)


def test_a_method_whose_program_is_not_found_is_missing(setup: Setup) -> None:
    method = CommandMethod(command=("no-such-program", "{image}"))
    assert method.missing(setup) == "program no-such-program is not found: install it, or name it by its path"
    with pytest.raises(UserError, match="no-such-program is not found"):
        method.open(setup)
    assert CommandMethod(command=("sh",)).missing(setup) is None


def test_names_in_a_prompt_need_names_of_what_vanishes(case: Case, setup: Setup) -> None:
    method = CommandMethod(command=("sh",), prompt="remove the {categories}")
    with pytest.raises(UserError, match="not known what is to vanish"):
        erased(method, setup, replace(case, categories=()))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "command: Field required"),
        ({"command": []}, "command: Tuple should have at least 1 item"),
        ({"command": ["run", "{imge}"]}, "holds {imge}; there is {image}, {mask}"),
        ({"command": ["run"], "prompt": "{category}"}, "holds {category}; there is {categories}"),
        ({"command": ["run"], "time_limit": 0}, "time_limit"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        EvaluateSettings.check({"methods": [{"kind": "command", **values}]}, origin="test")
    assert named in str(caught.value)


def test_the_fingerprint_changes_by_settings_version_and_prompt_and_not_by_name(setup: Setup) -> None:
    def fingerprint(setup: Setup = setup, **values: Any) -> str:
        return CommandMethod(**{"command": ("sh", "{result}"), **values}).fingerprint(setup)

    same = {fingerprint(), fingerprint(name="other", arm="arm", label="Other")}
    assert len(same) == 1
    asked = replace(setup, prompt="a lawn")
    others = [
        fingerprint(command=("sh", "{image}")),
        fingerprint(version="2"),
        fingerprint(prompt="remove the {categories}"),
        fingerprint(keep_outside=False),
        fingerprint(asked),
    ]
    assert len({*same, *others}) == 6
    assert fingerprint(asked, prompt="a") == fingerprint(prompt="a"), "its own prompt is used"


def test_the_documented_settings_are_what_the_settings_take() -> None:
    """docs/command-contract.md, whose blocks are whole lists of methods."""
    import yaml

    page = (Path(__file__).parents[4] / "docs/command-contract.md").read_text(encoding="utf-8")
    blocks = page.split("```yaml\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        assert json.dumps(EvaluateSettings.check(yaml.safe_load(block.split("```")[0]), origin="docs").model_dump())
