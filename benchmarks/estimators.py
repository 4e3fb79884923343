"""Pictures a second of each network that sees people, and what a build adds to them.

    python benchmarks/estimators.py

In one run: writes random weights of each network, of its full size and in the layout of the published ones; times each
on drawn scenes of 512 x 512 with three people, in batches of 1 and of 8, on the GPU where there is one (then in half
precision). Then builds a dataset of photographs whose people the bundled network finds, with ViTPose, and lets the same
networks see the same pictures by themselves, in turn; and builds larger and larger ones with the bundled
network alone, each in a process of its own, for their memory. Writes ``benchmarks/results/estimators.json``. Targets:
the build, with its decoding, encoding, shards and Prefect, takes less than 10 % more; memory does not grow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.estimators import Estimator, PeopleInPicture
from dataset_tools.estimators.maskrcnn import MaskRCNNSettings
from dataset_tools.estimators.network import unload_networks
from dataset_tools.estimators.openpose import OpenPoseSettings
from dataset_tools.estimators.schp import SCHPSettings
from dataset_tools.estimators.segformer import SegformerSettings
from dataset_tools.estimators.segmentation import SegmentationSettings
from dataset_tools.estimators.vitpose import ViTPoseSettings
from dataset_tools.schema import PARSING_LABELS

SIDE = 512
PEOPLE = 3
BATCHES = (1, 8)


def write_maskrcnn(folder: Path) -> Path:
    """torchvision's Mask R-CNN v2."""
    import torch
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    file = folder / "maskrcnn.pth"
    torch.save(maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict(), file)
    return file


def write_rf_detr(folder: Path) -> Path:
    """RF-DETR-Seg of the size of ``rf-detr-seg-medium``: 35 million parameters, 432 pixels."""
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForInstanceSegmentation, RfDetrImageProcessor

    backbone = RfDetrDinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        out_features=["stage3", "stage6", "stage9", "stage12"],
        patch_size=12,
        num_windows=2,
        image_size=432,
    )
    names = {0: "background", 1: "person"}
    config = RfDetrConfig(backbone_config=backbone, decoder_layers=5, num_queries=200, id2label=names)
    RfDetrForInstanceSegmentation(config).save_pretrained(folder / "rf-detr")
    RfDetrImageProcessor(size={"height": 432, "width": 432}).save_pretrained(folder / "rf-detr")
    return folder / "rf-detr"


def write_openpose(folder: Path) -> Path:
    """OpenPose's body network, whose file leaves the blocks out of the layers' names."""
    import torch
    from controlnet_aux.open_pose.body import bodypose_model

    state = {name.partition(".")[2]: tensor for name, tensor in bodypose_model().state_dict().items()}
    torch.save(state, folder / "body_pose_model.pth")
    return folder / "body_pose_model.pth"


def write_vitpose(folder: Path) -> Path:
    """ViTPose-base."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    backbone = VitPoseBackboneConfig(out_indices=[12])
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).save_pretrained(folder / "vitpose")
    VitPoseImageProcessor().save_pretrained(folder / "vitpose")
    return folder / "vitpose"


def write_schp(folder: Path) -> Path:
    """SCHP for LIP."""
    import torch

    from dataset_tools.estimators.schp_network import AugmentCE2P

    state = {f"module.{name}": tensor for name, tensor in AugmentCE2P(20).state_dict().items()}
    torch.save({"state_dict": state}, folder / "schp.pth")
    return folder / "schp.pth"


def write_segformer(folder: Path) -> Path:
    """SegFormer-B2 with ATR's labels."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    names = dict(enumerate(PARSING_LABELS["atr"]))
    sizes: dict[str, Any] = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
    config = SegformerConfig(**sizes, id2label=names, label2id={name: number for number, name in names.items()})
    SegformerForSemanticSegmentation(config).save_pretrained(folder / "segformer")
    SegformerImageProcessor().save_pretrained(folder / "segformer")
    return folder / "segformer"


NETWORKS: dict[str, tuple[Callable[[Path], Path], Any]] = {
    "maskrcnn": (write_maskrcnn, MaskRCNNSettings),
    "rf-detr-seg": (write_rf_detr, SegmentationSettings),
    "openpose": (write_openpose, OpenPoseSettings),
    "vitpose-base": (write_vitpose, ViTPoseSettings),
    "schp-lip": (write_schp, SCHPSettings),
    "segformer-b2": (write_segformer, SegformerSettings),
}


def settings_of(name: str, folder: Path, **options: Any) -> Any:
    """Settings of a network whose random weights are written the first time."""
    import torch

    torch.manual_seed(0)
    write, kind = NETWORKS[name]
    place = folder / name
    if not place.exists():
        place.mkdir()
        write(place)
    (weights,) = place.iterdir()
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    return kind(weights=str(weights), sha256=sha256, **options)


def work_of(estimator: Any) -> Callable[[Sequence[PeopleInPicture]], Any]:
    """What it does with pictures."""
    if hasattr(estimator, "find"):
        return lambda pictures: estimator.find([picture.image for picture in pictures])
    return getattr(estimator, "estimate_pose", None) or estimator.estimate_parsing


def drawn_pictures(count: int) -> list[PeopleInPicture]:
    """Scenes of the drawn world with `PEOPLE` people each."""
    pictures = []
    for number in range(count):
        scene = draw_scene(f"estimators-{number}", 0, (SIDE, SIDE), PEOPLE)
        pictures.append(PeopleInPicture(scene.image, [person.mask for person in scene.people]))
    return pictures


def timed(work: Callable[[], Any]) -> float:
    """Seconds, with what a GPU still does."""
    import torch

    started = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started


def pictures_a_second(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Of each network, by size of the batch; the first batch is not counted."""
    pictures = drawn_pictures(count)
    rates: dict[str, dict[str, float]] = {}
    for name in NETWORKS:
        for batch in BATCHES:
            estimator: Estimator = settings_of(name, folder, batch_size=batch).open()
            work = work_of(estimator)
            work(pictures[:batch])
            seconds = timed(lambda: [work(pictures[at : at + batch]) for at in range(0, count, batch)])  # noqa: B023
            rates.setdefault(name, {})[str(batch)] = count / seconds
            print(f"{name:14} batch {batch}: {count / seconds:7.2f} pictures/s", flush=True)
        unload_networks()
    return rates


def added_by_the_flow(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of a build, and of the same networks on the same pictures by themselves, in turn."""
    from prefect.testing.utilities import prefect_test_harness

    from flows.build_dataset import build_dataset

    photos = folder / "photos"
    photos.mkdir()
    for number, picture in enumerate(drawn_pictures(count)):
        Image.fromarray(picture.image).save(photos / f"{number:04d}.png")
    given = {
        "instances": SegmentationSettings(weights="drawn-people"),
        "pose": settings_of("vitpose-base", folder),
    }
    recipe = folder / "recipe.json"
    recipe.write_text(
        json.dumps(
            {
                "name": "estimators",
                "source": {"kind": "folder", "photos": str(photos), "splits": {"train": 1}},
                **{name: settings.model_dump() for name, settings in given.items()},
                "runner": {"workers": 1},
            }
        )
    )

    def directly() -> None:
        find, pose = (work_of(settings.open()) for settings in given.values())
        for start in range(0, count, 8):
            files = sorted(photos.iterdir())[start : start + 8]
            images = [np.asarray(Image.open(file)) for file in files]
            found = find([PeopleInPicture(image, []) for image in images])
            pose([PeopleInPicture(image, each.masks) for image, each in zip(images, found, strict=True)])

    alone, whole = [], []
    with prefect_test_harness(server_startup_timeout=120):
        for number in range(rounds + 1):
            unload_networks()  # as a build's end does: both load them
            alone.append(timed(directly))
            whole.append(timed(partial(build_dataset, str(recipe), str(folder / f"dataset-{number}"))))
            print(f"networks {alone[-1]:.1f} s, build {whole[-1]:.1f} s", flush=True)
    # The first build starts what later ones find there.
    ratios = [flow / networks - 1 for flow, networks in zip(whole[1:], alone[1:], strict=True)]
    return {
        "pictures": count,
        "seconds_of_networks": alone[1:],
        "seconds_of_builds": whole[1:],
        "added": median(ratios),
    }


MEMORY = """
import json, re, sys
from pathlib import Path
from prefect.testing.utilities import prefect_test_harness
from flows.build_dataset import build_dataset

with prefect_test_harness(server_startup_timeout=120):
    summary = build_dataset(sys.argv[1], sys.argv[2])
# Not getrusage: a process begins with the most that its parent held.
kilobytes = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([summary["samples"], int(kilobytes) / 1024]))
"""


def memory_of_builds(folder: Path, counts: Sequence[int]) -> dict[str, float]:
    """Most megabytes that a build of so many photographs held at once; its server is another process."""
    from flows.settings import BuildSettings

    most = {}
    scenes = [picture.image for picture in drawn_pictures(20)]
    for count in counts:
        photos = folder / f"photos-{count}"
        photos.mkdir()
        for number in range(count):
            picture = scenes[number % len(scenes)].copy()
            picture[0, 0] = np.frombuffer(number.to_bytes(3, "big"), np.uint8)  # equal files would count once
            Image.fromarray(picture).save(photos / f"{number:05d}.png", compress_level=1)
        recipe = folder / f"recipe-{count}.json"
        settings = {
            "name": "memory",
            "source": {"kind": "folder", "photos": str(photos), "splits": {"train": 1}},
            "instances": {"kind": "transformers", "weights": "drawn-people"},
            "samples_per_shard": 100,
        }
        BuildSettings.check(settings, origin="memory")
        recipe.write_text(json.dumps(settings))
        command = [sys.executable, "-c", MEMORY, str(recipe), str(folder / f"memory-{count}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        samples, most[str(count)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{count} photographs, {samples} samples: {most[str(count)]:.0f} MB", flush=True)
    return most


def main() -> None:
    """Run both, print them, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=8, help="for each network")
    parser.add_argument("--build", type=int, default=16, help="photographs of the build")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="+", default=[100, 1000], help="photographs of further builds")
    given = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuda = torch.cuda.is_available()
        result = {
            "command": f"python benchmarks/estimators.py --pictures {given.pictures} --build {given.build} "
            f"--rounds {given.rounds} --memory {' '.join(map(str, given.memory))}",
            "machine": {
                "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "software": {name: version(name) for name in ("torch", "torchvision", "transformers", "controlnet-aux")},
            "settings": {"side": SIDE, "people": PEOPLE, "precision": "half" if cuda else "single", "seed": 0},
            "pictures_per_second": pictures_a_second(folder, given.pictures),
            "flow": added_by_the_flow(folder, given.build, given.rounds),
            "megabytes_by_photographs": memory_of_builds(folder, given.memory),
        }
    target = Path(__file__).parent / "results/estimators.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"a build adds {100 * result['flow']['added']:.1f} % to its networks")  # type: ignore[index]


if __name__ == "__main__":
    main()
