"""Pixels: RGB 0..255 normalised for a network and padded with what is nothing to it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Pixels(nn.Module):
    """(RGB - `mean`) / `std`, then zeros below and on the right, until `multiple` px divide both sides. No parameters."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float], multiple: int) -> None:
        super().__init__()
        self.multiple = multiple
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 _H _W"]:
        height, width = pixels.shape[-2:]
        return F.pad((pixels - self.shift) / self.scale, (0, -width % self.multiple, 0, -height % self.multiple))


def fill_up(
    pixels: Float[Tensor, "B 3 H W"], mean: tuple[float, float, float], multiple: int
) -> Float[Tensor, "B 3 _H _W"]:
    """RGB with `mean`, which becomes nothing, below and on the right, until `multiple` px divide both sides."""
    height, width = pixels.shape[-2:]
    below, beside = -height % multiple, -width % multiple
    if not below and not beside:
        return pixels
    canvas = pixels.new_tensor(mean).view(1, 3, 1, 1).repeat(pixels.shape[0], 1, height + below, width + beside)
    canvas[..., :height, :width] = pixels
    return canvas
