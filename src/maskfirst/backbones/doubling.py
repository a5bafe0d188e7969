"""Doubling: every place of a map becomes 2 x 2, by a transposed convolution whose kernels do not overlap."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Doubling(nn.Module):
    """torch's ConvTranspose2d(width, width, 2, 2) as a product over channels, which lie last in memory as those of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 2, 2) * (2 / (4 * width)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D 2*h 2*w"]:
        kernel = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        opened = F.linear(maps.permute(0, 2, 3, 1), kernel).unflatten(-1, (2, 2, -1))  # (B, h, w, 2, 2, D)
        return (opened.transpose(2, 3) + self.bias).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
