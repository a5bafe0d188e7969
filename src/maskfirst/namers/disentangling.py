"""Disentangling: a feature parted into what is related to its class and what is not, and put together again.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation" (PADing), 2023.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

SLOPE = 0.2
"""Of the leaky ReLUs, below 0."""


def part(width: int, dropout: float) -> nn.Sequential:
    """From a feature to one part of it; no activation stands between its two linear layers."""
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.LeakyReLU(SLOPE), nn.Dropout(dropout))


class Rebuild(nn.Module):
    """From both parts of a feature to the feature, activation and dropout being its last steps."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        steps = (nn.LeakyReLU(SLOPE), nn.Dropout(dropout))
        self.layers = nn.Sequential(nn.Linear(2 * width, width), *steps, nn.Linear(width, width), *steps)

    def forward(self, related: Float[Tensor, "N D"], unrelated: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.layers(torch.cat([related, unrelated], 1))


class Relation(nn.Module):
    """How much each feature has to do with each class: logits of a share, by the two side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, features: Float[Tensor, "N D"], classes: Float[Tensor, "K D"]) -> Float[Tensor, "N K"]:
        ours, theirs = features[:, None].expand(-1, len(classes), -1), classes.expand(len(features), -1, -1)
        return self.layers(torch.cat([ours, theirs], 2))[..., 0]
