"""Pyramid by transposed convolutions: maps of strides 4, 8, 16 and 32 px of four taps of a plain ViT, each from its own.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022, for segmentation; what ViT-Adapter is compared with.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.doubling import Doubling
from maskfirst.backbones.pixels import fill_up
from maskfirst.backbones.pyramid import STRIDES
from maskfirst.contracts import Backbone


class DeconvPyramid(Backbone):
    """The four maps of `backbone`, all of stride 16 px and one width: doubled twice, doubled, as it is, and halved."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if backbone.strides != (16,) * len(STRIDES) or len(set(backbone.channels)) != 1:
            raise ValueError(
                f"deconv_pyramid needs four maps of stride 16 px and one width, and this backbone has strides "
                f"{list(backbone.strides)} and widths {list(backbone.channels)}; give it `taps` with four depths"
            )
        width = backbone.channels[0]
        self.backbone = backbone
        self.quarter = nn.Sequential(Doubling(width), nn.BatchNorm2d(width), nn.GELU(), Doubling(width))
        self.eighth = Doubling(width)
        self.channels = backbone.channels
        self.strides = STRIDES
        self.mean = backbone.mean
        self.multiple = math.lcm(backbone.multiple, STRIDES[-1])

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        first, second, third, fourth = self.backbone(fill_up(pixels, self.mean, self.multiple))
        return [self.quarter(first), self.eighth(second), third, F.max_pool2d(fourth, 2)]
