from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.errors import UserError
from mild.evaluation.pairs import PairsSettings, blind_png, draw, draw_pairs, folder_beside, list_pairs, read_pair

MakeEvaluation = Callable[..., Path]


def test_of_every_method_the_same_pictures_are_drawn(make_evaluation: MakeEvaluation) -> None:
    drawn = draw_pairs(make_evaluation(["a", "b", "c"], keys=5), PairsSettings(pairs=3))
    keys = {method: [pair.key for pair in drawn.pairs if pair.method == method] for method in ("a", "b", "c")}
    assert keys["a"] == keys["b"] == keys["c"] and len(set(keys["a"])) == 3


def test_a_larger_draw_keeps_the_smaller_one_and_another_seed_gives_another(make_evaluation: MakeEvaluation) -> None:
    pairs = list_pairs(make_evaluation(["a", "b"], keys=8), "composite", ["a", "b"])
    few, many = draw(pairs, 3, 0), draw(pairs, 6, 0)
    assert few == many[: len(few)]
    assert draw(pairs, 6, 1) != many
    assert len(draw(pairs, 100, 0)) == 16


def test_pictures_that_a_method_has_no_result_for_are_never_drawn(make_evaluation: MakeEvaluation) -> None:
    evaluation = make_evaluation(["a", "b"], keys=3)
    (evaluation / "pictures/composite/sample-1/exact/b.png").unlink()
    assert {pair.key for pair in draw_pairs(evaluation, PairsSettings()).pairs} == {"sample-0", "sample-2"}


def test_methods_that_were_not_run_are_left_out(make_evaluation: MakeEvaluation) -> None:
    evaluation = make_evaluation(["a", "b"])
    for result in evaluation.rglob("b.png"):
        result.unlink()
    drawn = draw_pairs(evaluation, PairsSettings())
    assert [method.name for method in drawn.methods] == ["a"]
    assert len(drawn.pairs) == 3


def test_what_is_no_evaluation_is_told_in_one_line(make_evaluation: MakeEvaluation, tmp_path: Path) -> None:
    evaluation = make_evaluation()
    with pytest.raises(UserError, match=r"holds no summary\.json"):
        draw_pairs(tmp_path, PairsSettings())
    with pytest.raises(UserError, match=r"dataset 'coco' is none of .*: composite"):
        draw_pairs(evaluation, PairsSettings(dataset="coco"))
    (evaluation / "summary.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="evaluate again"):
        draw_pairs(evaluation, PairsSettings())


def test_what_a_file_says_beside_its_pixels_stays_out(make_evaluation: MakeEvaluation) -> None:
    pair = draw_pairs(make_evaluation(["secret-method"]), PairsSettings()).pairs[0]
    stored = pair.result.read_bytes()
    assert b"secret-method" in stored
    blind = blind_png(stored)
    assert b"secret-method" not in blind
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(blind))), np.asarray(Image.open(pair.result)))


def test_large_pictures_are_shrunk_to_their_longest_side() -> None:
    buffer = io.BytesIO()
    Image.new("L", (300, 200)).save(buffer, "PNG")
    shrunk = Image.open(io.BytesIO(blind_png(buffer.getvalue(), 150)))
    assert (shrunk.size, shrunk.mode) == ((150, 100), "RGB")


def test_a_picture_that_has_changed_since_is_not_taken_for_the_one_that_was_drawn(
    make_evaluation: MakeEvaluation,
) -> None:
    pair = draw_pairs(make_evaluation(), PairsSettings()).pairs[0]
    digest = pair.digest
    read_pair(pair)
    Image.new("RGB", (8, 8)).save(pair.result)
    with pytest.raises(UserError, match=r"have changed; start again"):
        read_pair(pair)
    assert pair.digest == digest
    pair.result.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_pair(pair)


def test_opinions_lie_beside_the_folder_that_the_next_run_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "evaluation-judged"
    assert folder_beside(tmp_path / "evaluation") == beside
    (tmp_path / "evaluation").mkdir()
    monkeypatch.chdir(tmp_path / "evaluation")
    assert folder_beside(Path(".")) == beside
