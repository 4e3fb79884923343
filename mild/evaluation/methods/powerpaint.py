"""Erasing with PowerPaint v1: Stable Diffusion 1.5 with learned words for what to paint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import digest_of
from mild.evaluation.methods import MethodSettings, Setup
from mild.evaluation.methods.sd15 import SD15Eraser, find_pipeline, load_pipeline

if TYPE_CHECKING:
    from PIL import Image

CONTEXT = " ".join(f"P_ctxt_{index}" for index in range(10))
"""The learned words that ask for what is around the hole."""
OBJECT = " ".join(f"P_obj_{index}" for index in range(10))
"""The learned words that ask for an object."""


class PowerPaintMethod(MethodSettings):
    """PowerPaint v1 (Zhuang et al. 2024, "A Task is Worth One Word"), its task of removal.

    Prompts and numbers are those of github.com/open-mmlab/PowerPaint (``gradio_PowerPaint.py``). Its pipeline mixes
    the embeddings of two prompts; for removal both are the same, so that the stock pipeline computes what it does.
    """

    kind: Literal["powerpaint"] = "powerpaint"
    base: str = "powerpaint-v1"
    """Name of `dataset_tools.networks`, or folder of a pipeline whose tokenizer and text encoder hold the learned
    words."""
    prompt: str = "empty scene blur"
    """What stands before the learned words."""
    inference_steps: int = Field(45, ge=1, le=1000)
    """Steps of the pipeline's own scheduler."""
    guidance_scale: float = Field(12, ge=1)
    """Classifier-free guidance, away from "an object": its authors ask for 10 and more in removal."""
    resolution: int = Field(640, ge=8)
    """Shorter side at which it works, in pixels; its result is brought back to the picture's size."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "PowerPaint v1" + (f" ({self.name})" if self.name != self.kind else "")

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        try:
            find_pipeline(self.base)
        except UserError as error:
            return str(error)
        return None

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"base": find_pipeline(self.base)[1]}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.decisive("base")
        software = [version(package) for package in ("torch", "diffusers", "transformers")]
        return digest_of([1, settings, self.weights(setup), software])

    def open(self, setup: Setup) -> PowerPaintEraser:
        """See `MethodSettings.open`."""
        pipeline = load_pipeline(self.base)
        for words in (CONTEXT, OBJECT):
            # A tokenizer that does not know them takes them apart, and nobody notices.
            tokens = pipeline.tokenizer.convert_tokens_to_ids(words.split())
            learned = pipeline.tokenizer(words).input_ids[1:-1]
            if learned != tokens or max(learned) >= pipeline.text_encoder.get_input_embeddings().num_embeddings:
                raise UserError(f"base {self.base} has not learned the words {words}; is it PowerPaint v1?")
        return PowerPaintEraser(self, pipeline)


class PowerPaintEraser(SD15Eraser):
    """The pipeline, in memory."""

    def __init__(self, settings: PowerPaintMethod, pipeline: Any) -> None:
        super().__init__(pipeline, settings.resolution, settings.inference_steps, settings.guidance_scale)
        self._prompt = f"{settings.prompt} {CONTEXT}"

    def conditions(self, pictures: Sequence[Image.Image], holes: Sequence[Image.Image]) -> dict[str, Any]:
        """See `SD15Eraser.conditions`."""
        return {"prompt": [self._prompt] * len(pictures), "negative_prompt": [OBJECT] * len(pictures)}
