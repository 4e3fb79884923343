"""Where bases and adapters lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_tools.errors import UserError
from mild.bases import NANO, check_apart, digest_of_place


@pytest.mark.parametrize(
    ("begun", "output"),
    [
        ("adapters", "adapters"),
        ("adapters", "adapters/prefix"),
        ("adapters", "link/prefix"),
        ("build/adapters", "build"),
        ("further.work/adapters", "further"),
        ("further.work", "further"),
    ],
)
def test_nothing_is_trained_into_what_it_starts_from_nor_around_it(tmp_path: Path, begun: str, output: str) -> None:
    (tmp_path / begun).mkdir(parents=True)
    (tmp_path / "link").symlink_to("adapters")
    with pytest.raises(UserError, match=f"{begun} would be changed by what is trained from it"):
        check_apart(str(tmp_path / output), str(tmp_path / begun))


@pytest.mark.parametrize("begun", [None, NANO, "some/base", "adapters"])
def test_what_lies_elsewhere_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str | None) -> None:
    """As an id of the hub does, whose first part is the name of the output."""
    monkeypatch.chdir(tmp_path)
    Path("adapters").mkdir()
    check_apart(str(tmp_path / "some"), begun)
    check_apart(str(tmp_path / "adapters2"), begun)


def test_the_digest_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    """Wherever it lies, of linked folders too, and of no hidden file, such as a download leaves behind."""
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet/file").write_text("same")
    whole = digest_of_place(str(tmp_path / "one"))
    (tmp_path / "one/.cache").mkdir()
    (tmp_path / "one/.cache/file").write_text("of a download")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/unet").symlink_to(tmp_path / "one/unet")
    assert {digest_of_place(str(tmp_path / name)) for name in ("one", "two", "linked")} == {whole}
    (tmp_path / "two/unet/file").rename(tmp_path / "two/unet/renamed")
    (tmp_path / "one/unet/file").write_text("other")
    assert whole not in {digest_of_place(str(tmp_path / name)) for name in ("one", "two")}
