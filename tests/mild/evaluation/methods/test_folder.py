from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import encode_png
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.folder import FolderMethod
from mild.evaluation.settings import EvaluateSettings

Keys = list[tuple[str, str, tuple[int, int]]]


@pytest.fixture
def cases(make_case: Callable[..., Case]) -> list[Case]:
    return [make_case(0), make_case(1, height=45, width=51), make_case(2)]


@pytest.fixture
def folder(cases: list[Case], tmp_path: Path) -> Path:
    """A negative of each picture."""
    for case in cases:
        (tmp_path / f"{case.key}.png").write_bytes(encode_png(255 - case.image))
    (tmp_path / "notes.txt").write_text("not a result")
    return tmp_path


def keys_of(cases: list[Case]) -> Keys:
    return [(case.key, case.kind, case.hole.shape) for case in cases]


def test_results_are_those_of_the_files_by_key_with_pixels_outside_the_hole_put_back(
    cases: list[Case], folder: Path, setup: Setup
) -> None:
    method = FolderMethod(folder=str(folder))
    method.check_cases(setup, keys_of(cases))
    chosen = [cases[2], cases[1]]
    for case, result in zip(chosen, method.open(setup).erase(chosen, [0, 0]), strict=True):
        expected = np.where(case.hole[..., None], 255 - case.image, case.image)
        assert np.array_equal(result, expected)


def test_results_can_be_judged_as_they_came(cases: list[Case], folder: Path, setup: Setup) -> None:
    method = FolderMethod(folder=str(folder), keep_outside=False)
    (result,) = method.open(setup).erase(cases[:1], [0])
    assert np.array_equal(result, 255 - cases[0].image)
    assert method.title != FolderMethod(folder=str(folder)).title


def test_kinds_of_masks_and_other_layouts_are_told_by_the_pattern(
    cases: list[Case], tmp_path: Path, setup: Setup
) -> None:
    both = [case for one in cases for case in (one, replace(one, kind="augmented"))]
    for index, case in enumerate(both):
        path = tmp_path / case.kind / f"{case.key}_out.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", case.hole.shape[::-1], (index * 20,) * 3).save(path)
    method = FolderMethod(folder=str(tmp_path), pattern="./{masks}/{key}_out.jpg")
    method.check_cases(setup, keys_of(both))
    for index, result in enumerate(method.open(setup).erase(both, [0] * len(both))):
        assert np.abs(result[both[index].hole].astype(int) - index * 20).max() <= 1


def test_a_folder_that_is_not_right_is_told_by_name_and_count(cases: list[Case], folder: Path, setup: Setup) -> None:
    names = [f"{case.key}.png" for case in cases]
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(encode_png(np.zeros((7, 9, 3), np.uint8)))
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-30])
    for number in range(5):
        (folder / f"stray-{number}.png").touch()
    keys = [*keys_of(cases), *((f"absent-{number}", "exact", (5, 5)) for number in range(4))]
    with pytest.raises(UserError) as caught:
        FolderMethod(folder=str(folder)).check_cases(setup, keys)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "of 7 results",
        f"5 missing ({names[0]}; absent-0.png; absent-1.png; ...)",
        f"1 of another size ({names[1]}: 9x7 pixels, where the picture has 51x45)",
        f"1 unreadable ({names[2]}: the PNG file ends early",
        "5 extra",
        "stray-0.png; stray-1.png; stray-2.png; ...",
    ):
        assert part in message
    assert "stray-3" not in message and "notes" not in message


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_bytes(b"text"), "not a JPEG"),
        (lambda path: path.write_bytes(encode_png(np.zeros((7, 9, 3), np.uint8))), "9x7 pixels"),
    ],
)
def test_a_result_that_went_bad_since_is_named(
    cases: list[Case], folder: Path, setup: Setup, spoil: Callable[[Path], object], named: str
) -> None:
    spoil(folder / f"{cases[0].key}.png")
    with pytest.raises(UserError, match=f"{cases[0].key}.png: .*{named}"):
        FolderMethod(folder=str(folder)).open(setup).erase(cases, [0] * 3)


def test_results_of_more_pictures_than_are_evaluated_have_to_be_allowed(
    cases: list[Case], folder: Path, setup: Setup
) -> None:
    with pytest.raises(UserError, match=r"2 extra.*\(sample-1.png; sample-2.png\)"):
        FolderMethod(folder=str(folder)).check_cases(setup, keys_of(cases[:1]))
    FolderMethod(folder=str(folder), extra_allowed=True).check_cases(setup, keys_of(cases[:1]))


def test_one_file_for_several_cases_is_refused(cases: list[Case], folder: Path, setup: Setup) -> None:
    both = [*cases, replace(cases[1], kind="augmented")]
    with pytest.raises(UserError, match=rf"{cases[1].key}.png would be the result of several cases: write .masks."):
        FolderMethod(folder=str(folder)).check_cases(setup, keys_of(both))


def test_a_folder_that_does_not_exist_is_named_before_anything_runs(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        FolderMethod(folder=str(tmp_path / "nowhere")).check_cases(setup, [])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"folder": "s3://bucket/results"}, "results can only be on a local disk"),
        ({"folder": "x", "pattern": "result.png"}, "lacks {key}"),
        ({"folder": "x", "pattern": "{key}_{seed}.png"}, "holds {seed}; there is {key}, {masks}"),
        ({"folder": "x", "pattern": "../{key}.png"}, "leads out of the folder"),
        ({"folder": "x", "pattern": "/{key}.png"}, "leads out of the folder"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(values: dict[str, str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        EvaluateSettings.check({"methods": [{"kind": "folder", **values}]}, origin="test")
    assert named in str(caught.value)


def test_the_fingerprint_is_that_of_names_and_contents(
    cases: list[Case], folder: Path, setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def fingerprint(place: Path = folder, **values: object) -> str:
        return FolderMethod.model_validate({"folder": str(place), **values}).fingerprint(setup)

    before = fingerprint()
    elsewhere = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    (folder / "notes.txt").write_text("no part of it")
    assert {fingerprint(elsewhere), fingerprint(name="other", arm="arm", label="Other"), fingerprint()} == {before}
    assert fingerprint(keep_outside=False) != before
    buffer = io.BytesIO()
    Image.fromarray(cases[0].image).save(buffer, "PNG")
    (elsewhere / f"{cases[0].key}.png").write_bytes(buffer.getvalue())
    changed = fingerprint(elsewhere)
    (elsewhere / f"{cases[0].key}.png").rename(elsewhere / "another.png")
    assert len({before, changed, fingerprint(elsewhere)}) == 3


def test_results_in_a_linked_folder_count_like_others(cases: list[Case], setup: Setup, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(cases[0].image).save(buffer, "PNG")
    (tmp_path / "elsewhere").mkdir()
    result = tmp_path / "elsewhere" / f"{cases[0].key}.png"
    result.write_bytes(buffer.getvalue())
    (tmp_path / "results").mkdir()
    (tmp_path / "results/exact").symlink_to(tmp_path / "elsewhere")
    method = FolderMethod(folder=str(tmp_path / "results"), pattern="{masks}/{key}.png")
    before = method.fingerprint(setup)
    result.write_bytes(buffer.getvalue() + b"changed")
    assert method.fingerprint(setup) != before
