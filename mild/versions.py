"""Versions of what decides about results, for cards and reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "mild",
    "torch",
    "diffusers",
    "peft",
    "transformers",
    "accelerate",
    "numpy",
    "opencv-python-headless",
    "scikit-image",
)


def software_versions() -> dict[str, str]:
    """Name to version of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
