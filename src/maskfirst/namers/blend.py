"""Blend: what two namers say of a mask, mixed as a weighted geometric mean; whether it is an object stays with the first.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (arXiv 2505.19795).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from maskfirst.contracts import Namer
from maskfirst.types import Batch, Names, Proposals

Normalise = Literal["renormalised", "joint"]


class Blend(Namer):
    """The names of `first` to the power of 1 - `weight` times those of `second` to the power of `weight`, given an object.

    `normalise`: "renormalised", over the names, so that P(no object) is the first's (as published with OneFormer); or
    "joint", together with no object, so that masks of which the two disagree weigh less (as published with InternImage).
    Weight 0 gives the first's names as they are.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "blend",
        "first": {"kind": "class_head"},
        "second": {
            "kind": "vit_p",
            "trunk": {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 16, "depth": 1, "heads": 2},
            "size": [32, 32],
        },
    }

    def __init__(
        self,
        first: Namer,
        second: Namer,
        weight: float = 0.4,
        normalise: Normalise = "renormalised",
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight {weight} is the second namer's share and must lie in 0..1; 0.4 is usual")
        self.first = first
        self.second = second
        self.weight = weight
        self.normalise: Normalise = normalise
        self.uses_truth = first.uses_truth or second.uses_truth

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        names = self.first(proposals, batch)
        if self.weight == 0:
            return names
        return mixed(names, self.second(proposals, batch), self.weight, self.normalise)


def mixed(first: Names, second: Names, weight: float, normalise: Normalise) -> Names:
    """The names of a blend, see `Blend`, with a `weight` above 0."""
    logs = first.logits.log_softmax(-1)
    names = weight * second.logits[..., :-1].log_softmax(-1)
    if weight < 1:
        names = names + (1 - weight) * first.logits[..., :-1].log_softmax(-1)
    if normalise == "renormalised":
        names = names.log_softmax(-1)
    objects = logs[..., :-1].logsumexp(-1, keepdim=True)
    return Names(torch.cat([names + objects, logs[..., -1:]], -1))
