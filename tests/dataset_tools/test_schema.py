"""Samples and their parts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from dataset_tools.schema import (
    CONFIGURATIONS,
    EFFECTS_UNKNOWN,
    KEY_PATTERN,
    KEYPOINTS,
    Configuration,
    EncodingSettings,
    Person,
    Sample,
    decode_rle,
    effect_bits,
    encode_image,
    encode_rle,
)

PNG = EncodingSettings(image_format="png")
MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))
PARTS = {
    "real": ["image.png", "annotations.json", "parsing.png", "effects.png"],
    "paired": ["image.png", "annotations.json", "background.png", "parsing.png", "effects.png", "known.png"],
    "composite": ["image.png", "annotations.json", "background.png", "parsing.png", "effects.png", "layers.png"],
}


def assert_same(one: Any, other: Any) -> None:
    """Equal in every field, arrays element by element."""
    for name, value in vars(one).items():
        twin = getattr(other, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, twin, err_msg=name)
            assert value.dtype == twin.dtype, name
        elif name == "people":
            assert len(value) == len(twin)
            for person, double in zip(value, twin, strict=True):
                assert_same(person, double)
        else:
            assert value == twin, name


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("people", [1, 3])
def test_png_parts_give_the_sample_back_exactly(
    make_sample: Callable[..., Sample], configuration: Configuration, people: int
) -> None:
    sample = make_sample(configuration, people=people)
    parts = sample.to_parts(PNG)
    assert list(parts) == PARTS[configuration]
    assert_same(sample, Sample.from_parts(sample.key, parts))


@given(masks=st.lists(hnp.arrays(bool, (7, 9)), min_size=1, max_size=3), data=st.data())
@settings(max_examples=50)
def test_any_masks_and_keypoints_survive_the_round_trip(masks: list[np.ndarray], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keypoints = data.draw(hnp.arrays(np.int64, (18, 3), elements=st.integers(-80, 800))) / np.float32(8)
    people = [Person(id=f"p{i}", mask=mask, keypoints=keypoints.astype(np.float32)) for i, mask in enumerate(masks)]
    image = rng.integers(0, 256, (7, 9, 3), np.uint8)
    parsing = rng.integers(0, 20, (7, 9), np.uint8)
    sample = Sample("k", "train", "real", image, people, parsing, "lip", origins=[])
    assert_same(sample, Sample.from_parts("k", sample.to_parts(PNG)))


def test_annotations_are_coco_as_pycocotools_computes_it(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("composite", people=3)
    document = json.loads(sample.to_parts(PNG)["annotations.json"])
    assert len(document["annotations"]) == 3
    for person, entry in zip(sample.people, document["annotations"], strict=True):
        rows, columns = np.nonzero(person.mask)
        x, y = columns.min(), rows.min()
        assert entry["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
        assert entry["area"] == person.mask.sum()
        assert entry["num_keypoints"] == (person.keypoints[:, 2] > 0).sum()
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), person.mask)
        assert person.complete_mask is not None
        np.testing.assert_array_equal(coco_mask.decode(entry["complete_segmentation"]), person.complete_mask)


def test_layers_are_one_strip_from_top_to_bottom_in_annotation_order(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("composite", people=2, size=(40, 56))
    strip = np.asarray(Image.open(io.BytesIO(sample.to_parts(PNG)["layers.png"])))
    assert strip.shape == (80, 56, 4)
    np.testing.assert_array_equal(strip[40:], sample.people[1].layer)


def test_effects_that_nobody_knows_fill_their_part_and_come_back_as_not_known(
    make_sample: Callable[..., Sample],
) -> None:
    sample = make_sample("real")
    parts = sample.to_parts(PNG)
    assert (np.asarray(Image.open(io.BytesIO(parts["effects.png"]))) == EFFECTS_UNKNOWN).all()
    read = Sample.from_parts(sample.key, parts)
    assert read.effects is None and read.effects_of([0]) is None


def test_the_eighth_person_and_all_after_share_a_bit_of_the_effects(make_sample: Callable[..., Sample]) -> None:
    masks = [np.arange(12) == index for index in range(10)]
    bits = effect_bits([mask[None] for mask in masks])
    assert bits[0].tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 128, 128, 0, 0]
    sample = replace(make_sample("composite"), effects=bits)
    found = {index: np.flatnonzero(sample.effects_of([index])).tolist() for index in (0, 6, 7, 9)}
    assert found == {0: [0], 6: [6], 7: [7, 8, 9], 9: [7, 8, 9]}
    assert not sample.effects_of([]).any()
    assert np.flatnonzero(sample.effects_of([1, 3])).tolist() == [1, 3]


def test_jpeg_is_within_its_quality_and_the_same_every_time(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("real")
    one, two = (encode_image(sample.image, EncodingSettings(jpeg_quality=95)) for _ in range(2))
    assert one == two
    assert Image.open(io.BytesIO(one)).format == "JPEG"
    decoded = Sample.from_parts(sample.key, sample.to_parts(EncodingSettings())).image
    assert np.abs(decoded.astype(int) - sample.image).mean() < 4


@settings(max_examples=50)
@given(MASKS)
def test_rle_is_what_pycocotools_writes_and_reads(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)


@settings(max_examples=50)
@given(MASKS, st.data())
def test_rle_whose_runs_do_not_fill_its_size_is_refused(mask: np.ndarray, data: st.DataObject) -> None:
    rle = encode_rle(mask)
    height, width = rle["size"]
    wrong = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)).filter(lambda s: s[0] * s[1] != height * width))
    with pytest.raises(ValueError, match="cover"):
        decode_rle({"size": list(wrong), "counts": rle["counts"]})
    with pytest.raises(ValueError, match="cover"):
        decode_rle({"size": [height, width], "counts": ""})


@pytest.mark.parametrize(
    ("counts", "message"),
    [("85OO", "a run of -1 pixels"), ("8XPPPPP0", "a number of 7 characters")],
    ids=["negative", "padded"],
)
def test_rle_whose_runs_are_no_lengths_is_refused(counts: str, message: str) -> None:
    """In all they fill the size."""
    with pytest.raises(ValueError, match=message):
        decode_rle({"size": [4, 4], "counts": counts})


def _shapes(sample: Sample, **person: Any) -> Sample:
    return replace(sample, people=[replace(sample.people[0], **person), *sample.people[1:]])


WRONG: dict[str, tuple[Configuration, Callable[[Sample], Sample], str]] = {
    "a key with a dot": ("real", lambda s: replace(s, key="a.b"), "keys hold"),
    "a key that climbs": ("real", lambda s: replace(s, key="../a"), "keys hold"),
    "an empty key": ("real", lambda s: replace(s, key=""), "keys hold"),
    "nobody": ("real", lambda s: replace(s, people=[]), "no person"),
    "an unknown label set": ("real", lambda s: replace(s, label_set="own"), "label set 'own'"),
    "no plate in paired": ("paired", lambda s: replace(s, background=None), "clean plate"),
    "a plate that is known nowhere said": ("paired", lambda s: replace(s, known=None), "clean plate is known"),
    "a known area in composite": ("composite", lambda s: replace(s, known=s.parsing > 0), "goes with paired"),
    "a smaller known area": ("paired", lambda s: replace(s, known=s.known[1:]), "known differs"),
    "a grey known area": ("paired", lambda s: replace(s, known=s.parsing), "known is not bool"),
    "effects of nobody": ("real", lambda s: replace(s, effects=s.parsing), "effects go with"),
    "no effects of somebody": ("composite", lambda s: replace(s, effects=None), "effects go with"),
    "effects in colour": ("composite", lambda s: replace(s, effects=s.image), "effects are not"),
    "a plate in real": ("real", lambda s: replace(s, background=s.image), "clean plate"),
    "a smaller plate": ("paired", lambda s: replace(s, background=s.image[1:]), "background differs"),
    "a smaller label map": ("real", lambda s: replace(s, parsing=s.parsing[:, 1:]), "parsing differs"),
    "labels that are not bytes": ("real", lambda s: replace(s, parsing=s.parsing.astype(int)), "parsing is not"),
    "a smaller mask": ("real", lambda s: _shapes(s, mask=s.people[0].mask[1:]), "mask of person 'sample-0-p0'"),
    "no complete mask": ("composite", lambda s: _shapes(s, complete_mask=None), "go with composite"),
    "no layer": ("composite", lambda s: _shapes(s, layer=None), "go with composite"),
    "an order in real": ("real", lambda s: _shapes(s, order=0), "go with composite"),
    "a taller layer": ("composite", lambda s: _shapes(s, layer=np.zeros((99, 64, 4), np.uint8)), "layer of person"),
    "an opaque layer": ("composite", lambda s: _shapes(s, layer=s.image), "layer of person"),
    "a smaller complete mask": ("composite", lambda s: _shapes(s, complete_mask=s.parsing[1:] > 0), "complete mask of"),
    "17 keypoints": ("real", lambda s: _shapes(s, keypoints=np.zeros((17, 3), np.float32)), "keypoints of person"),
    "a keypoint nowhere": ("real", lambda s: _shapes(s, keypoints=np.full((18, 3), np.nan)), "keypoints of person"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sample_that_breaks_the_schema_is_not_written_and_its_key_is_named(
    make_sample: Callable[..., Sample], name: str
) -> None:
    configuration, spoil, message = WRONG[name]
    sample = spoil(make_sample(configuration))
    with pytest.raises(ValueError, match=message) as caught:
        sample.to_parts(PNG)
    assert f"sample {sample.key!r}" in str(caught.value)


def _document(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def spoil(parts: dict[str, bytes]) -> dict[str, bytes]:
        document = json.loads(parts["annotations.json"])
        document = edit(document) or document
        return {**parts, "annotations.json": json.dumps(document).encode()}

    return spoil


BROKEN: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "no annotations": (lambda p: {k: v for k, v in p.items() if k != "annotations.json"}, "no part annotations.json"),
    "no image": (lambda p: {k: v for k, v in p.items() if k != "image.png"}, "no part image.jpg or image.png"),
    "no parsing": (lambda p: {k: v for k, v in p.items() if k != "parsing.png"}, "no part parsing.png"),
    "annotations that are not JSON": (lambda p: {**p, "annotations.json": b"{"}, "not JSON"),
    "annotations that are not UTF-8": (lambda p: {**p, "annotations.json": b'{"a":"\xff"}'}, "not JSON"),
    "annotations that are a list": (lambda p: {**p, "annotations.json": b"[]"}, "schema version None"),
    "a cut image": (lambda p: {**p, "image.png": p["image.png"][:400]}, "image.png cannot be decoded"),
    "a spoilt header": (
        lambda p: {**p, "image.png": p["image.png"][:29] + b"\0\0\0\0" + p["image.png"][33:]},
        "image.png",
    ),
    "text for an image": (lambda p: {**p, "parsing.png": b"not a picture"}, "parsing.png cannot be decoded"),
    "version 1": (_document(lambda d: d.update(schema_version="1.0")), "schema version '1.0'"),
    "no split": (_document(lambda d: d.pop("split") and None), "'split'"),
    "people that are none": (_document(lambda d: d.update(annotations=None)), "annotations.json breaks the schema"),
    "an origin with another field": (_document(lambda d: d["origins"][0].update(x=1)), "annotations.json breaks"),
    "too few keypoints": (_document(lambda d: d["annotations"][0]["keypoints"].pop() and None), "18 times"),
    "a larger mask": (_document(lambda d: d["annotations"][0]["segmentation"].update(size=[99, 64])), "99, 64"),
    "a short mask": (_document(lambda d: d["annotations"][1]["segmentation"].update(counts="0")), "cover"),
    "a layer too few": (_document(lambda d: d["annotations"].append(d["annotations"][0])), "layers.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts_are_refused_and_key_and_part_are_named(make_sample: Callable[..., Sample], name: str) -> None:
    spoil, message = BROKEN[name]
    sample = make_sample("composite")
    parts = spoil(sample.to_parts(PNG))
    with pytest.raises(ValueError, match=message) as caught:
        Sample.from_parts(sample.key, parts)
    assert f"sample {sample.key!r}" in str(caught.value)


def test_the_longest_key_fits_a_plain_tar_member_name() -> None:
    assert KEY_PATTERN.fullmatch("k" * 80)
    assert not KEY_PATTERN.fullmatch("k" * 81)
    assert all(len("k" * 80 + f".{part}") <= 100 for part in PARTS["composite"])


def test_there_are_the_18_joints_of_openpose() -> None:
    assert len(KEYPOINTS) == len(set(KEYPOINTS)) == 18
    assert KEYPOINTS[:3] == ("nose", "neck", "right_shoulder")
