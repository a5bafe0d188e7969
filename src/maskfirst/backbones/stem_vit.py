"""A small plain ViT under a convolutional stem, whose finer maps return after the last block as a pyramid.

The stem follows Xiao et al., "Early Convolutions Help Transformers See Better", 2021; the way back up is an FPN's
(Lin et al., 2017). Made for training from scratch on few pictures.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.timm_models import load_timm
from maskfirst.contracts import Backbone, Resizable
from maskfirst.frames import resize


class NormConv(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B _c _h _w"]:
        return self.norm(self.convolution(maps))


class Residual(nn.Module):
    """Two 3x3 convolutions beside an identity (He et al., 2016); at first the identity alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = NormConv(channels, channels)
        self.second = NormConv(channels, channels)
        nn.init.zeros_(self.second.norm.weight)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return (maps + self.second(self.first(maps).relu())).relu()


class StemViT(Backbone, Resizable):
    """Maps of strides 4, 8 and 16 px, each `channels_out` wide; the deepest is the ViT's.

    `channels`: of the stem at strides 2, 4 and 8. `residuals`: blocks of the stem at strides 4 and 8. `size`: the picture
    whose grid the position table has, px; other grids interpolate it at run time.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: tuple[int, int, int] = (32, 48, 96),
        residuals: tuple[int, int] = (1, 2),
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        channels_out: int = 96,
        drop_path: float = 0.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        blocks: Any = load_timm().models.vision_transformer.Block
        half, quarter, eighth = channels
        self.stem4 = nn.Sequential(
            NormConv(3, half, 2),
            nn.ReLU(),
            NormConv(half, quarter, 2),
            nn.ReLU(),
            *(Residual(quarter) for _ in range(residuals[0])),
        )
        self.stem8 = nn.Sequential(
            NormConv(quarter, eighth, 2), nn.ReLU(), *(Residual(eighth) for _ in range(residuals[1]))
        )
        self.stem16 = nn.Conv2d(eighth, width, 3, 2, 1)
        grid = (-(-size[0] // 16), -(-size[1] // 16))
        self.grid = grid
        self.positions = nn.Parameter(torch.randn(1, width, *grid) * 0.02)
        self.blocks = nn.ModuleList(
            blocks(width, heads, qkv_bias=True, drop_path=drop_path * index / max(depth - 1, 1))
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels_out, 1) for inputs in (quarter, eighth, width))
        self.smooth = nn.ModuleList(NormConv(channels_out, channels_out) for _ in range(2))
        self.channels = (channels_out,) * 3
        self.strides = (4, 8, 16)
        self.mean = mean
        self.multiple = 16
        self.pixels = Pixels(mean, std, self.multiple)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        pixels = self.pixels(pixels)
        # Bright pixels, normalised, would lose a grey level to bf16: that alone flips 0.3 % of an answer's pixels.
        with torch.autocast(pixels.device.type, enabled=False):
            half = self.stem4[0](pixels.contiguous(memory_format=torch.channels_last))
        quarter = self.stem4[1:](half)
        eighth = self.stem8(quarter)
        maps = self.stem16(eighth)
        grid = (maps.shape[-2], maps.shape[-1])
        positions = self.positions
        if grid != self.grid:
            positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
        tokens = (maps + positions).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        deep = self.lateral[2](self.norm(tokens).transpose(1, 2).unflatten(2, grid))
        middle = self._merge(0, deep, self.lateral[1](eighth))
        fine = self._merge(1, middle, self.lateral[0](quarter))
        return [fine, middle, deep]

    def _merge(self, index: int, coarse: Tensor, lateral: Tensor) -> Tensor:
        return self.smooth[index](lateral + resize(coarse, (lateral.shape[-2], lateral.shape[-1]))).relu()

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Position maps of other grids are resized bicubically."""
        if name != "positions" or tensor.ndim != 4 or tensor.shape[:2] != self.positions.shape[:2]:
            return None
        return F.interpolate(tensor.float(), size=self.grid, mode="bicubic", align_corners=False).to(tensor.dtype)
