"""The pixel decoder of Mask2Former: deformable attention among the coarse maps of a pyramid, and one fine map for masks.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation" (Mask2Former), CVPR 2022.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.deformable import DeformableAttention, at_least_single, places_on
from maskfirst.frames import Size
from maskfirst.ops.sine_positions import sine_positions

GROUPS = 32
"""Of every group norm, where the width allows it."""


class MapNorm(nn.GroupNorm):
    """A group norm that also takes a map of one token whose groups are single channels, which torch's module refuses."""

    def __init__(self, width: int) -> None:
        super().__init__(math.gcd(GROUPS, width), width)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as a product over channels, for maps that lie in memory channels last, as all do here."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    """A post-norm transformer layer whose attention is deformable; ReLU; LayerNorm eps 1e-5. `dropout`: of what it adds."""

    def __init__(
        self, width: int, heads: int, levels: int, points: int, feedforward: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.attention = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        positions: Float[Tensor, "1 N D"],
        sizes: Sequence[Size],
        places: Float[Tensor, "N L 2"],
    ) -> Float[Tensor, "B N D"]:
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens + positions, tokens, sizes, places)))
        return self.norm2(tokens + self.dropout(self.contract(self.dropout(self.expand(tokens).relu_()))))


class PixelDecoder(nn.Module):
    """Encodes the three coarse of four maps together, and merges them with the finest into a map for masks.

    `channels`: of the four maps, fine to coarse. `width`: of the encoded maps; `mask_width`: of the map for masks; `dropout`:
    in its layers, as OneFormer has it. It computes in single precision at least, whatever the autocast.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int = 256,
        mask_width: int = 256,
        heads: int = 8,
        layers: int = 6,
        feedforward: int = 1024,
        points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        finest, *coarse = channels
        self.entrances = nn.ModuleList(
            nn.Sequential(Pointwise(inputs, width), MapNorm(width)) for inputs in reversed(coarse)
        )
        self.level_embed = nn.Parameter(torch.randn(len(coarse), width))
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, len(coarse), points, feedforward, dropout) for _ in range(layers)
        )
        self.lateral = nn.Sequential(Pointwise(finest, width, bias=False), MapNorm(width))
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), MapNorm(width))
        self.masks = Pointwise(width, mask_width)
        for entrance in cast("Iterable[nn.Sequential]", self.entrances):
            _initialise(entrance[0], nn.init.xavier_uniform_)
        for layer in cast("Iterable[EncoderLayer]", self.layers):
            nn.init.xavier_uniform_(layer.expand.weight)
            nn.init.xavier_uniform_(layer.contract.weight)
        for convolution in (self.lateral[0], self.smooth[0], self.masks):
            _initialise(convolution, lambda weight: nn.init.kaiming_uniform_(weight, a=1))

    def forward(
        self, maps: Sequence[Float[Tensor, "B _c _h _w"]]
    ) -> tuple[Float[Tensor, "B C h w"], list[Float[Tensor, "B D _h _w"]]]:
        """The map for masks, and the encoded maps, coarse to fine. `maps`: fine to coarse."""
        with torch.autocast(maps[0].device.type, enabled=False):
            finest, *coarse = (at_least_single(tapped) for tapped in maps)
            entered = [entrance(tapped) for entrance, tapped in zip(self.entrances, reversed(coarse), strict=True)]
            sizes = [(each.shape[-2], each.shape[-1]) for each in entered]
            tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in entered], 1)
            places = places_on(sizes, sizes, tokens.device)
            positions = torch.cat(
                [
                    sine_positions(size, tokens.shape[-1], tokens.device) + level
                    for size, level in zip(sizes, self.level_embed, strict=True)
                ]
            )[None]
            for layer in self.layers:
                tokens = layer(tokens, positions, sizes, places)
            encoded = [
                each.transpose(1, 2).unflatten(2, size)
                for each, size in zip(tokens.split([h * w for h, w in sizes], 1), sizes, strict=True)
            ]
            # Of one map at a time, so that it stays channels last, which `frames.resize` would change.
            enlarged = F.interpolate(encoded[-1], finest.shape[-2:], mode="bilinear", align_corners=False)
            fine = self.lateral(finest) + enlarged
            return self.masks(self.smooth(fine).relu_()), encoded


def _initialise(convolution: nn.Module, weight: Callable[[Tensor], object]) -> None:
    if isinstance(convolution, nn.Conv2d):
        weight(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
