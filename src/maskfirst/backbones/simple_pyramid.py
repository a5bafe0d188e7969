"""Simple pyramid: maps of strides 4, 8, 16 and 32 px of a backbone that has not all of them, such as a plain ViT.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), 2022.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn

from maskfirst.backbones.pixels import fill_up
from maskfirst.backbones.pyramid import STRIDES
from maskfirst.contracts import Backbone


class MapNorm(nn.Module):
    """A LayerNorm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(Backbone):
    """`backbone`'s own map of each stride where it has one, else its last map brought to that stride; all `width` wide.

    Finer maps by transposed convolutions that double, coarser ones by max-pooling. Every map then has a 1x1 and a 3x3
    convolution, each normed. Of several maps of one stride the last counts.
    """

    def __init__(self, backbone: Backbone, width: int = 256) -> None:
        super().__init__()
        off = [stride for stride in backbone.strides if stride not in STRIDES]
        if off:
            raise ValueError(
                f"simple_pyramid needs maps of strides {list(STRIDES)} px, and this backbone has {sorted(set(off))}; "
                "give its trunk another `patch`"
            )
        self.backbone = backbone
        last = len(backbone.strides) - 1
        own = {stride: index for index, stride in enumerate(backbone.strides)}
        self.sources = [own.get(stride, last) for stride in STRIDES]
        self.reach = nn.ModuleList(
            _reach(backbone.channels[source], backbone.strides[source], stride)
            for source, stride in zip(self.sources, STRIDES, strict=True)
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(_channels(backbone.channels[source], backbone.strides[source], stride), width, 1, bias=False),
                MapNorm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                MapNorm(width),
            )
            for source, stride in zip(self.sources, STRIDES, strict=True)
        )
        self.channels = (width,) * len(STRIDES)
        self.strides = STRIDES
        self.mean = backbone.mean
        self.multiple = math.lcm(backbone.multiple, STRIDES[-1])

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        maps = self.backbone(fill_up(pixels, self.mean, self.multiple))
        return [
            smooth(reach(maps[source]))
            for source, reach, smooth in zip(self.sources, self.reach, self.smooth, strict=True)
        ]


def _channels(channels: int, stride: int, goal: int) -> int:
    """Of a map brought to another stride: halved with every doubling, as ViTDet does."""
    return channels * goal // stride if goal < stride else channels


def _reach(channels: int, stride: int, goal: int) -> nn.Sequential:
    """Brings a map of `stride` px to `goal` px."""
    steps: list[nn.Module] = []
    while stride > goal:
        if steps:
            steps += [MapNorm(channels), nn.GELU()]
        steps.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels, stride = channels // 2, stride // 2
    while stride < goal:
        steps.append(nn.MaxPool2d(2, 2))
        stride *= 2
    return nn.Sequential(*steps)
