"""Settings files: what is wrong is said in one line that helps."""

from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field

import dataset_tools
from dataset_tools.curated import CuratedSettings
from dataset_tools.curation import CurationSettings
from dataset_tools.errors import UserError
from dataset_tools.fetch import FetchSettings
from dataset_tools.schema import EncodingSettings
from dataset_tools.settings import Settings, digest_of, read_yaml


class Folder(Settings):
    """Own photos."""

    kind: Literal["folder"] = "folder"
    images: str = "."


class Bucket(Settings):
    """A mirror."""

    kind: Literal["bucket"] = "bucket"
    endpoint: str = ""


class Masks(Settings):
    """Cleaning."""

    smallest_area: float = Field(0.01, ge=0, le=1)
    """Share of the picture."""
    holes: Literal["no", "filled"] = "filled"
    """What becomes of them."""


class Build(Settings):
    """All of it."""

    workers: int = Field(4, ge=1)
    """Threads."""
    masks: Masks = Masks()
    source: Annotated[Folder | Bucket, Field(discriminator="kind")] = Folder()
    more: list[Annotated[Folder | Bucket, Field(discriminator="kind")]] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"wrokers": 2}, "wrokers", "workers"),
        ({"masks": {"smalest_area": 0.1}}, "masks.smalest_area", "smallest_area"),
        ({"source": {"kind": "folder", "image": "x"}}, "image", "images"),
        ({"source": {"kind": "bucket", "endpiont": "x"}}, "endpiont", "endpoint"),
        # nearer to a field of the other member of the union, which is not the one that was chosen
        ({"source": {"kind": "bucket", "image": "x"}}, "image", "kind"),
        ({"more": [{"kind": "folder"}, {"kind": "bucket", "endpint": "x"}]}, "endpint", "endpoint"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(values: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        Build.check(values, origin="build.yaml")
    message = str(caught.value)
    assert message.startswith("build.yaml: unknown setting")
    assert unknown in message
    assert f"did you mean {nearest!r}?" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workers: [", "not valid YAML"),
        ("workers: 2\n  masks: 1\n", "not valid YAML"),
        ("- workers\n", "must hold a mapping, not a list"),
        ("workers: none\n", "workers: Input should be a valid integer"),
        ("workers: 0\n", "workers: Input should be greater than or equal to 1"),
        ("masks:\n  smallest_area: 3\n", "masks.smallest_area: Input should be less than or equal to 1"),
        ("source:\n  kind: floppy\n", "source: "),
        ("masks:\n  holes: no\n", "boolean: put it in quotes"),
        ("1: 2\n", "1"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Build.load(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_bytes_are_refused_in_one_line(tmp_path: Path) -> None:
    noise = tmp_path / "noise.yaml"
    noise.write_bytes(b"\xff\xfe\x00\x9f")
    for path, says in [
        (tmp_path / "no.yaml", "does not exist"),
        (tmp_path, "cannot be read"),
        (noise, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            Build.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_two_mistakes_are_both_named() -> None:
    with pytest.raises(UserError, match=r"workers.*masks\.smallest_area"):
        Build.check({"workers": 0, "masks": {"smallest_area": 2}}, origin="x")


def test_changes_go_over_the_file_and_an_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("")
    assert Build.load(path) == Build()
    path.write_text("workers: 2\n")
    loaded = Build.load(path, {"masks.smallest_area": 0.5, "source": {"kind": "bucket"}})
    assert (loaded.workers, loaded.masks.smallest_area, loaded.source) == (2, 0.5, Bucket())
    with pytest.raises(UserError, match="'workers' is not a group of settings"):
        Build.load(path, {"workers.count": 1})
    with pytest.raises(UserError, match="did you mean 'smallest_area'"):
        Build.load(path, {"masks.smalest_area": 1})


def test_changes_go_over_settings_as_over_their_file(tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text("workers: 2\n")
    changes = {"masks.smallest_area": 0.5, "source": {"kind": "bucket"}}
    assert Build.load(Build(workers=2), changes) == Build.load(tmp_path / "build.yaml", changes)
    with pytest.raises(UserError, match=r"settings: unknown setting 'masks.smalest_area', did you mean"):
        Build.load(Build(), {"masks.smalest_area": 1})


def test_what_was_left_to_its_default_counts_as_left_when_settings_are_loaded_from_settings() -> None:
    given = Build(workers=4, source=Folder(images="x"), more=[Bucket()])
    loaded = Build.load(given, {"masks.smallest_area": 0.5})
    assert loaded.model_fields_set == {"workers", "masks", "source", "more"}
    assert loaded.masks.model_fields_set == {"smallest_area"} and loaded.source.model_fields_set == {"kind", "images"}
    assert (loaded.source, loaded.more) == (Folder(images="x"), [Bucket()])


def test_equal_settings_have_equal_digests_and_changed_ones_do_not() -> None:
    assert Build().digest() == Build(workers=4).digest() == Build.check({"workers": "4"}, origin="x").digest()
    assert Build().digest() != Build(workers=5).digest()
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Build().workers = 3  # type: ignore[misc]


def models() -> list[type[Settings]]:
    """Every settings model of the dataset's tools."""
    for module in pkgutil.walk_packages(dataset_tools.__path__, "dataset_tools."):
        importlib.import_module(module.name)
    found, pending = [], [Settings]
    while pending:
        known = pending.pop().__subclasses__()
        found += [model for model in known if model.__module__.startswith("dataset_tools.")]
        pending += known
    return sorted(found, key=lambda model: model.__name__)


NUMBERS = [
    (model, name)
    for model in models()
    for name, field in model.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]
ANY_NUMBER = {("CompositorSettings", "seed")}
"""What has no range: any number is as good as another."""


@pytest.mark.parametrize(("model", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_number_is_taken_that_cannot_be_meant(model: type[Settings], name: str) -> None:
    """Below its range, and neither infinite nor no number; the line names the field."""
    for value in (-1, math.inf, -math.inf, math.nan):
        if value == -1 and (model.__name__, name) in ANY_NUMBER:
            continue
        with pytest.raises(UserError, match=rf"build.yaml: (.*; )?{name}: "):
            model.check({name: value}, origin="build.yaml")


@pytest.mark.parametrize(
    ("model", "name", "values"),
    [
        (EncodingSettings, "jpeg_quality", (0, 96, 300)),
        (CuratedSettings, "fetch_workers", (0, 257)),
        (FetchSettings, "attempts", (0, 21)),
        (FetchSettings, "timeout_seconds", (0, 86_401)),
        (FetchSettings, "backoff_seconds", (301,)),
        (FetchSettings, "max_bytes", (0, 1 << 41)),
        (CurationSettings, "images_per_stratum", (10**12,)),
        (CurationSettings, "max_people", (0, 10**30)),
    ],
)
def test_numbers_that_would_end_a_build_later_are_refused_at_once(
    model: type[Settings], name: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"build.yaml: {name}: Input should be"):
            model.check({name: value}, origin="build.yaml")


def test_yaml_that_cannot_be_read_is_told_by_its_place_and_not_repeated(tmp_path: Path) -> None:
    """The line may hold a secret."""
    path = tmp_path / "build.yaml"
    path.write_text("source:\n  key: abc: not-to-be-seen\n")
    with pytest.raises(UserError, match="line 2, column 11") as caught:
        Build.load(path)
    assert "not-to-be-seen" not in str(caught.value)


@pytest.mark.parametrize("text", ["smallest_area: yes", "smallest_area: off"])
def test_a_number_that_yaml_reads_as_a_boolean_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "masks.yaml").write_text(text)
    with pytest.raises(UserError, match=r"smallest_area: YAML reads this as (true|false), which it cannot be"):
        Masks.load(tmp_path / "masks.yaml")


def test_a_boolean_is_taken_where_one_is_meant_whatever_else_is_allowed() -> None:
    class Wide(Settings):
        plain: bool = False
        either: Annotated[float, Field(ge=0)] | bool | None = None
        number: Annotated[float, Field(ge=0)] | None = None

    assert (Wide.check({"plain": True, "either": True}, origin="t").either) is True
    with pytest.raises(UserError, match="t: number: YAML reads this as true"):
        Wide.check({"number": True}, origin="t")


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"shares": {"train": 0.5, "test": True}}, "shares.test"),
        ({"size": [64, False]}, "size.1"),
        ({"steps": [1, 2, True]}, "steps.2"),
        ({"maybe": {"a": [True]}}, "maybe.a.0"),
    ],
)
def test_a_boolean_for_a_number_is_refused_at_any_depth(given: dict[str, Any], place: str) -> None:
    class Deep(Settings):
        shares: dict[Literal["train", "test"], Annotated[float, Field(ge=0)]] = Field({})
        size: tuple[int, int] = (64, 64)
        steps: tuple[int, ...] = ()
        maybe: dict[str, list[int]] | None = None
        flags: dict[str, bool] = Field({})

    assert Deep.check({"flags": {"a": True}, "size": [1, 2], "maybe": None}, origin="t").flags == {"a": True}
    with pytest.raises(UserError, match=f"t: {place}: YAML reads this as"):
        Deep.check(given, origin="t")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "masks.yaml").write_text("smallest_area: 0.1\n# much else\nsmallest_area: 0.2\n")
    with pytest.raises(UserError, match="the key 'smallest_area' stands twice, line 3"):
        Masks.load(tmp_path / "masks.yaml")


def test_a_merged_key_may_be_set_otherwise() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


def test_a_date_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "masks.yaml").write_text("smallest_area: 2024-02-30\n")
    with pytest.raises(UserError, match="is not valid YAML: day is out of range for month"):
        Masks.load(tmp_path / "masks.yaml")
