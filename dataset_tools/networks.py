"""The table of every network that this project can use: where its weights are, what they must be, who may use them.

A digest is None where none is published that could be read. What is fetched from a hub is then held against the digest
that the hub itself gives (the ETag of a large file, under which its cache keeps it); small text files have no other
check than their revision. No pickle is without a digest.

Licences are those that the publishers state, and in brackets what they leave out. ``commercial`` goes by what is
stated, but for SegFormer: its licence asks to be kept for all that is derived from it (section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Purpose = Literal["instances", "pose", "parsing", "base", "eraser", "metric"]


@dataclass(frozen=True)
class WeightsFile:
    """One file of a network."""

    path: str
    """Below the network's folder, as on the hub."""
    sha256: str | None = None
    """Hex; None where it is not published."""
    size: int | None = None
    """Bytes; None where only a rounded size is published."""


@dataclass(frozen=True)
class Network:
    """A row of the table."""

    name: str
    purpose: Purpose
    """What it is for; ``base``: the pipeline that erases; ``eraser``: another method, to compare with."""
    kind: str
    """Of the settings that run it (`dataset_tools.estimators`, `mild.metrics`); empty for a base."""
    """Of the settings that run it (`dataset_tools.estimators`, `mild.evaluation.methods`); empty for a base."""
    hub: str
    """Id on the Hugging Face hub; empty for a file at `url`, and for what comes with this package."""
    url: str
    """Address of the only file; empty for what is on the hub or comes with this package."""
    revision: str
    """On the hub: a commit where one is known to hold these files, else ``main``."""
    files: tuple[WeightsFile, ...]
    megabytes: int
    """Of all files together, rounded."""
    code_licence: str
    weights_licence: str
    commercial: bool
    """Whether both licences allow commercial use."""
    about: str
    """One line for people."""


_CONFIGURATION = (WeightsFile("config.json"), WeightsFile("preprocessor_config.json"))
"""What the transformers library reads beside the weights."""
_SD15 = tuple(
    WeightsFile(path)
    for path in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    )
)
"""A pipeline of Stable Diffusion 1.5 in half precision."""
_CMU = "CMU OpenPose (academic, non-commercial)"
_SDXL_TOKENIZERS = (
    WeightsFile("tokenizer/merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 524_619),
    WeightsFile(
        "tokenizer/special_tokens_map.json", "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac", 472
    ),
    WeightsFile(
        "tokenizer/tokenizer_config.json", "19d7b034cb0cc3ce9766c2231373ab8aa8991fc72e2c8f76558bfaae3de0d563", 737
    ),
    WeightsFile("tokenizer/vocab.json", "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349", 1_059_962),
    WeightsFile("tokenizer_2/merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 524_619),
    WeightsFile(
        "tokenizer_2/special_tokens_map.json", "f118ab3a983206e4f32583448de6bd6aae4ee21869135cef1f5848a753cdaab6", 460
    ),
    WeightsFile(
        "tokenizer_2/tokenizer_config.json", "c9d23941f76a41cbd50eda9290f57be7828f0a7a677939e9ef181f7e12bd1bdf", 725
    ),
    WeightsFile(
        "tokenizer_2/vocab.json", "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349", 1_059_962
    ),
)
"""The same in SDXL's text-to-image and inpainting pipelines."""


def _rf_detr(size: str, megabytes: int, precision: float) -> Network:
    return Network(
        name=f"rf-detr-seg-{size}",
        purpose="instances",
        kind="transformers",
        hub=f"Roboflow/rf-detr-seg-{size}",
        url="",
        revision="main",
        files=(*_CONFIGURATION, WeightsFile("model.safetensors")),
        megabytes=megabytes,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about=f"RF-DETR-Seg, COCO, mask AP {precision}",
    )


def _vitpose(
    name: str, revision: str, sha256: str | None, size: int | None, megabytes: int, about: str, folder: str = ""
) -> Network:
    return Network(
        name=name,
        purpose="pose",
        kind="vitpose",
        hub=f"usyd-community/{folder or name}",
        url="",
        revision=revision,
        files=(*_CONFIGURATION, WeightsFile("model.safetensors", sha256, size)),
        megabytes=megabytes,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0 (begun from MAE, CC BY-NC 4.0)",
        commercial=True,
        about=about,
    )


def _schp(labels: str, hub: str, path: str, sha256: str, size: int | None, about: str) -> Network:
    return Network(
        name=f"schp-{labels}",
        purpose="parsing",
        kind="schp",
        hub=hub,
        url="",
        revision="main",
        files=(WeightsFile(path, sha256, size),),
        megabytes=267,
        code_licence="MIT",
        weights_licence="none stated (data for research)",
        commercial=False,
        about=about,
    )


_ROWS = (
    Network(
        name="maskrcnn",
        purpose="instances",
        kind="maskrcnn",
        hub="",
        url="https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
        revision="",
        files=(
            WeightsFile(
                "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
                "73cbd0190fcbe3ba339921fbce2c3a0b6bb9126c9a133c85e43a2a8e060a109e",
                185_828_065,
            ),
        ),
        megabytes=186,
        code_licence="BSD-3-Clause",
        weights_licence="BSD-3-Clause",
        commercial=True,
        about="torchvision's Mask R-CNN v2, ResNet-50, COCO, mask AP 41.8",
    ),
    _rf_detr("nano", 134, 40.3),
    _rf_detr("small", 135, 43.1),
    _rf_detr("medium", 143, 45.3),
    _rf_detr("large", 145, 47.1),
    _rf_detr("xlarge", 152, 48.8),
    _rf_detr("xxlarge", 154, 49.9),
    Network(
        name="eomt-large",
        purpose="instances",
        kind="transformers",
        hub="tue-mps/coco_instance_eomt_large_640",
        url="",
        revision="main",
        files=(*_CONFIGURATION, WeightsFile("model.safetensors")),
        megabytes=1267,
        code_licence="MIT",
        weights_licence="MIT",
        commercial=True,
        about="EoMT, ViT-L, 640 pixels, COCO, mask AP 45.2",
    ),
    Network(
        name="mask2former-swin-tiny",
        purpose="instances",
        kind="transformers",
        hub="facebook/mask2former-swin-tiny-coco-instance",
        url="",
        revision="22c4a2f15dc88149b8b8d9f4d42c54431fbd66f6",
        files=(*_CONFIGURATION, WeightsFile("model.safetensors")),
        megabytes=190,
        code_licence="MIT",
        weights_licence="CC BY-NC 4.0",
        commercial=False,
        about="Mask2Former, Swin-T, COCO, mask AP 45.0",
    ),
    Network(
        name="drawn-people",
        purpose="instances",
        kind="transformers",
        hub="",
        url="",
        revision="",
        files=(
            WeightsFile("config.json", "9e049ece71d69fb2bb0da2f6323f30990d930ac86b7f49d6e52a4f2f9ac67350", 1_976),
            WeightsFile(
                "preprocessor_config.json", "73d163a5042dc2f73e6e8d56a2ce847aabb6175bae88f169c48896a2fb9a8c0c", 396
            ),
            WeightsFile(
                "model.safetensors", "424f22ddab8a0e1577994bf53274673df02b1010416c624dced296edb2589b8d", 2_583_024
            ),
        ),
        megabytes=3,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about="comes with this package; knows drawn pictures only",
    ),
    Network(
        name="openpose",
        purpose="pose",
        kind="openpose",
        hub="lllyasviel/Annotators",
        url="",
        revision="982e7edaec38759d914a963c48c4726685de7d96",
        files=(
            WeightsFile(
                "body_pose_model.pth",
                "25a948c16078b0f08e236bda51a385d855ef4c153598947c28c0d47ed94bb746",
                209_267_595,
            ),
        ),
        megabytes=209,
        code_licence=_CMU,
        weights_licence=_CMU,
        commercial=False,
        about="OpenPose's body network, 18 joints, COCO",
    ),
    _vitpose(
        "vitpose-base",
        "95be2991424e646950d656bb7fc15ec9be119700",
        "cd9a4e6cefc33c51ddcc32dd509fc4114b5845256463a69a10ea2dfde402b2f8",
        360_007_012,
        360,
        "ViTPose-B, COCO, AP 75.8",
    ),
    _vitpose(
        "vitpose-base-simple",
        "a93ac0c67e0b7e2c55287d21d4c460c8f3c54d45",
        "85375373893ddd3641f3912821073e53f5435f9e966e1dca59d004454bfe4fdf",
        None,
        344,
        "ViTPose-B with the simple decoder, COCO, AP 75.5",
    ),
    _vitpose(
        "vitpose-plus-small",
        "0c30b6534bb621af0162b481176742577264e36e",
        "f7bad8ed09eeeb2a7de6b38faaa8a88d07838e23e9c06a2a782099bca7467cb9",
        132_619_932,
        133,
        "ViTPose++-S, six joint sets, COCO's is used",
    ),
    _vitpose(
        "vitpose-plus-base",
        "92be54d7a29e42fad47b6e2ca01dd9e685a61e0d",
        "640225e4a9dd544239f1da0ae36af865a6e76e21e5f33a12656aa7b77fa5a5fa",
        501_627_628,
        502,
        "ViTPose++-B, six joint sets, COCO's is used",
    ),
    _vitpose(
        "vitpose-plus-large",
        "e211df377e49c89dba508ab3e83ddef13c0832b4",
        None,
        None,
        1738,
        "ViTPose++-L, six joint sets, COCO's is used",
    ),
    _vitpose(
        "vitpose-plus-huge",
        "9f36d7aec1800d23e97f10c2e74393aee92aa53f",
        "0ecb49f1ab0b18cc2f18446b8100442cec88bd99dd53779ad5a7f8c71aa08506",
        None,
        3598,
        "ViTPose++-H, six joint sets, COCO's is used",
    ),
    # The authors publish theirs on Google Drive only; these are copies on the hub.
    _schp(
        "lip",
        "zhengchong/CatVTON",
        "SCHP/exp-schp-201908261155-lip.pth",
        "24fa3254ceeb74c8435458994a64b522fb439a3635b7b86ff470457e0413da00",
        267_449_349,
        "SCHP, 20 labels of LIP, mIoU 59.4",
    ),
    _schp(
        "atr",
        "zhengchong/CatVTON",
        "SCHP/exp-schp-201908301523-atr.pth",
        "e9d7c91ce3b4e7133df56b599fc817b533e3439c5e8d282a59126d2fda339a2a",
        267_445_237,
        "SCHP, 18 labels of ATR, mIoU 82.3",
    ),
    _schp(
        "pascal",
        "alexgenovese/reica_controlnet",
        "exp-schp-201908270938-pascal-person-part.pth",
        "3b03d343c39fb0696f75d45c44c67b2fc23f5d0bf0925a82c0465e415799fa85",
        None,
        "SCHP, 7 labels of Pascal-Person-Part, mIoU 71.5",
    ),
    Network(
        name="segformer-clothes",
        purpose="parsing",
        kind="segformer",
        hub="mattmdjaga/segformer_b2_clothes",
        url="",
        revision="584abc1e1d260e23c0fc627c5217a09b2b461046",
        files=(
            WeightsFile("config.json", "4b5127ca00fe61187b6cc6c232c9e19326ed228683f8f5c221790be9cc196a6e", 1_727),
            WeightsFile(
                "preprocessor_config.json", "a608e3a47dcfba8dc052a766babb4b6c963285ab4f176bc6c1eb2b257fd3ad93", 271
            ),
            WeightsFile(
                "model.safetensors", "8f86fd90c567afd4370b3cc3a7e81ed767a632b2832a738331af660acc0c4c68", 109_493_236
            ),
        ),
        megabytes=109,
        code_licence="Apache-2.0",
        weights_licence="MIT (begun from NVIDIA SegFormer, non-commercial)",
        commercial=False,
        about="SegFormer-B2, 18 labels of ATR",
    ),
    Network(
        name="sdxl-inpainting",
        purpose="base",
        kind="",
        hub="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        url="",
        revision="115134f363124c53c7d878647567d04daf26e41e",
        files=(
            WeightsFile("model_index.json", "308a792b15086bf89807b88729ef80d33d5b8264b14a96b57d2c92b5ab7f5a53", 690),
            WeightsFile(
                "scheduler/scheduler_config.json",
                "a8e9a8517e8739938ea85819012bad195d41ccb3e11e2501cf196da64099b1f6",
                479,
            ),
            WeightsFile(
                "text_encoder/config.json", "46ae51fa8bde7817168d97faa0556cc0ac42ec0a7a53248bab4a52f8f5866f13", 746
            ),
            WeightsFile(
                "text_encoder/model.fp16.safetensors",
                "fc83cf401d930147807e7c44021c164bcc5508c9d4cc0ff35f4e354685ca9cd0",
                246_144_867,
            ),
            WeightsFile(
                "text_encoder_2/config.json", "fbcd3aad07a99e28d4c51550bd798903922083527ec69ad026f25699518af82d", 758
            ),
            WeightsFile(
                "text_encoder_2/model.fp16.safetensors",
                "a8622bd41f8d359df484fdf9de091edb9337a2fd747f0a5c9c320a62e24d1fd3",
                1_389_382_884,
            ),
            *_SDXL_TOKENIZERS,
            WeightsFile("unet/config.json", "aaedf41fbcb29d2d8725241413b8525bd97005dea3f86d8056199469032537e9", 1_932),
            WeightsFile(
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "6470840731e98cc16713ddf3ac7ee458c9fdbcb881a98c6727cd4a938f227d3f",
                5_135_178_560,
            ),
            WeightsFile("vae/config.json", "b822341e6125efedebffb8e3f35e7288aab06bb4c49853d50a16964bf104a727", 659),
            WeightsFile(
                "vae/diffusion_pytorch_model.fp16.safetensors",
                "4ad62825e5c8b31eefb77355ba6693785619bf7d669d9b1a6fd9f19dec6d65b3",
                167_335_338,
            ),
        ),
        megabytes=6941,
        code_licence="Apache-2.0",
        weights_licence="CreativeML Open RAIL++-M (forbids some uses)",
        commercial=True,
        about="SDXL inpainting 0.1, in half precision",
    ),
)


def _features(
    name: str, kind: str, revision: str, files: tuple[WeightsFile, ...], megabytes: int, about: str
) -> Network:
    return Network(
        name=name,
        purpose="metric",
        kind=kind,
        hub=f"facebook/{name}",
        url="",
        revision=revision,
        files=files,
        megabytes=megabytes,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about=about,
    )


_METRICS_WITHOUT_REFERENCE = (
    _features(
        "sam-vit-huge",
        "remove",
        "87aecf0df4ce6b30cd7de76e87673c49644bdf67",
        (
            WeightsFile("config.json"),
            WeightsFile("model.safetensors", "edfb0462392541fca9af44ff039bfb32dbd0c939997f3abb77a26e23af7afd7c"),
        ),
        2564,
        "Segment Anything, ViT-H, for ReMOVE",
    ),
    _features(
        "dinov2-giant",
        "rc_s",
        "611a9d42f2335e0f921f1e313ad3c1b7178d206d",
        (
            WeightsFile("config.json", size=548),
            WeightsFile(
                "model.safetensors", "917d3c470db999d32a312f8542149be91c7cbac61ee8fb4b67ae3d82b79ce21f", 4_546_005_432
            ),
        ),
        4546,
        "DINOv2, ViT-g, for RC-S",
    ),
)


def _lpips(backbone: str, file: str, sha256: str, size: int, about: str) -> Network:
    return Network(
        name=f"lpips-{backbone}",
        purpose="metric",
        kind="lpips",
        hub="",
        url=f"https://download.pytorch.org/models/{file}",
        revision="",
        files=(WeightsFile(file, sha256, size),),
        megabytes=round(size / 1e6),
        code_licence="BSD-2-Clause",
        weights_licence="BSD-3-Clause",
        commercial=True,
        about=f"torchvision's {about}, ImageNet; the heads of LPIPS come with torchmetrics",
    )


_METRICS = (
    Network(
        name="inception-fid",
        purpose="metric",
        kind="fid",
        hub="",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        revision="",
        files=(
            WeightsFile(
                "weights-inception-2015-12-05-6726825d.pth",
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                95_628_359,
            ),
        ),
        megabytes=96,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about="Inception v3 of 2015-12-05, ImageNet, as TensorFlow had it: for FID and KID",
    ),
    _lpips(
        "alex",
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244_408_911,
        "AlexNet",
    ),
    _lpips(
        "vgg",
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        "VGG-16",
    ),
    _lpips(
        "squeeze",
        "squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        4_958_839,
        "SqueezeNet 1.1",
    ),
    # Of both the main branch holds pickles alone; these are the hub's own conversions, refs/pr/1 and refs/pr/15.
    Network(
        name="dino-vits16",
        purpose="metric",
        kind="dino",
        hub="facebook/dino-vits16",
        url="",
        revision="a7a4d161f5c0bd70478c05ca5777ec7cd8848021",
        files=(*_CONFIGURATION, WeightsFile("model.safetensors")),
        megabytes=87,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about="DINO v1, ViT-S/16, ImageNet without labels",
    ),
    Network(
        name="clip-vit-base-patch32",
        purpose="metric",
        kind="clip",
        hub="openai/clip-vit-base-patch32",
        url="",
        revision="b33cedfd0df4e43b8238760678fcc89e1a0d38b3",
        files=(
            WeightsFile("config.json", "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770", 4_186),
            WeightsFile(
                "preprocessor_config.json", "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd", 316
            ),
            WeightsFile(
                "model.safetensors", "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d", 605_157_884
            ),
        ),
        megabytes=605,
        code_licence="MIT",
        weights_licence="none stated (card: for research, not to be deployed)",
        commercial=False,
        about="CLIP, ViT-B/32",
    ),
)
_WITHOUT_SDXL = (
    Network(
        name="lama",
        purpose="eraser",
        kind="lama",
        hub="",
        url="https://github.com/Sanster/models/releases/download/add_big_lama/big-lama.pt",
        revision="",
        files=(
            WeightsFile("big-lama.pt", "344c77bbcb158f17dd143070d1e789f38a66c04202311ae3a258ef66667a9ea9", 205_669_692),
        ),
        megabytes=206,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about="Big LaMa, as TorchScript",
    ),
    Network(
        name="powerpaint-v1",
        purpose="eraser",
        kind="powerpaint",
        hub="Sanster/PowerPaint-V1-stable-diffusion-inpainting",
        url="",
        revision="0b78ebad4bdb11b6653ec1242b1640c2fb857f35",
        files=(*_SD15, WeightsFile("tokenizer/added_tokens.json")),
        megabytes=2135,
        code_licence="MIT",
        weights_licence="none stated (begun from Stable Diffusion 1.5, CreativeML Open RAIL-M)",
        commercial=False,
        about="PowerPaint v1, in half precision",
    ),
    Network(
        name="sd15-inpainting",
        purpose="eraser",
        kind="clipaway",
        hub="stable-diffusion-v1-5/stable-diffusion-inpainting",
        url="",
        revision="8a4288a76071f7280aedbdb3253bdb9e9d5d84bb",
        files=_SD15,
        megabytes=2135,
        code_licence="Apache-2.0",
        weights_licence="CreativeML Open RAIL-M (forbids some uses)",
        commercial=True,
        about="Stable Diffusion 1.5 inpainting, in half precision",
    ),
    Network(
        name="ip-adapter-sd15",
        purpose="eraser",
        kind="clipaway",
        hub="h94/IP-Adapter",
        url="",
        revision="018e402774aeeddd60609b4ecdb7e298259dc729",
        files=(
            WeightsFile(
                "models/ip-adapter_sd15.safetensors",
                "289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369",
                44_642_768,
            ),
        ),
        megabytes=45,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        commercial=True,
        about="IP-Adapter for Stable Diffusion 1.5",
    ),
    # A copy in CLIPAway's own demonstration, whose digest is published.
    Network(
        name="alpha-clip-l14",
        purpose="eraser",
        kind="clipaway",
        hub="",
        url="https://huggingface.co/spaces/yigitekin/CLIPAway/resolve/92e088215caf957d5b5c2333d3640f47902298cb/"
        "clip_l14_grit+mim_fultune_6xe.pth",
        revision="",
        files=(
            WeightsFile(
                "clip_l14_grit+mim_fultune_6xe.pth", "a5f3f2e24459e9764d9f4b4c053fb354dc9d508bd8f647b952402d6860bc9c3d"
            ),
        ),
        megabytes=1220,
        code_licence="Apache-2.0",
        weights_licence="research only (data CC BY-NC 4.0)",
        commercial=False,
        about="Alpha-CLIP, ViT-L/14, its encoder of pictures",
    ),
)
"""Methods to compare with that are not on the SDXL base."""


def _osor(phase: int, sha256: str, size: int, about: str) -> Network:
    return Network(
        name=f"osor-sdxl-phase{phase}",
        purpose="eraser",
        kind="osor",
        hub="QinmingZhou/OSOR",
        url="",
        revision="9288156766b1df44e5f50fb697876a6f2fd8c062",
        files=(WeightsFile(f"osor-sdxlinpainting/weights/sdxlinpainting_phase{phase}.pth", sha256, size),),
        megabytes=3112,
        code_licence="MIT",
        weights_licence="CreativeML Open RAIL++-M (forbids some uses)",
        commercial=True,
        about=about,
    )


_SDXL_ERASERS = (
    Network(
        name="rorem",
        purpose="eraser",
        kind="rorem",
        hub="LetsThink/RORem",
        url="",
        revision="main",
        files=(
            WeightsFile("model_index.json"),
            WeightsFile("scheduler/scheduler_config.json"),
            WeightsFile("text_encoder/config.json"),
            WeightsFile("text_encoder/model.safetensors"),
            WeightsFile("text_encoder_2/config.json"),
            WeightsFile("text_encoder_2/model.safetensors"),
            *(WeightsFile(file.path) for file in _SDXL_TOKENIZERS),
            WeightsFile("unet/config.json"),
            WeightsFile("unet/diffusion_pytorch_model.safetensors"),
            WeightsFile("vae/config.json"),
            WeightsFile("vae/diffusion_pytorch_model.safetensors"),
        ),
        megabytes=6941,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0 (begun from SDXL inpainting, CreativeML Open RAIL++-M)",
        commercial=True,
        about="RORem, the whole pipeline, in half precision",
    ),
    _osor(
        1,
        "b02905174a98a4fa770eaeb6aa2ec0b30df3230ba1569f511b09c96a3cc3ec21",
        3_112_285_286,
        "OSOR for SDXL inpainting, of its first phase, which fills the hole alone",
    ),
    _osor(
        2,
        "4f6abee0f152919fa8faca1895820ee531adb2b42b5de25db2e9a311aa47face",
        3_112_296_806,
        "OSOR for SDXL inpainting, which says itself what has to change",
    ),
    Network(
        name="sdxl-base",
        purpose="eraser",
        kind="attentive-eraser",
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        url="",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        files=(
            WeightsFile("model_index.json", "6d7b93508390ab91ac5bfbe4aeb4dc2d83f7bb1b05fb069d714b5b0c75f70d44", 609),
            WeightsFile(
                "scheduler/scheduler_config.json",
                "af3e45a949aff8b8341ab8b811429ec03fee857a700a1d9477363e4fff9666e2",
                479,
            ),
            WeightsFile(
                "text_encoder/config.json", "39b8b2e4b1949e36969caa425b6c81c68bace99198dd9078ce05d16ad401fe7f", 565
            ),
            WeightsFile(
                "text_encoder/model.fp16.safetensors",
                "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd",
                246_144_152,
            ),
            WeightsFile(
                "text_encoder_2/config.json", "a892d1c3a69a7e9247a24de2bc1d5891e3109a54696e53be20093af671072c34", 575
            ),
            WeightsFile(
                "text_encoder_2/model.fp16.safetensors",
                "ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4",
                1_389_382_176,
            ),
            WeightsFile("unet/config.json", "30ebc70750223e59006f7f2b4e1e6c102570aa19a9c4ae3e1fbe7591332dbae6", 1_680),
            WeightsFile(
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "83e012a805b84c7ca28e5646747c90a243c65c8ba4f070e2d7ddc9d74661e139",
                5_135_149_760,
            ),
            WeightsFile("vae/config.json", "0b331c8ac22ded5f9997a144a575c1d113d6169aff262c353f39015bd24a6264", 642),
            WeightsFile(
                "vae/diffusion_pytorch_model.fp16.safetensors",
                "bcb60880a46b63dea58e9bc591abe15f8350bde47b405f9c38f4be70c6161e68",
                167_335_342,
            ),
            *_SDXL_TOKENIZERS,
        ),
        megabytes=6941,
        code_licence="Apache-2.0",
        weights_licence="CreativeML Open RAIL++-M (forbids some uses)",
        commercial=True,
        about="SDXL 1.0, text to image, in half precision, on which Attentive Eraser was published",
    ),
)
"""Methods to compare with that are on the SDXL base."""

NETWORKS: dict[str, Network] = {
    row.name: row for row in (*_ROWS, *_METRICS, *_METRICS_WITHOUT_REFERENCE, *_WITHOUT_SDXL, *_SDXL_ERASERS)
}
"""The table, by name."""

SUGGESTED: dict[Purpose, str] = {
    "instances": "rf-detr-seg-medium",
    "pose": "vitpose-base",
    "parsing": "segformer-clothes",
}
"""What is taken where nothing is chosen: needs no compiled extension, and may be used commercially as far as there is
such a network. For parsing none is known; this one's licence is at least stated."""
