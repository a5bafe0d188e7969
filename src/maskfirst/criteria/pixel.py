"""Pixel: cross-entropy of every pixel, for masks that compete."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from maskfirst.contracts import Criterion
from maskfirst.criteria.counts import mean_count
from maskfirst.errors import UserError
from maskfirst.frames import resize
from maskfirst.types import VOID, Names, Proposals, Segments


class Pixel(Criterion):
    """Cross-entropy of every pixel over competing masks, one a class; pixels without a class add nothing.

    `average`: over the pixels that have a class, "known", or as mmseg does over "all": crops with much void then weigh less.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "pixel"}

    def __init__(self, average: Literal["known", "all"] = "known") -> None:
        super().__init__()
        self.average = average

    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        if not proposals.competing:
            raise UserError(
                "criterion pixel needs competing masks (proposers dense, upernet); use `fixed` or `set` for others"
            )
        labels = torch.stack([segments.label_map() for segments in truth])
        logits = resize(proposals.masks, (labels.shape[-2], labels.shape[-1]))
        pixels = labels.numel() if self.average == "all" else int((labels != VOID).sum())
        total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
        return {"ce": proposals.weight * total / mean_count(pixels, labels.device)}
