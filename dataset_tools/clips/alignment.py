"""Samples of a clip that show one view, laid over one another: light by a gain a channel, small shake by a homography.

A sample that does not fit the view (a cut, a camera that was moved, a shake that is no homography) is of another view.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset_tools.clips.reading import FrameStore

_LONGEST = 640
"""Longer side, in pixels, of the grey pictures in which points are followed."""
_THUMBNAIL = 64
"""Longer side of the pictures that gains are read from."""
_FEWEST_POINTS = 12
"""Fewer points say nothing about motion."""
_STILL = 0.3
"""Pixels of the full picture: what moved by less is not warped, which would only blur it."""
_WINDOW = (15, 15)
"""What is followed around each point."""
_EXACT = 0.7
"""Pixels of the grey picture, by which a point may miss the motion that it fits."""
_FIT = 0.6
"""Least share of the points that a view and a sample have in common which must fit the motion."""
_STATIC, _SPREAD = 0.33, 0.15
"""A camera kept still where so large a share of the points did, if they span so much of what all points of the view
span: people and leaves may have most of the points, and what is drawn over a moving picture is small."""
_NEARLY = 0.9
"""A simpler motion is taken where it fits this share of the points that another fits."""
_FOUND = 0.1
"""Least share of the view's points that must be found in the sample again: people hide some."""
_PARTS, _POINTS_A_PART = 12, 4
"""Points are taken from so many parts along the longer side, and so many from each at most."""
_RIM = 2
"""Pixels along the edge of a warped sample that cubic interpolation mixes with what the edge repeats."""
_NEAR_VIEWS, _LARGE_VIEWS = 2, 2
"""A sample is compared with so many of the views that were seen last, and with so many of those with most samples."""


@dataclass
class View:
    """Samples that show the same things in the same place."""

    samples: list[int]
    """Their numbers in the store; the others are laid over the first."""
    warps: list[np.ndarray | None]
    """Homography (3, 3) from the view to each sample, in pixels; None where the sample lies right."""
    gains: np.ndarray
    """(n, 3) float: what each sample's RGB is multiplied by. Their median over the view is 1."""

    @property
    def shaken(self) -> int:
        """How many samples have to be warped."""
        return sum(warp is not None for warp in self.warps)


def find_views(frames: FrameStore, max_shake: float) -> list[View]:
    """The views of a clip, in the order in which they begin; each sample is in one of them.

    Args:
        frames: (H, W, 3) uint8 RGB each.
        max_shake: largest displacement of a corner that counts as shake, as a share of the picture's diagonal.
    """
    views: list[tuple[_Reference, list[int], list[np.ndarray | None], list[np.ndarray]]] = []
    for number in range(len(frames)):
        frame = frames[number]
        largest = sorted(range(len(views)), key=lambda place: len(views[place][1]))[-_LARGE_VIEWS:]
        for place in dict.fromkeys([*range(len(views) - 1, -1, -1)][:_NEAR_VIEWS] + largest[::-1]):
            reference, samples, warps, gains = views[place]
            gain = _gain(frame, reference)
            fits, warp = _warp(frame, gain, reference, max_shake)
            if fits:
                samples.append(number)
                warps.append(warp)
                gains.append(gain)
                views.append(views.pop(place))  # the one that was seen last
                break
        else:
            views.append((_Reference(frame), [number], [None], [np.ones(3)]))
    found = [
        View(samples, warps, np.exp(np.log(gains) - np.median(np.log(gains), axis=0)))
        for _, samples, warps, gains in views
    ]
    return sorted(found, key=lambda view: view.samples[0])


def align(frames: FrameStore, view: View) -> None:
    """Lay the samples of a view over one another, in the store; beyond the edge of a shaken one its rim is repeated."""
    height, width = frames.shape[:2]
    for number, warp, gain in zip(view.samples, view.warps, view.gains, strict=True):
        if warp is None and np.abs(gain - 1).max() < 0.5 / 255:
            continue
        frame = frames[number]
        if warp is not None:
            flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
            frame = cv2.warpPerspective(frame, warp, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        frames[number] = np.clip(np.rint(frame * gain.astype(np.float32)), 0, 255).astype(np.uint8)


def seen_area(warp: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a view, (H, W) bool for ``size`` (H, W), a sample with that warp shows as they were taken."""
    height, width = size
    if warp is None:
        return np.ones(size, bool)
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    seen = cv2.warpPerspective(np.ones(size, np.uint8), warp, (width, height), flags=flags)
    return cv2.erode(seen, np.ones((2 * _RIM + 1,) * 2, np.uint8)).view(bool)


class _Reference:
    """The first sample of a view."""

    def __init__(self, frame: np.ndarray) -> None:
        self.scale = min(1.0, _LONGEST / max(frame.shape))
        self.grey = _grey(frame, self.scale, np.ones(3))
        self.thumbnail = _thumbnail(frame)
        self.points = _corners(self.grey)


def _gain(frame: np.ndarray, reference: _Reference) -> np.ndarray:
    """What (3,) brings the frame's light to the reference's: the median ratio, then the mean near it."""
    ours, theirs = _thumbnail(frame), reference.thumbnail
    usable = ((np.minimum(ours, theirs) > 12) & (np.maximum(ours, theirs) < 243)).all(2)
    if np.count_nonzero(usable) < 0.05 * usable.size:
        return np.ones(3)
    ratios = np.log(theirs[usable] / ours[usable])
    middle = np.median(ratios, axis=0)
    away = np.abs(ratios - middle)
    near = away <= 2 * np.median(away, axis=0) + 1e-3
    gains: np.ndarray = np.exp([ratios[near[:, c], c].mean() for c in range(3)])
    return gains


def _warp(
    frame: np.ndarray, gain: np.ndarray, reference: _Reference, max_shake: float
) -> tuple[bool, np.ndarray | None]:
    """Whether a frame shows the reference's view, and the homography to it where it does not lie right."""
    grey, scale = _grey(frame, reference.scale, gain), reference.scale
    if len(reference.points) < _FEWEST_POINTS:
        # Nothing in view could tell a motion; another view would look different.
        return bool(np.median(cv2.absdiff(grey, reference.grey)) < 6), None
    there, found, _ = cv2.calcOpticalFlowPyrLK(reference.grey, grey, reference.points, None, winSize=_WINDOW)  # type: ignore[call-overload]
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey, reference.grey, there, None, winSize=_WINDOW)  # type: ignore[call-overload]
    same = (found & found_back).ravel().astype(bool)
    same &= np.abs(back - reference.points).max(axis=(1, 2)) < 0.5
    # A point that was followed to something else: the picture around it must look alike.
    same &= _alike(reference.grey, grey, reference.points[:, 0], there[:, 0])
    if np.count_nonzero(same) < max(_FEWEST_POINTS, _FOUND * len(same)):
        return False, None
    ours, theirs = reference.points[same, 0], there[same, 0]
    moved = np.linalg.norm(theirs - ours, axis=1) / scale
    if _kept_still(ours, moved, reference.points[:, 0]):
        return True, None
    warp, fitting = _motion(ours, theirs)
    if warp is None or np.count_nonzero(fitting) < max(_FEWEST_POINTS, _FIT * len(ours)):
        return False, None
    height, width = grey.shape
    corners = np.array([[[0, 0], [width, 0], [width, height], [0, height]]], np.float32)
    shake = np.linalg.norm(cv2.perspectiveTransform(corners, warp) - corners, axis=2).max()
    if shake > max_shake * np.hypot(height, width):
        return False, None
    fitted = cv2.perspectiveTransform(ours[None, fitting], warp)[0] - ours[fitting]
    if np.median(np.linalg.norm(fitted, axis=1)) < _STILL * scale:
        return True, None
    resize = np.diag([scale, scale, 1.0])
    return True, np.linalg.inv(resize) @ warp @ resize


def _kept_still(points: np.ndarray, moved: np.ndarray, of_view: np.ndarray) -> bool:
    """Whether a camera did: points (n, 2) of those of its view (m, 2) were found, and moved by so many pixels (n,)."""
    still = moved < _STILL
    if np.count_nonzero(still) < _FEWEST_POINTS or np.mean(still) < _STATIC or np.median(moved[still]) >= _STILL / 2:
        return False
    return bool(np.mean(still) >= _FIT or _spanned(points[still]) >= _SPREAD * _spanned(of_view))


def _spanned(points: np.ndarray) -> float:
    """Area of the convex hull of points (n, 2) float32."""
    return cv2.contourArea(cv2.convexHull(points))


def _motion(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Homography (3, 3) from points (n, 2) to points, and which of them fit it, (n,) bool.

    A shift or a similarity, where that fits nearly as many: fewer numbers are told more exactly.
    """
    shift = np.eye(3)
    shift[:2, 2] = np.median(theirs - ours, axis=0)
    shifted = np.linalg.norm(theirs - ours - shift[:2, 2], axis=1) < _EXACT
    if shifted.any():
        shift[:2, 2] = (theirs - ours)[shifted].mean(0)
    turned, turned_fitting = cv2.estimateAffinePartial2D(ours, theirs, method=cv2.RANSAC, ransacReprojThreshold=_EXACT)
    bent, bent_fitting = cv2.findHomography(ours, theirs, cv2.RANSAC, _EXACT)
    none = np.zeros(len(ours), bool)
    motions: list[tuple[np.ndarray | None, np.ndarray]] = [
        (shift, shifted),
        (None, none) if turned is None else (np.vstack([turned, [0.0, 0.0, 1.0]]), turned_fitting.ravel() > 0),
        (None, none) if bent is None else (bent, bent_fitting.ravel() > 0),
    ]
    most = max(np.count_nonzero(fitting) for _, fitting in motions)
    return next((warp, fitting) for warp, fitting in motions if np.count_nonzero(fitting) >= _NEARLY * most)


def _alike(first: np.ndarray, second: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Whether the 7 x 7 surroundings of points (n, 2) correlate, (n,) bool."""
    steps = np.arange(-3, 4, dtype=np.float32)
    patches = []
    for grey, points in ((first, ours), (second, theirs)):
        x = (points[:, :1, None] + steps[None, None]) + np.zeros((1, 7, 1), np.float32)
        y = (points[:, 1:, None] + steps[None, :, None]) + np.zeros((1, 1, 7), np.float32)
        found = cv2.remap(grey, x.reshape(-1, 49), y.reshape(-1, 49), cv2.INTER_LINEAR).astype(np.float32)
        patches.append(found - found.mean(1, keepdims=True))
    a, b = patches
    return (a * b).sum(1) > 0.7 * np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _corners(grey: np.ndarray) -> np.ndarray:
    """Points (n, 1, 2) float32 that can be followed, a few in each part of the picture: people may fill some parts."""
    quality = cv2.cornerMinEigenVal(grey, 5)
    least = max(1e-5, 0.002 * float(quality.max()))
    apart = max(3, round(max(grey.shape) / 80))
    peaks = (quality >= least) & (quality == cv2.dilate(quality, np.ones((2 * apart + 1,) * 2, np.uint8)))
    side = max(grey.shape) / _PARTS
    cells: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
    for y, x in np.argwhere(peaks):
        cells.setdefault((int(y // side), int(x // side)), []).append((-float(quality[y, x]), int(x), int(y)))
    points = [(x, y) for cell in cells.values() for _, x, y in sorted(cell)[:_POINTS_A_PART]]
    return np.array(points, np.float32).reshape(-1, 1, 2)


def _grey(frame: np.ndarray, scale: float, gain: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.convertScaleAbs(grey, alpha=float(np.mean(gain)))


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    scale = _THUMBNAIL / max(frame.shape)
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else frame
    return small.astype(np.float64)
