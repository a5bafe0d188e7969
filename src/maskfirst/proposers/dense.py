"""Dense: one competing mask a class that arrives already named, as a per-pixel classifier gives them.

Long et al., "Fully Convolutional Networks for Semantic Segmentation", 2015; on a frozen or trained ViT: a linear head.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from maskfirst.contracts import Backbone, PerClass, Proposer
from maskfirst.types import Batch, Names, Proposals, Vocabulary


class PixelRows(nn.Conv2d, PerClass):
    """A 1x1 convolution whose rows are the K classes."""

    class_rows: ClassVar[Mapping[str, bool]] = {"weight": False, "bias": False}


class Dense(Proposer):
    """A linear layer on the normed channels of one map of the backbone, `tap`. Semantic only."""

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "dense",
        "backbone": {
            "kind": "taps",
            "depths": [1],
            "trunk": {
                "kind": "vit",
                "model": "vit_tiny_patch16_224",
                "width": 32,
                "depth": 2,
                "heads": 2,
                "final_norm": False,
            },
        },
    }

    def __init__(self, backbone: Backbone, vocabulary: Vocabulary, tap: int = -1, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone
        if not -len(backbone.channels) <= tap < len(backbone.channels):
            raise ValueError(f"tap {tap}: the backbone has {len(backbone.channels)} maps")
        self.tap = tap
        channels = backbone.channels[tap]
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = PixelRows(channels, len(vocabulary), 1)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        self.width = None
        self.tasks = frozenset({"semantic"})
        self.mean = backbone.mean
        self.multiple = backbone.multiple

    def forward(self, batch: Batch) -> Proposals:
        tapped = self.backbone(batch.pixels)[self.tap]
        normed = self.norm(tapped.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        masks = self.linear(self.dropout(normed))
        return Proposals(masks, competing=True, names=one_name_each(masks))


def one_name_each(masks: torch.Tensor) -> Names:
    """Mask c is certainly class c: logits 0 for its own name, minus infinity for all others."""
    count = masks.shape[1]
    own = torch.eye(count, count + 1, device=masks.device)
    return Names(own.log().expand(masks.shape[0], -1, -1))
