"""A UNet of an SDXL inpainting base with all that MILD adds to it: the one place that knows how a branch is run.

Saved, it is one directory:

===================================== ===================================================================
file                                  content
===================================== ===================================================================
``pytorch_lora_weights.safetensors``  the adapter ``bg``, as a stock pipeline's ``load_lora_weights`` reads it
``fg/`` and the same name             the adapter ``fg``
``sma.safetensors``                   the scalars of SMA, a (2, 2) tensor a self-attention
``hmg.safetensors``                   encoders and gates of HMG
``offsets.safetensors``               spatial offset, boundary smoothing
``prefix.safetensors``                the prompt prefix
``extents.safetensors``               the heads that say how far people reach
``mild.json``                         format, base, resolution, `MildSettings`, and what the trainer recorded
``README.md``                         the model card
===================================== ===================================================================

Parts that the settings leave out have no file. Equal weights and records give equal bytes.
"""

from __future__ import annotations

import contextlib
import json
import operator
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dataset_tools.errors import UserError, one_line
from mild.model.attention import SpatialAttention, SpatialModulation, install_sma, remove_sma
from mild.model.backbone import (
    BRANCHES,
    WEIGHTS,
    Branch,
    activate,
    adapter_layers,
    adapter_parameters,
    add_layered_lora,
    same_weights,
    sample_of_weights,
    save_adapters,
)
from mild.model.card import model_card
from mild.model.cues import Cue
from mild.model.extents import Extents, install_extents, remove_extents
from mild.model.morphology import (
    GatedCrossAttention,
    HumanMorphologyGuidance,
    install_morphology,
    remove_morphology,
)
from mild.model.offsets import Offsets, install_offsets, remove_offsets
from mild.model.prefix import PromptPrefix
from mild.model.saved import CONFIG, FORMAT, SavedConfig, fetched, read_config
from mild.seeds import derived_seed
from mild.settings import MildSettings, PrefixSettings


class LayeredUNet:
    """A UNet of an SDXL inpainting base with all that MILD adds to it. Make one with `create` or `load`.

    No weight of the UNet is touched; it is frozen, and `remove` gives it back as it was. The parts are kept in
    float32 whatever the UNet's precision. With SMA or offsets, the UNet runs inside `branch` only.
    """

    unet: Any
    """The UNet, on which the parts are installed."""
    settings: MildSettings
    resolution: int | None
    """Pixels of the side of the crops that the parts were trained on; None for fresh ones."""
    inference_resolution: int | None
    """Pixels of the side of the square that they are meant to paint the background at, at most; None for fresh ones."""
    inference_steps: int | None
    """DDIM steps in which they are meant to erase; None for fresh ones."""
    prompt: str
    """Text that they were trained on, and are meant to erase with; empty for fresh ones."""
    sma: SpatialModulation | None
    hmg: HumanMorphologyGuidance | None
    offsets: Offsets | None
    prefix: PromptPrefix | None
    extents: Extents | None

    def __init__(self, unet: UNet2DConditionModel, settings: MildSettings, seed: int) -> None:
        self.unet = unet
        self.settings = settings
        self.resolution = self.inference_resolution = self.inference_steps = None
        self.prompt = ""
        self.sma = self.hmg = self.offsets = self.prefix = self.extents = None
        if set(BRANCHES) & set(getattr(unet, "peft_config", None) or {}):
            raise ValueError("this UNet has adapters of MILD already: remove them first")
        self._base_weights = sample_of_weights(unet)
        self._adapters: tuple[list[LoraConfig], list[BaseTunerLayer]] = [], []
        self._trained_before = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        try:
            add_layered_lora(unet, settings.lora, seed)
            if settings.hmg is not None:
                self.hmg = HumanMorphologyGuidance(unet, settings.hmg, derived_seed(seed, "hmg"))
                install_morphology(unet, self.hmg)
            if settings.offsets.any:
                self.offsets = Offsets(unet, settings.offsets, derived_seed(seed, "offsets"))
                install_offsets(unet, self.offsets)
            if settings.prefix is not None:
                self.prefix = PromptPrefix(int(unet.config.cross_attention_dim), settings.prefix)
            if settings.extents is not None:
                self.extents = Extents(unet, settings.extents, derived_seed(seed, "extents"))
                install_extents(unet, self.extents)
            if settings.sma:
                self.sma = install_sma(unet)
        except BaseException:
            self.remove()
            raise
        self._processors = _own_processors(unet)
        self.to(unet.device)

    @classmethod
    def create(cls, unet: UNet2DConditionModel, settings: MildSettings, seed: int) -> Self:
        """Freeze the UNet and add fresh parts, all trainable. They do not change its output yet.

        Args:
            seed: decides the initial weights.

        Raises:
            UserError: a setting does not fit the UNet.
            ValueError: the UNet has such parts already.
        """
        return cls(unet, settings, seed)

    @classmethod
    def load(cls, unet: UNet2DConditionModel, folder_or_hub_id: str | Path) -> Self:
        """Add the parts that `save` wrote, from a folder or from the Hugging Face hub.

        Warns where the UNet's weights are others than those of the base that the parts were trained on.

        Raises:
            UserError: there is no such folder or hub id, the hub cannot be reached, a file is missing or broken, or
                the parts were made for another base or by another version. The UNet is then as it was.
        """
        folder = fetched(folder_or_hub_id)
        config = read_config(folder)
        layered = cls(unet, config.mild, seed=0)
        try:
            for name, tensors in layered._tensors().items():
                _read_into(tensors, folder / name, config.base)
        except BaseException:
            layered.remove()
            raise
        layered.resolution, layered.inference_resolution = config.resolution, config.inference_resolution
        layered.inference_steps, layered.prompt = config.inference_steps, config.prompt
        if not same_weights(config.base_weights, layered._base_weights):
            warnings.warn(
                f"{folder_or_hub_id} was trained on another base than this one, {config.base}: it may do harm here",
                stacklevel=2,
            )
        return layered

    def train_prefix_alone(self, settings: PrefixSettings) -> None:
        """Begin a prompt prefix, in place of one that is there, and freeze all else."""
        self.settings = self.settings.model_copy(update={"prefix": settings})
        self.unet.requires_grad_(False)
        for part in self.parts().values():
            part.requires_grad_(False)
        self.prefix = PromptPrefix(int(self.unet.config.cross_attention_dim), settings).to(self.unet.device)

    def parts(self) -> dict[str, nn.Module]:
        """``sma``, ``hmg``, ``offsets``, ``prefix``, ``extents``: those that are there. Adapters live in the UNet."""
        names = ("sma", "hmg", "offsets", "prefix", "extents")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def leave_out(self, part: Literal["sma", "hmg"]) -> None:
        """Compute without a part from now on, as if it had never been there; nothing where it is not."""
        if part == "sma" and self.sma is not None:
            remove_sma(self.unet)
            self.sma = None
        if part == "hmg" and self.hmg is not None:
            remove_morphology(self.unet, self.hmg)
            self.hmg = None
        self._processors = _own_processors(self.unet)

    def to(self, device: torch.device | str) -> Self:
        """Move the parts, not the UNet, to where the UNet computes."""
        for part in self.parts().values():
            part.to(device)
        return self

    @contextlib.contextmanager
    def branch(
        self,
        branch: Branch,
        masks: torch.Tensor,
        *,
        pose: Cue | None = None,
        parsing: Cue | None = None,
        others: Cue | None = None,
        guidance: bool = False,
    ) -> Iterator[None]:
        """Let the UNet's forward passes inside the context run as one branch.

        For training, run one forward pass in the context; its backward pass may come after the context, but before
        the next one: with gradient checkpointing it computes again with the adapter that is active then.

        Args:
            branch: whose adapter computes.
            masks: (B, 1, H, W) in 0..1, at any size of the picture's aspect: M_k, the person of each row, for the
                foreground; the union of those who are erased for the background.
            pose, parsing: cues of the B rows, for HMG; None where unknown.
            others: the cue ``masks`` of HMG, M_k and M_others; foreground only.
            guidance: the UNet is given 2 B rows, negative prompts first and then prompts, as classifier-free
                guidance does; the negative rows have no cues.

        Raises:
            UserError: SMA or HMG were pushed out of the UNet's attention, or its adapters fused into its weights.
            ValueError: something has another shape, is needed and missing, or is for a part that is not there.
        """
        for attention, processor in self._processors:
            if attention.processor is not processor:
                raise UserError(
                    f"MILD's attention was replaced by {type(attention.processor).__name__}: leave attention slicing, "
                    "fuse_qkv_projections and set_attn_processor out (MILD computes in fused kernels), and load it anew"
                )
        if self.hmg is None and any(cue is not None for cue in (pose, parsing, others)):
            raise ValueError("cues are given, but this model has no HMG to use them")
        with contextlib.ExitStack() as stack:
            if self.sma is not None:
                stack.enter_context(self.sma.masks(masks))
            if self.hmg is not None:
                tokens = self.hmg(branch, len(masks), pose=pose, parsing=parsing, masks=others)
                if guidance:
                    tokens = torch.cat([self.hmg(branch, len(masks)), tokens])
                stack.enter_context(self.hmg.condition(tokens))
            if self.offsets is not None:
                stack.enter_context(self.offsets.masks(masks))
            activate(self._adapter_layers(), branch)
            yield

    def _adapter_layers(self) -> list[BaseTunerLayer]:
        """Those that are known, as long as no set of adapters has come or gone since, whose layers may be others.

        Raises:
            UserError: MILD's own were taken off.
        """
        named = getattr(self.unet, "peft_config", None) or {}
        if not named.keys() >= set(BRANCHES):
            raise UserError(
                "MILD's adapters were taken off the UNet, as unload_lora_weights does with all: take a style off by "
                "delete_adapters and its name, and load MILD anew"
            )
        sets = list(named.values())
        if len(sets) != len(self._adapters[0]) or any(map(operator.is_not, sets, self._adapters[0])):
            self._adapters = sets, adapter_layers(self.unet)
        return self._adapters[1]

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings (B, L, D) with the learned prefix, or as they are; not for negative prompts."""
        if self.prefix is None:
            return prompt_embeds
        prefixed: torch.Tensor = self.prefix(prompt_embeds)
        return prefixed

    def project_(self) -> None:
        """Enforce the hard constraints of SMA, unless its settings do without; call it after every optimizer step."""
        if self.sma is not None and self.settings.sma_constraints:
            self.sma.project_()

    def remove(self) -> None:
        """Give the UNet back as it was; the parts stay in memory, uninstalled."""
        if self.sma is not None:
            remove_sma(self.unet)
        if self.hmg is not None and self.hmg.door is not None:
            remove_morphology(self.unet, self.hmg)
        if self.offsets is not None:
            remove_offsets(self.offsets)
        if self.extents is not None:
            remove_extents(self.extents)
        adapters = set(getattr(self.unet, "peft_config", None) or {})
        if adapters <= set(BRANCHES):
            self.unet.unload_lora()
        else:
            self.unet.delete_adapters([branch for branch in BRANCHES if branch in adapters])
        for parameter in self._trained_before:
            parameter.requires_grad_(True)

    def save(
        self,
        folder: Path,
        *,
        base: str,
        resolution: int,
        inference_resolution: int | None = None,
        inference_steps: int,
        prompt: str = "",
        record: dict[str, Any],
        about: str = "",
    ) -> None:
        """Write the directory that the module describes, into an existing folder.

        Use `dataset_tools.folders.folder_written_whole` around it, so that it appears whole or not at all.

        Args:
            base: hub id or folder of the base.
            resolution: in pixels, that the parts were trained at.
            inference_resolution: in pixels, at which they are meant to paint the background at most; None: the same.
            inference_steps: in which they are meant to erase.
            prompt: that they were trained on.
            record: what else ``mild.json`` holds, JSON-compatible.
            about: Markdown list items for the model card, on training and data.
        """
        self._adapter_layers()  # they are there
        save_adapters(self.unet, folder)
        for name, part in self.parts().items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
            save_file(tensors, folder / _file(name))
        saved = SavedConfig(
            base=base,
            base_weights=self._base_weights,
            resolution=resolution,
            inference_resolution=inference_resolution or resolution,
            inference_steps=inference_steps,
            prompt=prompt,
            mild=self.settings,
        )
        config = {"format": FORMAT, **saved.model_dump(mode="json"), **record}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        card = model_card(
            self.settings,
            base=base,
            resolution=saved.resolution,
            inference_resolution=saved.inference_resolution,
            inference_steps=inference_steps,
            prompt=prompt,
            about=about,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name in the directory to the tensors that it holds: name there to the tensor in use here."""
        files: dict[str, dict[str, torch.Tensor]] = {}
        for branch, name in (("bg", WEIGHTS), ("fg", f"fg/{WEIGHTS}")):
            files[name] = {
                f"unet.{key.replace(f'.{branch}.', '.')}": parameter.detach()
                for key, parameter in adapter_parameters(self.unet, branch).items()  # type: ignore[arg-type]
            }
        return files | {_file(name): part.state_dict() for name, part in self.parts().items()}


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    commit_message: str = "Upload a MILD model",
    create_pr: bool = False,
) -> str:
    """Upload a saved directory to a model repository of the Hugging Face hub, which is created if need be.

    Args:
        folder: what `LayeredUNet.save` wrote, with whatever else lies in it.
        repo_id: ``owner/name``.
        token: with write access; None for that of ``hf auth login`` or of the environment variable ``HF_TOKEN``.
        private: nobody else may see a repository that is newly created.
        commit_message: of the commit.
        create_pr: open a pull request with it, in place of committing to the main branch.

    Returns:
        The URL of the commit.

    Raises:
        UserError: the folder is no MILD directory, or the hub cannot be reached or refuses.
    """
    read_config(Path(folder))
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
        )
    except Exception as error:  # The hub's errors have no common base class.
        raise UserError(
            f"{folder} cannot be uploaded to {repo_id}: {one_line(error)}; check the name, the network and the token"
        ) from error
    return str(commit.commit_url)


def _read_into(tensors: dict[str, torch.Tensor], path: Path, base: str) -> None:
    """Copy a file's tensors into those of the same name, after checking that they are the same set."""
    if not path.is_file():
        raise UserError(f"{path} is missing, but {CONFIG} speaks of it: copy or download the whole directory again")
    try:
        found = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is broken: {one_line(error)}; copy or download it again") from None
    problems = [
        *(f"tensor {name} is missing" for name in tensors if name not in found),
        *(f"tensor {name} is not known" for name in found if name not in tensors),
        *(
            f"tensor {name} is {found[name].dtype} of shape {tuple(found[name].shape)}, expected {tuple(like.shape)}"
            for name, like in tensors.items()
            if name in found and (found[name].shape != like.shape or not found[name].is_floating_point())
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{path} does not fit this base: {problems[0]}{more}; use the base that it was trained on, {base}, or copy "
            "or download the directory again"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def _own_processors(unet: UNet2DConditionModel) -> list[tuple[Any, Any]]:
    """Attention layers that SMA or HMG handle, and the processors that do."""
    own = (SpatialAttention, GatedCrossAttention)
    layers = [(layer, getattr(layer, "processor", None)) for layer in unet.modules()]
    return [(layer, processor) for layer, processor in layers if isinstance(processor, own)]


def _file(part: str) -> str:
    return f"{part}.safetensors"
