"""Erasing with MILD, each rung of tables 2 and 6, and with the base alone in the same windows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import alike
from dataset_tools.settings import digest_of
from mild.bases import digest_of_place
from mild.erasing.extents import REACH
from mild.evaluation.methods import Case, MethodSettings, Setup
from mild.evaluation.methods.sdxl import missing_base
from mild.model.saved import SavedConfig, fetched, read_config

if TYPE_CHECKING:
    from mild.erasing.pipeline import MILDPipeline


class WindowsMethod(MethodSettings):
    """What is common to MILD and its honest arm: windows around the hole, at the resolutions of the adapters."""

    match_colours: bool = True
    """Whether the colours that are painted are brought nearer to those around the hole (`mild.erasing.regions`);
    without, it is the paper's method alone."""
    inference_steps: int | None = Field(None, ge=1, le=1000)
    """DDIM steps; null: as all methods."""

    @property
    def reach(self) -> float | None:
        """How far the model is followed beyond masks: see `mild.erasing.pipeline`."""
        return None

    @abstractmethod
    def pipeline(self, setup: Setup) -> MILDPipeline:
        """The pipeline, its networks loaded."""
        ...

    @abstractmethod
    def trained(self, setup: Setup) -> SavedConfig | None:
        """What the adapters say how they are meant to erase; None without any."""
        ...

    def prompt(self, setup: Setup) -> str:
        """That of the evaluation or, where it names none, that of the adapters."""
        trained = self.trained(setup)
        return setup.prompt or (trained.prompt if trained else "")

    def open(self, setup: Setup) -> WindowsEraser:
        """See `MethodSettings.open`."""
        import torch

        pipeline = self.pipeline(setup).to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        return WindowsEraser(self, pipeline, self.inference_steps or setup.inference_steps, self.prompt(setup))

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        steps = self.inference_steps or setup.inference_steps
        settings = self.decisive("adapters", "inference_steps")
        software = [version(package) for package in ("torch", "diffusers", "peft", "transformers")]
        return digest_of([2, settings, steps, self.prompt(setup), self.weights(setup), software])


class BaseMethod(WindowsMethod):
    """The base alone, run by `MILDPipeline` exactly as MILD is: what MILD is to be held against.

    It works at the resolution and with the prompt of the adapters of the evaluation, where there are any.
    """

    kind: Literal["base"] = "base"

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "Base in the same pipeline" + ("" if self.match_colours else ", colours as painted")

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        return missing_base(setup.base)

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"base": digest_of_place(setup.base)}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        return digest_of([super().fingerprint(setup), self._resolutions(setup)])

    def pipeline(self, setup: Setup) -> MILDPipeline:
        """See `WindowsMethod.pipeline`."""
        from mild.erasing.pipeline import MILDPipeline

        pipeline = MILDPipeline.from_pretrained(setup.base)
        pipeline.working_resolutions = self._resolutions(setup)
        return pipeline

    def _resolutions(self, setup: Setup) -> tuple[int, int] | None:
        """Those of the adapters; None, the base's own, where there are none."""
        trained = self.trained(setup)
        return None if trained is None else (trained.resolution, trained.inference_resolution)

    def trained(self, setup: Setup) -> SavedConfig | None:
        """See `WindowsMethod.trained`."""
        return read_config(fetched(setup.adapters)) if setup.adapters else None


class MILDMethod(WindowsMethod):
    """MILD. Its switches leave out parts that the adapters have; what they were trained without, they lack anyway."""

    kind: Literal["mild"] = "mild"
    adapters: str = ""
    """Folder, hub id or bundled name of a MILD directory; empty: that of the command."""
    sma: bool = True
    """Spatially-Modulated Attention; false: the UNet's own attention."""
    hmg: bool = True
    """Human Morphology Guidance; false: none of its tokens reach the UNet."""
    pose: bool = True
    """Whether HMG is given poses."""
    parsing: bool = True
    """Whether HMG is given parsing."""
    extents: bool = True
    """Whether what the model sees of people beyond the masks is painted out with them."""
    shuffled_cues: bool = False
    """Whether HMG is given pose and parsing of another picture of the dataset (`mild.evaluation.cases.others_of`): what
    that costs is what HMG makes of what cues say, and the rest comes of its being there."""

    @property
    def reach(self) -> float | None:
        """See `WindowsMethod.reach`."""
        return REACH if self.extents else None

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        switches = {"SMA": self.sma, "HMG": self.hmg, "pose": self.pose, "parsing": self.parsing}
        switches |= {"extents": self.extents}
        without = [name for name, on in switches.items() if not on]
        told = bool(without) or self.shuffled_cues or not self.match_colours
        named = f" ({self.name})" if self.name != self.kind and (self.adapters or not told) else ""
        return "".join(
            [
                f"MILD{named}",
                f" without {', '.join(without)}" if without else "",
                ", cues of others" if self.shuffled_cues else "",
                "" if self.match_colours else ", colours as painted",
            ]
        )

    def place(self, setup: Setup) -> str:
        """Where its MILD directory is."""
        return self.adapters or setup.adapters

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        if not self.place(setup):
            return "no adapters are named: train first, and give the folder with --adapters"
        try:
            return missing_base(self.base(setup))
        except UserError as error:
            return str(error)

    def base(self, setup: Setup) -> str:
        """Where its base is. Raises `UserError` where its adapters cannot be read."""
        return self.trained(setup).base if setup.own_bases else setup.base

    def trained(self, setup: Setup) -> SavedConfig:
        """See `WindowsMethod.trained`."""
        return read_config(fetched(self.place(setup)))

    def parts(self, setup: Setup) -> dict[str, bool]:
        """Which of ``hmg``, ``pose``, ``parsing``, ``sma`` and ``extents`` work: switched on here, and trained with.

        Pose and parsing of somebody else are none.
        """
        trained = self.trained(setup).mild
        cues = () if trained.hmg is None or not self.hmg or self.shuffled_cues else trained.hmg.cues
        return {
            "hmg": self.hmg and trained.hmg is not None,
            "pose": self.pose and "pose" in cues,
            "parsing": self.parsing and "parsing" in cues,
            "sma": self.sma and trained.sma,
            "extents": self.extents and trained.extents is not None,
        }

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        folder = fetched(self.place(setup))
        return {
            "base": digest_of_place(self.base(setup)),
            "adapters": digest_of_place(str(folder)),
        }

    def pipeline(self, setup: Setup) -> MILDPipeline:
        """See `WindowsMethod.pipeline`."""
        from mild.erasing.pipeline import MILDPipeline

        folder = fetched(self.place(setup))
        pipeline = MILDPipeline.from_pretrained(self.base(setup), mild=folder)
        assert pipeline.layered is not None
        if not self.sma:
            pipeline.layered.leave_out("sma")
        if not self.hmg:
            pipeline.layered.leave_out("hmg")
        return pipeline


class WindowsEraser:
    """`mild.erasing.pipeline.MILDPipeline`: its background branch, in windows of the resolution it is meant for."""

    def __init__(self, settings: WindowsMethod, pipeline: MILDPipeline, steps: int, prompt: str) -> None:
        self.pipeline = pipeline
        self._settings, self._steps, self._prompt = settings, steps, prompt

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the holes, person by person known, with pose and parsing. See `mild.evaluation.methods.Eraser.erase`.

        Without the margin by which the pipeline widens masks: all methods are to fill, and are shown, the same. Beyond
        the hole pixels change where MILD says that they show what people left behind.
        """
        import torch

        pose, parsing = (getattr(self._settings, cue, True) for cue in ("pose", "parsing"))
        results: list[np.ndarray] = [case.image for case in cases]
        # One call of the pipeline knows one label set.
        for same in alike([case.label_set for case in cases]):
            chosen = [cases[index] for index in same]
            erased = self.pipeline(
                [case.image for case in chosen],
                [list(case.masks) for case in chosen],
                prompt=self._prompt,
                pose=[case.pose if pose else None for case in chosen],
                parsing=[case.parsing if parsing else None for case in chosen],
                label_set=chosen[0].label_set,
                margin=0,
                reach=self._settings.reach,
                match_colours=self._settings.match_colours,
                num_inference_steps=self._steps,
                generator=[torch.Generator("cpu").manual_seed(seeds[index]) for index in same],
                output_type="np",
            )
            for index, one in zip(same, erased, strict=True):
                results[index] = one.image
        return results
