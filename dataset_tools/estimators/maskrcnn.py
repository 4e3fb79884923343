"""People by Mask R-CNN (He et al., 2017), torchvision's improved version (v2) with its weights for COCO.

https://docs.pytorch.org/vision/stable/models/mask_rcnn.html; BSD-3-Clause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.found_people import InstancesSettings, PeopleFinder, Seen
from dataset_tools.estimators.network import alike


class MaskRCNNSettings(InstancesSettings):
    """Which weights, and whom to believe."""

    kind: Literal["maskrcnn"] = "maskrcnn"
    weights: str = "maskrcnn"
    """Name of `dataset_tools.networks`, or a file, or its folder, with a state dict of torchvision's
    ``maskrcnn_resnet50_fpn_v2`` and its 91 classes of COCO."""

    def open(self) -> MaskRCNN:
        """The estimator; nothing is loaded yet."""
        return MaskRCNN(self)


class MaskRCNN(PeopleFinder):
    """Finds people of COCO's class "person"; masks of 28 x 28 within boxes, pasted by torchvision."""

    package = "torchvision"
    files = ("*.pth", "*.pt")

    def load(self) -> Any:
        """See `NetworkEstimator.load`; weights stay float32, and are cast as they are used."""
        import torch
        from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

        files = list(self.weights.files.values())
        if len(files) != 1:
            raise UserError(f"{self.settings.weights} holds {', '.join(sorted(self.weights.files))}: name one of them")
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
        model.load_state_dict(state, strict=True)
        # Boxes are computed from what these give. Half precision would round them to whole pixels, and has no number
        # as large as a class's times a picture's width, by which torchvision keeps classes apart.
        for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
            part.register_forward_hook(lambda _part, _given, result: _in_float32(result))
        return model.eval().to(self.device)

    def _see(self, model: Any, images: Sequence[np.ndarray]) -> list[Seen]:
        seen: list[Seen] = [([], [])] * len(images)
        # A batch is padded to its largest picture, and what lies beside a picture is seen too.
        for batch in alike([image.shape for image in images]):
            for k, people in zip(batch, self._detect(model, [images[k] for k in batch]), strict=True):
                seen[k] = people
        return seen

    def _detect(self, model: Any, images: Sequence[np.ndarray]) -> list[Seen]:
        """``GeneralizedRCNN.forward``, but that masks of other things are not pasted: each is as large as a picture."""
        import torch
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

        person = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"].index("person")
        pictures = [torch.tensor(image, device=self.device).permute(2, 0, 1) / 255 for image in images]
        model.roi_heads.score_thresh = self.settings.min_score
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            resized, _ = model.transform(pictures)
            features = model.backbone(resized.tensors)
            proposals, _ = model.rpn(resized, features)
            detections, _ = model.roi_heads(features, proposals, resized.image_sizes)
        seen = []
        for image, size, detected in zip(images, resized.image_sizes, detections, strict=True):
            people = detected["labels"] == person
            boxes, small, scores = (detected[name][people].cpu() for name in ("boxes", "masks", "scores"))
            masks = []
            for box, mask in zip(boxes, small, strict=True):
                one = [{"boxes": box[None], "masks": mask[None]}]
                [pasted] = model.transform.postprocess(one, [size], [image.shape[:2]])
                masks.append(pasted["masks"][0, 0].numpy() >= 0.5)
            seen.append((masks, scores.tolist()))
        return seen


def _in_float32(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: _in_float32(value) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(_in_float32(value) for value in result)
    return result.float()
