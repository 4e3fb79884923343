"""Composites: everything that is said about them is true of their pixels, and their statistics meet the targets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import ValidationError
from scipy import ndimage

from dataset_tools import compositing
from dataset_tools.compositing import Background, CompositorSettings, compose, is_tall_enough
from dataset_tools.donors import Cutout, CutoutRow, DonorSettings, cut_out, cutout_rows
from dataset_tools.errors import Rejected
from dataset_tools.lighting import Effects, Figure, blend
from dataset_tools.picture_light import LightSettings
from dataset_tools.schema import (
    KEYPOINTS,
    NO_PARSING,
    PARSING_LABELS,
    EncodingSettings,
    MadeBy,
    Makers,
    Origin,
    Person,
    Sample,
)
from dataset_tools.shard_table import row_of

LIP = PARSING_LABELS["lip"]
RIGHT_ARM, LEFT_ARM = LIP.index("Right-arm"), LIP.index("Left-arm")
GREEN, BLUE, MAGENTA = (20, 230, 20), (30, 30, 240), (255, 0, 255)
DARK = LightSettings(shadows=0)
LIT = LightSettings(shadows=1, reflections=0.5)
SETTINGS = CompositorSettings(size=(96, 96), max_upscaling=2, light=DARK, donors=DonorSettings(min_height=40))


def origin(role: str, name: str) -> Origin:
    return Origin(role, "test", name, "CC BY 4.0", "Ann", "", "", "", "", "0" * 64, "resize 96x96")  # type: ignore[arg-type]


def donor_sample(number: int, *, feet_at: int = 112, label_set: str = "lip", around: Sequence[int] = MAGENTA) -> Sample:
    """One person in a picture of 120x100; the right hand is green and the left hand blue; arms have labels."""
    rng = np.random.default_rng(number)
    image = np.full((120, 100, 3), around, np.uint8)
    mask, parsing = np.zeros((120, 100), bool), np.zeros((120, 100), np.uint8)
    rows, columns = np.mgrid[:120, :100]

    def paint(where: np.ndarray, colour: Sequence[int], label: str) -> None:
        image[where], parsing[where] = colour, LIP.index(label)
        mask[where] = True

    top = feet_at - 96
    cloth = [int(v) for v in rng.integers(60, 120, 3)]
    paint((rows - top - 12) ** 2 + (columns - 50) ** 2 <= 100, (200, 160, 140), "Face")
    paint((abs(rows - top - 40) <= 22) & (abs(columns - 50) <= 12), cloth, "Upper-clothes")
    paint((rows > top + 58) & (rows <= feet_at) & (abs(columns - 44) <= 4), cloth, "Right-leg")
    paint((rows > top + 58) & (rows <= feet_at) & (abs(columns - 56) <= 4), cloth, "Left-leg")
    paint((abs(rows - top - 30) <= 4) & (columns >= 22) & (columns < 40), GREEN, "Right-arm")
    paint((abs(rows - top - 30) <= 4) & (columns > 60) & (columns <= 78), BLUE, "Left-arm")
    at = {
        "nose": (50, 12),
        "right_wrist": (28, 30),
        "left_wrist": (72, 30),
        "right_hip": (44, 60),
        "left_hip": (56, 60),
    }
    keypoints = np.zeros((18, 3), np.float32)
    for name, (x, y) in at.items():
        keypoints[KEYPOINTS.index(name)] = x, y + top, 0.9
    if label_set == "none":
        parsing[:] = NO_PARSING
    person = Person(f"p{number}", mask, category="Woman", keypoints=keypoints)
    return Sample(
        key=f"donor-{number}",
        split="train",
        configuration="real",
        image=image,
        people=[person],
        parsing=parsing,
        label_set=label_set,
        origins=[origin("image", f"photo-{number}")],
        made_by=Makers(pose=MadeBy("annotated")),
    )


def document(sample: Sample) -> dict[str, object]:
    return json.loads(sample.to_parts(EncodingSettings())["annotations.json"])


def told(sample: Sample) -> dict[str, object]:
    return row_of(document(sample), [person.mask for person in sample.people])


SAMPLES = [donor_sample(number) for number in range(12)]
ROWS = [row for index, sample in enumerate(SAMPLES) for row in cutout_rows(index, told(sample), SETTINGS.donors)]
BACKGROUND = np.random.default_rng(5).integers(90, 170, (130, 150, 3), dtype=np.uint8)
ORIGIN = origin("background", "place")
PLACE = Background(BACKGROUND, ORIGIN, np.tile(np.arange(150) > 70, (130, 1)))
"""Glossy on the right."""


@cache
def cutout(sample: int, person: int) -> Cutout:
    return cut_out(SAMPLES[sample], person, SETTINGS.donors)


def load(row: CutoutRow) -> Cutout:
    return cutout(row.sample, row.person)


def composite(key: str, place: Background = PLACE, **changes: object) -> Sample:
    return compose(key, "train", place, ROWS, load, SETTINGS.model_copy(update=changes))


CROWD = [composite(f"crowd-{i}", people={4: 1.0}, overlap=1.0, max_occlusion=0.7) for i in range(12)]


@pytest.mark.parametrize("sample", CROWD)
def test_visible_masks_are_disjoint_and_cover_what_the_complete_ones_cover(sample: Sample) -> None:
    assert np.sum([person.mask for person in sample.people], axis=0).max() == 1
    assert np.array_equal(
        np.any([person.mask for person in sample.people], axis=0),
        np.any([person.complete_mask for person in sample.people], axis=0),
    )


@pytest.mark.parametrize("sample", CROWD)
def test_masks_follow_from_layers_and_order(sample: Sample) -> None:
    nearest = np.full(sample.image.shape[:2], -1)
    for person in sorted(sample.people, key=lambda person: person.order or 0):
        assert np.array_equal(person.complete_mask, person.layer[..., 3] >= 128)
        assert not person.layer[person.layer[..., 3] == 0].any()
        nearest[person.layer[..., 3] >= 128] = person.order
    for person in sample.people:
        assert np.array_equal(person.mask, nearest == person.order)
    assert [person.order for person in sample.people] == list(range(len(sample.people)))


@pytest.mark.parametrize("sample", CROWD)
def test_occlusion_is_the_share_of_hidden_area_as_pycocotools_measures_it(sample: Sample) -> None:
    annotations = document(sample)["annotations"]
    for person in annotations:  # type: ignore[attr-defined]
        complete = coco_mask.area(person["complete_segmentation"])
        both = coco_mask.area(coco_mask.merge([person["complete_segmentation"], person["segmentation"]], intersect=1))
        assert person["occlusion"] == pytest.approx(1 - both / complete, abs=1e-5)
        assert person["occlusion"] <= 0.7
        assert person["occluded"] == (both < complete)


@pytest.mark.parametrize("sample", CROWD)
def test_pasting_the_layers_over_the_background_gives_the_image(sample: Sample) -> None:
    canvas = Image.fromarray(sample.background).convert("RGBA")
    for person in sample.people:
        canvas.alpha_composite(Image.fromarray(person.layer))
    assert np.abs(np.asarray(canvas.convert("RGB")).astype(int) - sample.image).max() <= 1


@pytest.mark.parametrize("sample", CROWD)
def test_outside_of_people_the_image_is_the_background_bit_for_bit(sample: Sample) -> None:
    outside = np.all([person.layer[..., 3] == 0 for person in sample.people], axis=0)
    assert outside.mean() > 0.2
    assert np.array_equal(sample.image[outside], sample.background[outside])


def test_background_times_effects_plus_layers_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers and the background of the sample, and the effects with which it was composed."""
    used: list[Effects] = []

    def spy(plate: np.ndarray, people: Sequence[Figure], effects: Effects) -> np.ndarray:
        used.append(effects)
        return blend(plate, people, effects)

    monkeypatch.setattr(compositing, "blend", spy)
    for number in range(10):
        sample = composite(f"crowd-{number}", people={4: 1.0}, overlap=1.0, light=LIT)
        effects = used.pop()
        picture = sample.background * effects.factor.astype(np.float64)
        picture += 0 if effects.added is None else effects.added
        for person, shade in zip(sample.people, effects.on_people, strict=True):
            colours = person.layer[..., :3].astype(np.float64)
            if shade is not None:
                rows, columns = (np.flatnonzero(person.layer[..., 3].any(axis)) for axis in (1, 0))
                colours[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] *= shade
            opacity = person.layer[..., 3:] / 255
            picture = (1 - opacity) * picture + opacity * colours
        assert np.abs(picture - sample.image).max() < 0.51


def test_the_image_is_as_without_effects_but_for_where_they_are_said_to_be() -> None:
    shown = fallen = 0
    for number in range(10):
        bare, lit = (composite(f"s{number}", people={3: 1.0}, overlap=1.0, light=each) for each in (DARK, LIT))
        assert all(
            np.array_equal(a.layer, b.layer) and np.array_equal(a.augmented_mask, b.augmented_mask)
            for a, b in zip(bare.people, lit.people, strict=True)
        )
        assert np.array_equal(bare.background, lit.background)
        assert not bare.effects.any() and all(person.effects == () for person in bare.people)
        assert lit.made_by.effects == MadeBy("composited") and lit.effects_of(range(3)).any()
        changed = np.abs(bare.image.astype(int) - lit.image).max(axis=2)
        assert np.array_equal(changed > 0, (changed > 0) & (lit.effects > 0))
        assert (changed[lit.effects > 0] > 0).mean() > 0.98
        for index, person in enumerate(lit.people):
            own = lit.effects_of([index])
            assert bool(person.effects) == own.any()
            for other in lit.people[index:]:
                assert not (own & (other.layer[..., 3] == 255) & other.mask).any()
            fallen += sum(int((own & other.mask).sum()) for other in lit.people[:index])
        shown += int((lit.effects > 0).sum())
    assert shown > 10 * 100 and fallen > 0


def test_only_marked_ground_mirrors_wherever_crop_and_flip_bring_it() -> None:
    """The picture is red where the ground is marked, so that a composite shows how much of each pixel is. There it is
    as if all of it were marked."""
    rng = np.random.default_rng(0)
    marked = np.kron(rng.integers(0, 2, (10, 10)), np.ones((23, 25))) > 0
    image = np.where(marked[..., None], (250, 60, 60), (10, 60, 60)).astype(np.uint8)
    light = LightSettings(shadows=0, reflections=1, gloss=(1, 1))
    inside = outside = flips = 0
    for number in range(12):
        some, all_, none = (
            composite(f"m{number}", Background(image, ORIGIN, glossy), people={2: 1.0}, light=light)
            for glossy in (marked, np.ones_like(marked), None)
        )
        red = some.background[..., 0]
        assert not (some.effects[red == 10]).any()
        assert np.array_equal(some.effects[red == 250], all_.effects[red == 250])
        assert np.array_equal(some.image[red == 250], all_.image[red == 250])
        assert {kind for person in some.people for kind in person.effects} <= {"reflection"}
        assert not none.effects.any()
        inside += np.count_nonzero(some.effects)
        outside += np.count_nonzero(all_.effects[red == 10])
        flips += "flip" in some.origins[0].transform
    assert inside > 500 and outside > 500 and 0 < flips < 12


def test_without_marks_the_picture_is_as_if_nothing_were_asked_to_mirror() -> None:
    for number in range(3):
        matt, asked = (
            composite(f"s{number}", Background(BACKGROUND, ORIGIN), light=LightSettings(reflections=share))
            for share in (0, 1)
        )
        assert np.array_equal(matt.image, asked.image) and np.array_equal(matt.effects, asked.effects)


def test_people_of_one_picture_stand_in_one_light() -> None:
    """Each alone casts to the same side: hard light, from a side, in a picture where they stand apart."""
    settings = LightSettings(shadows=1, softness=(0, 0), contact=(0, 0), height=(25, 35))
    told = 0
    for number in range(12):
        sample = composite(f"apart{number}", people={2: 1.0}, overlap=0.0, height=(0.35, 0.45), light=settings)
        sides = []
        for index, person in enumerate(sample.people):
            columns = np.nonzero(sample.effects_of([index]) & ~person.complete_mask)[1]
            if columns.size > 30:
                sides.append(columns.mean() - np.nonzero(person.complete_mask)[1].mean())
        if len(sides) == 2 and min(abs(side) for side in sides) > 4:
            told += 1
            assert np.sign(sides[0]) == np.sign(sides[1])
    assert told > 4


def test_whoever_stands_lower_is_nearer_and_larger() -> None:
    feet, heights = [], []
    for sample in CROWD:
        bottoms = [int(np.nonzero(person.complete_mask)[0].max()) for person in sample.people]
        assert bottoms == sorted(bottoms)
        for person, bottom in zip(sample.people, bottoms, strict=True):
            feet.append(bottom)
            heights.append(bottom - int(np.nonzero(person.complete_mask)[0].min()))
    assert np.corrcoef(feet, heights)[0, 1] > 0.6


def test_people_stay_whole_within_the_picture_and_within_the_height_range() -> None:
    for sample in CROWD:
        for person in sample.people:
            rows, columns = np.nonzero(person.complete_mask)
            assert rows.min() >= 0 and columns.min() >= 0
            assert 0.35 * 96 - 3 <= rows.max() + 1 - rows.min() <= 0.85 * 96 + 3
            scale = (rows.max() + 1 - rows.min()) / 98
            assert person.complete_mask.sum() == pytest.approx(SAMPLES[0].people[0].mask.sum() * scale**2, rel=0.25)


def parts_of(sample: Sample) -> dict[str, bytes]:
    return sample.to_parts(EncodingSettings(image_format="png"))


def test_the_same_key_gives_the_same_bytes_whatever_was_composed_before() -> None:
    first = parts_of(composite("again"))
    composite("something-else")
    assert parts_of(composite("again")) == first


def test_another_key_or_seed_gives_another_picture() -> None:
    pictures = [composite("a"), composite("b"), composite("a", seed=1)]
    assert len({picture.image.tobytes() for picture in pictures}) == 3
    assert len({picture.background.tobytes() for picture in pictures}) == 3


def test_samples_survive_the_way_through_shard_parts() -> None:
    sample = CROWD[0]
    again = Sample.from_parts(sample.key, parts_of(sample))
    assert np.array_equal(again.image, sample.image) and np.array_equal(again.background, sample.background)
    for one, other in zip(sample.people, again.people, strict=True):
        assert np.array_equal(one.layer, other.layer) and np.array_equal(one.augmented_mask, other.augmented_mask)


@pytest.mark.slow
def test_people_a_picture_and_overlap_meet_their_targets() -> None:
    target = {1: 0.3, 2: 0.4, 3: 0.2, 4: 0.1}
    samples = [
        composite(f"target{i}", size=(64, 64), people=target, height=(0.3, 0.7), overlap=0.4) for i in range(200)
    ]
    found = Counter(len(sample.people) for sample in samples)
    assert set(found) <= set(target)
    for number, share in target.items():
        assert found[number] / 200 == pytest.approx(share, abs=0.07)
    several = [sample for sample in samples if len(sample.people) > 1]
    overlapping = [sample for sample in several if any(person.occlusion for person in sample.people)]
    assert len(overlapping) / len(several) == pytest.approx(0.4, abs=0.07)
    assert all((sample.stratum == "overlapping") == (sample in overlapping) for sample in several)
    worst = [max(person.occlusion or 0 for person in sample.people) for sample in overlapping]
    assert max(worst) <= SETTINGS.max_occlusion
    assert 0.15 < np.mean(worst) < 0.45


def test_people_who_do_not_overlap_stand_apart() -> None:
    for number in range(10):
        sample = composite(f"apart{number}", people={3: 1.0}, overlap=0.0, height=(0.3, 0.5))
        _, count = ndimage.label(np.any([p.complete_mask for p in sample.people], axis=0), np.ones((3, 3)))
        assert count == len(sample.people) == 3
        assert sample.stratum == "two_or_three"
        assert all(person.occlusion == 0 and not person.occluded for person in sample.people)


def test_no_donor_appears_twice_in_a_picture_and_each_brings_their_origin() -> None:
    for sample in CROWD:
        ids = [person.id for person in sample.people]
        assert len(set(ids)) == len(ids) == 4
        assert [o.role for o in sample.origins] == ["background"] + ["person"] * 4
        assert [f"donor-{o.id.removeprefix('photo-')}" for o in sample.origins[1:]] == [i.split("/")[0] for i in ids]
        assert all(o.transform.startswith("resize 96x96; cut out p") for o in sample.origins[1:])
        assert sample.origins[0].transform.startswith("resize 96x96; crop ")


@pytest.mark.parametrize(
    ("flip", "green_wrist", "green_arm"), [(0, "right_wrist", RIGHT_ARM), (1, "left_wrist", LEFT_ARM)]
)
def test_keypoints_and_labels_follow_the_pixels_also_in_a_mirror(flip: float, green_wrist: str, green_arm: int) -> None:
    blue_wrist = {"left_wrist": "right_wrist", "right_wrist": "left_wrist"}[green_wrist]
    blue_arm = {LEFT_ARM: RIGHT_ARM, RIGHT_ARM: LEFT_ARM}[green_arm]
    for number in range(6):
        sample = composite(f"m{number}", people={1: 1.0}, flip=flip, colour_match=0.0, height=(0.6, 0.85))
        (person,) = sample.people
        for wrist, arm, colour in [(green_wrist, green_arm, GREEN), (blue_wrist, blue_arm, BLUE)]:
            x, y, score = person.keypoints[KEYPOINTS.index(wrist)]
            assert score == pytest.approx(0.9)
            assert np.abs(sample.image[round(y), round(x)].astype(int) - colour).max() < 30
            assert sample.parsing[round(y), round(x)] == arm
        assert (sample.parsing[~person.mask] == 0).all()


def test_keypoints_that_others_hide_are_not_found_and_the_others_are() -> None:
    hidden = shown = 0
    for sample in CROWD:
        for person in sample.people:
            known = person.keypoints[:, 2] > 0
            assert not person.keypoints[~known].any()
            for x, y, _ in person.keypoints[known]:
                assert person.mask[round(y), round(x)]
            shown += int(known.sum())
            hidden += 5 - int(known.sum())
    assert hidden > 0 and shown > hidden


def test_augmented_masks_are_faulty_copies_of_the_visible_ones() -> None:
    overlaps = [
        (p.augmented_mask & p.mask).sum() / (p.augmented_mask | p.mask).sum() for sample in CROWD for p in sample.people
    ]
    assert min(overlaps) > 0.3 and np.mean(overlaps) > 0.7 and min(overlaps) < 0.95


def alone(sample: Sample, background: np.ndarray, key: str = "alone", **changes: object) -> Sample:
    """A composite of the one person of ``sample``."""
    settings = SETTINGS.model_copy(update={"people": {1: 1.0}, "colour_match": 0.0, **changes})
    rows = cutout_rows(0, told(sample), settings.donors)

    def load(row: CutoutRow) -> Cutout:
        return cut_out(sample, row.person, settings.donors)

    return compose(key, "train", Background(background, ORIGIN), rows, load, settings)


@pytest.mark.parametrize("height", [(0.4, 0.41), (0.55, 0.56)])
def test_nothing_of_the_old_background_comes_along(height: tuple[float, float]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 100, 3), dtype=np.uint8)
    pictures = []
    for around in (np.uint8(MAGENTA), np.uint8([255, 255, 0]), noise):
        sample = donor_sample(3)
        sample.image = np.where(sample.people[0].mask[..., None], sample.image, around)
        pictures.append(alone(sample, BACKGROUND, height=height).image)
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_edges_that_mixed_with_the_old_background_leave_no_halo() -> None:
    sample = donor_sample(3)
    sample.image = ndimage.gaussian_filter(sample.image, (0.5, 0.5, 0))
    made = alone(sample, np.full((100, 100, 3), 90, np.uint8))
    # No other channel than that of the green and the blue hand is above 200, but for a halo of magenta.
    hands = ndimage.binary_dilation(np.isin(made.parsing, [LEFT_ARM, RIGHT_ARM]), iterations=4)
    redder = made.image[..., 0].astype(int) - made.image[..., 1]
    assert redder[~hands].max() < 60


def test_colour_matching_moves_people_towards_the_light_of_the_place_within_bounds() -> None:
    dark = np.full((96, 96, 3), (10, 10, 30), np.uint8)

    def mean_of_person(strength: float) -> np.ndarray:
        settings = SETTINGS.model_copy(update={"colour_match": strength, "people": {1: 1.0}})
        sample = compose("night", "train", Background(dark, ORIGIN), ROWS, load, settings)
        return sample.image[sample.people[0].complete_mask].mean(axis=0)

    means = [mean_of_person(strength) for strength in (0.0, 0.3, 1.0)]
    assert means[0].mean() > means[1].mean() > means[2].mean() > means[0].mean() - 70


def test_people_cut_off_below_stand_at_the_lower_edge_again() -> None:
    sample = donor_sample(1, feet_at=130)
    sample.people[0].truncated = True
    for number in range(6):
        (person,) = alone(sample, BACKGROUND, f"cut{number}").people
        assert person.truncated
        assert (person.layer[-1, :, 3] == 255).any()
        assert person.complete_mask[-1].sum() == pytest.approx(person.complete_mask[-4].sum(), abs=2)


def test_donors_who_would_stay_too_small_are_told_beforehand() -> None:
    """95 pixels twice enlarged are 47 % of 400 pixels, but 27 % of 700; an adult is to have 35 % at least."""
    row = ROWS[0]
    assert row.height == 95
    assert is_tall_enough(row, SETTINGS.model_copy(update={"size": (400, 400)}))
    assert not is_tall_enough(row, SETTINGS.model_copy(update={"size": (700, 700)}))
    child, near = row.model_copy(update={"category": "Boy"}), row.model_copy(update={"truncated": True})
    sizes = SETTINGS.model_copy(update={"size": (600, 600)}), SETTINGS.model_copy(update={"size": (400, 400)})
    assert is_tall_enough(child, sizes[0]) and not is_tall_enough(row, sizes[0])
    assert not is_tall_enough(near, sizes[1])


def test_a_donor_that_cannot_be_loaded_is_replaced_by_another() -> None:
    def picky(row: CutoutRow) -> Cutout:
        if row.sample != 4:
            raise Rejected("thin", "no pixels")
        return load(row)

    settings = SETTINGS.model_copy(update={"people": {1: 1.0}})
    made = compose("picky", "train", PLACE, ROWS, picky, settings)
    assert [person.id for person in made.people] == ["donor-4/p4"]


def test_without_a_person_or_a_large_enough_background_the_sample_is_rejected() -> None:
    for rows in ([], ROWS):
        with pytest.raises(Rejected) as caught:
            compose("k", "train", PLACE, rows, refuse, SETTINGS)
        assert caught.value.reason == "no-placement"
    with pytest.raises(Rejected, match="background-too-small"):
        compose("k", "train", Background(BACKGROUND[:40], ORIGIN), ROWS, load, SETTINGS)


def refuse(row: CutoutRow) -> Cutout:
    raise Rejected("gone", row.key)


def test_donors_without_parsing_make_composites_without_parsing() -> None:
    samples = [donor_sample(number, label_set="none") for number in range(3)]

    def bare(row: CutoutRow) -> Cutout:
        return cut_out(samples[row.sample], row.person, SETTINGS.donors)

    made = compose("bare", "train", PLACE, ROWS[:3], bare, SETTINGS)
    assert made.label_set == "none" and (made.parsing == NO_PARSING).all()

    def mixed(row: CutoutRow) -> Cutout:
        return bare(row) if row.sample == 0 else load(row)

    settings = SETTINGS.model_copy(update={"people": {3: 1.0}, "overlap": 1.0})
    with pytest.raises(ValueError, match="label sets"):
        compose("mixed", "train", PLACE, ROWS[:3], mixed, settings)


def test_donors_without_a_pose_go_with_those_whose_pose_has_one_maker() -> None:
    """As annotators gave joints to some people only."""
    makers = [Makers(), Makers(pose=MadeBy("annotated")), Makers(pose=MadeBy("openpose"))]

    def made(row: CutoutRow) -> Cutout:
        return replace(load(row), made_by=makers[row.sample])

    settings = SETTINGS.model_copy(update={"people": {2: 1.0}, "overlap": 1.0})
    sample = compose("some", "train", PLACE, ROWS[:2], made, settings)
    assert len(sample.people) == 2 and sample.made_by.pose == MadeBy("annotated")
    with pytest.raises(ValueError, match="estimators cannot be mixed"):
        compose("two", "train", PLACE, ROWS[1:3], made, settings)


@pytest.mark.parametrize(
    "wrong",
    [{"people": {}}, {"people": {0: 1}}, {"people": {2: 0}}, {"size": (8, 512)}, {"height": (0.9, 0.5)},
     {"horizon": (0.2, 1.2)}, {"horizon": (1, 1)}, {"size": (6144, 6144), "people": {5: 1}},
     {"samples": {"train": -1}}, {"samples": {"dev": 3}}, {"samples": {}}, {"samples": {"train": 0, "test": 0}}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CompositorSettings.model_validate(wrong)


def test_a_split_that_is_not_named_gets_no_composites() -> None:
    assert CompositorSettings.model_validate({"samples": {"test": 5}}).samples == {
        "train": 0,
        "validation": 0,
        "test": 5,
    }
