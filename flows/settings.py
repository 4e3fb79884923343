"""Settings of the flows: one YAML file a dataset, checked before anything runs."""

from __future__ import annotations

import atexit
import os
import re
from concurrent.futures.thread import _threads_queues
from functools import cache
from threading import Thread, main_thread
from typing import Annotated, Any, ClassVar, Literal

from prefect.blocks.system import Secret
from prefect.task_runners import R, TaskRunner, ThreadPoolTaskRunner
from pydantic import Field, field_validator, model_validator

from dataset_tools.anonymise import AnonymiseSettings
from dataset_tools.compositing import CompositorSettings
from dataset_tools.curated import CuratedSettings
from dataset_tools.errors import UserError
from dataset_tools.estimators.annotated import AnnotatedSettings
from dataset_tools.estimators.detection import DetectionSettings
from dataset_tools.estimators.maskrcnn import MaskRCNNSettings
from dataset_tools.estimators.openpose import OpenPoseSettings
from dataset_tools.estimators.schp import SCHPSettings
from dataset_tools.estimators.segformer import SegformerSettings
from dataset_tools.estimators.segmentation import SegmentationSettings
from dataset_tools.estimators.vitpose import ViTPoseSettings
from dataset_tools.schema import EncodingSettings
from dataset_tools.settings import Settings
from dataset_tools.sources.ade20k import Ade20kSettings
from dataset_tools.sources.coco import CocoSettings
from dataset_tools.sources.folder import FolderSettings
from dataset_tools.sources.openimages import OpenImagesSettings
from dataset_tools.sources.pairs import PairsSettings
from dataset_tools.sources.sample import SampleSettings
from dataset_tools.sources.video import VideoSettings
from dataset_tools.sources.weblist import DownloadedSettings, WeblistSettings
from dataset_tools.storage_options import Location, register_blocks
from dataset_tools.web import WebSettings

PictureSource = Annotated[
    OpenImagesSettings | FolderSettings | CocoSettings | Ade20kSettings | PairsSettings | DownloadedSettings,
    Field(discriminator="kind"),
]
"""Sources of files that exist."""
SourceSettings = Annotated[
    SampleSettings
    | OpenImagesSettings
    | FolderSettings
    | CocoSettings
    | Ade20kSettings
    | PairsSettings
    | VideoSettings
    | WeblistSettings,
    Field(discriminator="kind"),
]
"""Those, and what is made into files first: the drawn world, read as ``openimages``; clips, read as ``pairs``; web
lists, fetched and read as ``downloaded``."""

InstancesSettings = Annotated[SegmentationSettings | MaskRCNNSettings, Field(discriminator="kind")]
PoseSettings = Annotated[AnnotatedSettings | OpenPoseSettings | ViTPoseSettings, Field(discriminator="kind")]
ParsingSettings = Annotated[AnnotatedSettings | SCHPSettings | SegformerSettings, Field(discriminator="kind")]
Network = Annotated[
    SegmentationSettings
    | MaskRCNNSettings
    | OpenPoseSettings
    | ViTPoseSettings
    | SCHPSettings
    | SegformerSettings
    | DetectionSettings,
    Field(discriminator="kind"),
]


class Threads(ThreadPoolTaskRunner[R]):
    """Prefect's threads, but a flow that is ended by a signal, or as one of them hangs, does not wait for what they do.

    Nothing is lost by that but their work, for what a step writes is whole or not there. Python does not end a process
    before its threads: this one ends with its main thread, or before (see ``flows.cli``).
    """

    _abandoned: ClassVar[list[Thread]] = []
    """Threads of this process that were left to themselves."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._executor is not None and (kind is None or issubclass(kind, Exception)):
            self._executor.shutdown(cancel_futures=True)
        super().__exit__(kind, error, trace)

    @classmethod
    def are_left_working(cls) -> bool:
        """Whether any thread of this process that was left to itself still works in vain."""
        return any(thread.is_alive() for thread in cls._abandoned)

    def cancel_all(self) -> None:
        """Cancel what has not begun; what has is told, and not waited for."""
        for event in self._cancel_events.values():
            event.set()
        if self._executor is not None:
            Threads._abandoned.extend(self._executor._threads)
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
            if Threads.are_left_working():
                for left in Threads._abandoned:
                    # Whom Python waits for before the main thread ends.
                    _threads_queues.pop(left, None)  # type: ignore[attr-defined]
                Thread(target=_end_with_main_thread, daemon=True).start()


def _end_with_main_thread() -> None:
    main_thread().join()
    if Threads.are_left_working():
        atexit._run_exitfuncs()
        os._exit(1)


def _read_secret(block: str) -> Any:
    """The value of a Secret block as it was saved: its own ``get`` reads a text of digits as a number."""
    try:
        found: Any = Secret.load(block.removeprefix("secret/"))
    except ValueError:
        raise LookupError(f"Prefect's server has no block {block} that can be read") from None
    return found.value.get_secret_value()


register_blocks(_read_secret)


class RunnerSettings(Settings):
    """What runs the tasks of a flow. Has no influence on the bytes of a dataset."""

    kind: Literal["threads", "dask", "ray"] = "threads"
    """``threads``: in the flow's process; ``dask`` or ``ray``: a local cluster of processes, or that at ``address``.
    Ray is an extra: ``pip install mild[ray]``."""
    workers: int = Field(default=2, ge=1, le=128)
    """Tasks at once: threads, or processes of a local cluster."""
    address: str | None = None
    """A cluster that runs already: Dask's scheduler, such as ``tcp://scheduler:8786``, or Ray's head, such as
    ``ray://head:10001``. `flows.preflight` looks at its workers first. Up to 128 of them have work at once."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that a step may take, such as building one shard. One that takes longer is ended and tried again, twice;
    then the run fails. Null: any time."""

    @field_validator("address")
    @classmethod
    def _is_host_and_port(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"([A-Za-z]+://)?[^\s/@]+:\d+", address):
            raise ValueError("this is no address of a cluster: write it as tcp://scheduler:8786")
        return address

    @model_validator(mode="after")
    def _is_a_cluster(self) -> RunnerSettings:
        if self.kind == "threads" and self.address is not None:
            raise ValueError("address is that of a cluster: set kind to dask or ray, or leave it out")
        return self

    def open(self) -> TaskRunner[Any]:
        """The task runner that the settings name. Raises `UserError` where its package is missing."""
        if self.kind == "threads":
            return Threads(max_workers=self.workers)
        if self.kind == "ray":
            try:
                from prefect_ray import RayTaskRunner  # type: ignore[import-untyped]
            except ModuleNotFoundError:
                raise UserError("runner.kind: ray is an extra of this package: pip install 'mild[ray]'") from None

            # Ray's own log would repeat each line of each worker in the terminal.
            options: dict[str, Any] = {"log_to_driver": False}
            if self.address is None:
                options |= {"num_cpus": self.workers, "include_dashboard": False}
            return RayTaskRunner(address=self.address, init_kwargs=options)
        from prefect_dask import DaskTaskRunner

        _let_dask_forget()
        if self.address is not None:
            return DaskTaskRunner(address=self.address)
        cluster = {"n_workers": self.workers, "threads_per_worker": 1, "dashboard_address": None}
        return DaskTaskRunner(cluster_kwargs=cluster)


@cache
def _let_dask_forget() -> None:
    """Keep few of Dask's logs for its developers, unless its own configuration (``DASK_`` variables, files) says.

    It keeps the last 1,000 messages of each connection, jobs among them, and what its profiler saw in each of the last
    1,000 seconds: the flow and its workers would need the more memory the longer a build takes.
    """
    import dask
    import distributed  # noqa: F401 - has its own defaults, which would come after ours

    dask.config.update_defaults(
        {"distributed": {"admin": {"low-level-log-length": 1}, "worker": {"profile": {"enabled": False}}}}
    )


class BuildSettings(Settings):
    """One dataset, from source to shards."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$")
    """Name on the dataset's card."""
    description: str = ""
    """One paragraph for the card."""
    source: SourceSettings
    """Where pictures come from; ``kind`` chooses."""
    curated: CuratedSettings = CuratedSettings()
    """How chosen photographs become samples of ``real`` or ``paired``."""
    instances: InstancesSettings | None = None
    """Network that finds people whom the source has no masks of, and keeps pictures with people from being
    backgrounds; null: the source is believed."""
    pose: PoseSettings | None = None
    """Pose estimator; null leaves keypoints uncomputed."""
    parsing: ParsingSettings | None = None
    """Parsing estimator; null leaves parsing uncomputed."""
    plate: AnnotatedSettings | None = None
    """What provides clean plates, which ``paired`` needs; null: the source, where it has some."""
    anonymise: AnonymiseSettings | None = None
    """What is blurred; null: nothing."""
    opt_out: Location | None = None
    """List of pictures that must not be in it, as somebody asked for it: see `dataset_tools.opt_out`. Pictures that a
    later list names are taken out by the next build."""
    composite: CompositorSettings | None = None
    """The synthetic half; null builds none."""
    curated_encoding: EncodingSettings = EncodingSettings()
    """How pictures of ``real`` and ``paired`` are encoded."""
    composite_encoding: EncodingSettings = EncodingSettings(image_format="png")
    """How pictures of ``composite`` are encoded."""
    max_rejected_share: float = Field(default=0.2, ge=0, le=1)
    """Largest share of the chosen pictures, and of the composites, that may be set aside; where more cannot be used a
    setting, a network or a mirror is at fault, and the build fails. Pictures that are left out for their masks do not
    count, and one picture is always allowed, unless this is 0."""
    samples_per_shard: int = Field(default=256, ge=1)
    """Samples in one tar; also the unit of caching and of parallel work."""
    runner: RunnerSettings = RunnerSettings()
    """What runs the tasks."""

    @model_validator(mode="after")
    def _somebody_finds_people(self) -> BuildSettings:
        if isinstance(self.source, FolderSettings) and self.source.masks is None and self.instances is None:
            raise ValueError(
                "source.masks is not set, and neither is instances: name the masks of the photographs, or a network "
                "that finds people, such as instances.kind=transformers"
            )
        if isinstance(self.source, WeblistSettings) and self.instances is None:
            raise ValueError(
                "a web list has no masks, and instances is not set: name a network that finds people, such as "
                "instances.kind=transformers"
            )
        return self

    @model_validator(mode="after")
    def _pairs_have_plates(self) -> BuildSettings:
        source = self.source
        if isinstance(source, PairsSettings) and source.layout is not None:
            paired = self.curated.configuration == "paired"
            if paired and not source.layout.background and self.plate is None:
                raise ValueError("source.layout names no clean plates: set curated.configuration to real")
            if not paired and not source.layout.masks and self.instances is None:
                raise ValueError("source.layout names no masks: set instances, a network that finds people")
        return self

    @model_validator(mode="after")
    def _somebody_finds_faces(self) -> BuildSettings:
        if self.anonymise and self.anonymise.faces and not (self.pose or self.parsing or self.anonymise.network):
            raise ValueError(
                "anonymise: nothing tells where faces are: set pose, parsing, or anonymise.network with weights"
            )
        return self

    def networks(self) -> dict[str, Network]:
        """The networks that see the pictures, by what they are for."""
        regions = self.anonymise.network if self.anonymise else None
        used = {"instances": self.instances, "pose": self.pose, "parsing": self.parsing, "regions": regions}
        return {name: cue for name, cue in used.items() if cue is not None and not isinstance(cue, AnnotatedSettings)}

    def recorded(self) -> dict[str, Any]:
        """What decides about the data; not where files lie, how they are come by, nor what opens storage."""
        # Which weights they were is said by each sample and by the card, with their digest.
        cue = {"root", "root_options", "fetch", "weights", "sha256"}
        source = {
            "root",
            "root_options",
            "fetch",
            "images",
            "images_options",
            "cache",
            "photos",
            "masks",
            "backgrounds",
            "urls",
            "clips",
            "clips_options",
        }
        pace = {name for name in WebSettings.model_fields if name not in WebSettings().rules()}
        left_out: dict[str, Any] = {
            **{"runner": True, "max_rejected_share": True, "curated": {"fetch_workers"}, "opt_out": True},
            **{"source": {**dict.fromkeys(source, True), "web": pace}},
            **{"instances": cue, "pose": cue, "parsing": cue, "plate": cue, "anonymise": {"network": cue}},
        }
        return self.model_dump(mode="json", exclude=left_out)
