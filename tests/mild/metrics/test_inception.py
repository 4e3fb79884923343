"""FID and KID against other implementations on the same features, and the Inception against torch-fidelity's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from dataset_tools.errors import UserError
from mild.metrics import inception
from mild.metrics.inception import FID, KID, frechet_distance, kernel_distance, moments
from mild.metrics.metric import NotComputed


def drawn(seed: int, count: int, dimensions: int = 12) -> np.ndarray:
    """Correlated features far from zero, as those after a rectifier are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions))
    return (10 + seed + mixed).astype(np.float32)


def in_parts(features: np.ndarray, sizes: tuple[int, ...] = (1, 0, 7)) -> Iterator[np.ndarray]:
    """The features bit by bit, once."""
    yield from np.split(features, np.cumsum(sizes))


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, with SciPy's root of the product."""
    a, b = a.astype(float), b.astype(float)
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root).real)


class Themselves(torch.nn.Module):
    """What takes features for pictures."""

    num_features = 12

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def test_fid_is_its_definition_and_what_torchmetrics_says() -> None:
    a, b = drawn(1, 200), drawn(2, 90)
    found = FID().distance(in_parts(a), in_parts(b), seed=0)
    assert found == pytest.approx(by_definition(a, b), rel=1e-6)
    theirs = FrechetInceptionDistance(feature=Themselves())
    theirs.update(torch.from_numpy(a).double(), real=False)
    theirs.update(torch.from_numpy(b).double(), real=True)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_fid_of_fewer_pictures_than_features_is_that_of_the_space_they_span() -> None:
    """Of singular covariances ``X^T X`` and ``Y^T Y`` the trace of the root is the sum of singular values of X Y^T."""
    a, b = drawn(1, 40, 300), drawn(2, 25, 300)
    x, y = (((rows := part.astype(float)) - rows.mean(0)) / np.sqrt(len(rows) - 1) for part in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    shift = np.square(a.astype(float).mean(0) - b.astype(float).mean(0)).sum()
    expected = shift + np.square(x).sum() + np.square(y).sum() - 2 * overlap
    assert FID().distance(in_parts(a), in_parts(b), seed=0) == pytest.approx(expected, rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero_although_its_covariance_is_singular() -> None:
    a = drawn(1, 40, 300)
    spread = np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(moments([a]), moments([a[::-1]])) == pytest.approx(0, abs=1e-9 * spread)
    same = np.ones((3, 300), np.float32)
    assert frechet_distance(moments([same]), moments([a])) == pytest.approx(
        spread + np.square(a.astype(float).mean(0) - 1).sum()
    )


def test_kid_is_what_torch_fidelity_says_of_all_pictures() -> None:
    a, b = drawn(1, 60), drawn(2, 60)
    theirs = kid_features_to_metric(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), verbose=False, kid_subsets=2, kid_subset_size=60,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0, rng_seed=0,
    )  # fmt: skip
    expected = theirs["kernel_inception_distance_mean"]
    assert KID().distance(in_parts(a), in_parts(b), seed=0) == pytest.approx(expected, rel=1e-9)


def test_kid_of_subsets_is_near_that_of_all_and_hangs_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(1, 90), drawn(2, 70)
    whole = kernel_distance([a[:70]], [b], seed=0)
    monkeypatch.setattr(inception, "SUBSET_SIZE", 20)
    found = [kernel_distance(in_parts(a), in_parts(b), seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found == pytest.approx([whole] * 3, rel=0.1)


def test_kid_draws_from_the_larger_set_as_many_as_the_smaller_one_has() -> None:
    """Were the first ones taken, it would be nothing."""
    few, many = drawn(1, 30), np.concatenate([drawn(1, 30), drawn(3, 300)])
    assert kernel_distance([many[30:]], [few], seed=0) > 0
    assert kernel_distance([many], [few], seed=0) > 0.5 * kernel_distance([many[30:]], [few], seed=0)


@pytest.mark.parametrize("metric", [FID(), KID()])
@pytest.mark.parametrize("count", [0, 1])
def test_less_than_two_pictures_have_no_distance(metric: FID | KID, count: int) -> None:
    for sets in ([drawn(1, count)], [drawn(2, 5)]), ([drawn(2, 5)], list(drawn(1, count)[None])):
        with pytest.raises(NotComputed, match=f"one set has {count}"):
            metric.distance(*map(iter, sets), seed=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch-fidelity's layout, random."""

    class Unfilled(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        state = Unfilled("inception", ["2048"]).state_dict()
    for name, tensor in state.items():
        if name.endswith("bn.weight"):  # or nothing would be left after so many layers
            tensor.fill_(2.5)
    path = tmp_path_factory.mktemp("inception") / "weights-inception.pth"
    torch.save(state, path)
    return path


def settings(path: Path) -> FID:
    return FID(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity_for_pictures_of_any_size(weights: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in [(40, 60), (320, 310)]]
    found = settings(weights).features(pictures)
    assert found.shape == (2, 2048) and found.dtype == np.float32
    theirs = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
    for picture, row in zip(pictures, found, strict=True):
        (expected,) = theirs(torch.from_numpy(picture).permute(2, 0, 1)[None])
        assert expected.std() > 1e-3 * expected.mean() > 0
        np.testing.assert_allclose(row, expected[0], rtol=1e-4, atol=1e-5 * float(expected.mean()))


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"other\.pth cannot be used as Inception of FID") as refused:
        settings(path).features([np.zeros((8, 8, 3), np.uint8)])
    assert "\n" not in str(refused.value)


def test_without_weights_it_says_what_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for metric in (FID(), KID(reference_pictures="person-free")):
        missing = metric.missing()
        assert missing is not None and "mild weights pull inception-fid" in missing
        with pytest.raises(UserError, match="mild weights pull inception-fid"):
            metric.fingerprint()


def test_fid_and_kid_share_features_and_are_told_apart(weights: Path) -> None:
    fid = settings(weights)
    kid, star = (
        kind.model_validate(fid.model_dump(exclude={"kind"}) | changes)
        for kind, changes in ((KID, {"batch_size": 3}), (FID, {"reference_pictures": "person-free"}))
    )
    assert fid.missing() is None
    assert fid.features_fingerprint() == kid.features_fingerprint() == star.features_fingerprint()
    assert len({metric.fingerprint() for metric in (fid, kid, star)}) == 3
    assert fid.model_copy(update={"batch_size": 1}).fingerprint() == fid.fingerprint()
    person_free = FID(reference_pictures="person-free")
    assert (FID().name, FID().title, FID().reference) == ("fid", "FID", "clean backgrounds")
    assert (person_free.name, person_free.title) == ("fid-person-free", "FID*")
    assert (star.name, person_free.reference) == ("fid-person-free-weights-inception-pth", "person-free pictures")
