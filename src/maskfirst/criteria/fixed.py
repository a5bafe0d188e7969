"""Fixed: query c stands for class c, always.

Zhang et al., "SegViT: Semantic Segmentation with Plain Vision Transformers", NeurIPS 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from maskfirst.contracts import Criterion
from maskfirst.criteria.counts import mean_count
from maskfirst.criteria.masks import mask_losses
from maskfirst.errors import UserError
from maskfirst.types import Names, Proposals, Segments, Vocabulary


class Fixed(Criterion):
    """SegViT's loss: query c answers for class c; cross-entropy on names, focal and dice on the masks of present classes.

    Classes absent from a picture have no object as their name and no mask loss. Pixels without a class count as outside
    of every mask. `no_object`: the weight of that name in the cross-entropy; it is a buffer, as checkpoints carry it.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "fixed"}
    trains_void: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        name_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object: float = 0.1,
    ) -> None:
        super().__init__()
        self.name_weight = name_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        weights = torch.ones(len(vocabulary) + 1)
        weights[-1] = no_object
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights)

    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        classes = len(self.class_weights) - 1
        if names.logits.shape[1] != classes:
            raise UserError(
                f"criterion fixed needs one query a class: {names.logits.shape[1]} queries, {classes} classes"
            )
        if proposals.competing:
            raise UserError(
                "criterion fixed needs masks that stand alone (proposer atm); use `pixel` for competing ones"
            )
        if any(len(segments.classes.unique()) < len(segments) for segments in truth):
            raise UserError(
                "criterion fixed knows one mask a class and a picture has several: use criterion `set`, or task semantic"
            )
        images = torch.cat([torch.full_like(segments.classes, i) for i, segments in enumerate(truth)])
        present = torch.cat([segments.classes for segments in truth])
        named = torch.full(names.logits.shape[:2], classes, device=present.device)
        named[images, present] = present
        losses = {"ce": self.name_weight * F.cross_entropy(names.logits.transpose(1, 2), named, self.class_weights)}
        count = mean_count(len(present), present.device)
        if len(present) == 0:
            nothing = 0.0 * proposals.masks.sum()
            return losses | {"mask": nothing, "dice": nothing}
        inside = torch.cat([segments.masks for segments in truth])
        focal, dice = mask_losses(proposals.masks[images, present], inside, proposals.resolution)
        losses["mask"] = self.mask_weight * focal.sum() / count
        losses["dice"] = self.dice_weight * dice.sum() / count
        return losses
