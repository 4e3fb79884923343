"""Layered diffusion for erasing people (MILD): the model, erasing with it, training it, comparing it with others.

``from mild import MILDPipeline, recompose`` are for whoever has a photograph. Importing ``mild`` itself is light: torch
and diffusers are imported with the first of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mild.erasing.pipeline import MILDPipeline, recompose

__all__ = ["MILDPipeline", "recompose"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for (PEP 562)."""
    if name in __all__:
        return getattr(import_module("mild.erasing.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
