"""Uni-Perceiver: a plain ViT whose patches know a place in time, too, and are normed before the blocks.

Zhu et al., "Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks", 2022:
what of it sees pictures, as ViT-Adapter takes it for a trunk (Chen et al., 2023).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD
from maskfirst.backbones.vit import TimmViT
from maskfirst.contracts import Trunk
from maskfirst.frames import Size


class UniPerceiver(Trunk):
    """A Uni-Perceiver of pictures alone: no token but those of the patches, and no norm after the blocks.

    `size`: the square picture, px, whose grid the position table has; other grids interpolate it at run time. `norm_eps`: of
    every LayerNorm. `layer_scale`: what the scales of its branches begin with; with 0 it is the pretrained ones that count.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        layer_scale: float = 0.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        # Before the blocks, as a layer decay takes what follows them for a layer behind.
        self.moment = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width), std=0.02))
        self.embedding_norm = nn.LayerNorm(width, norm_eps)
        self.plain = TimmViT(
            size,
            width=width,
            depth=depth,
            heads=heads,
            patch=patch,
            drop_path=drop_path,
            final_norm=False,
            norm_eps=norm_eps,
            # timm takes 0 for none.
            layer_scale=1.0,
            class_token="absent",
            mean=mean,
            std=std,
        )
        for block in self.plain.vit.blocks:
            for scale in (block.ls1, block.ls2):
                nn.init.constant_(scale.gamma, layer_scale)
        self.width = self.plain.width
        self.depth = self.plain.depth
        self.patch = self.plain.patch
        self.prefix = self.plain.prefix
        self.mean, self.std = mean, std

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        patches, grid = self.plain.embed(pixels)
        return self.embedding_norm(patches + self.moment), grid

    def block(
        self,
        index: int,
        tokens: Float[Tensor, "B N D"],
        grid: Size,
        mask: Bool[Tensor, "B N N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        return self.plain.block(index, tokens, grid, mask)

    def shrink_block(
        self, index: int, queries: Float[Tensor, "B M D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        return self.plain.shrink_block(index, queries, tokens)

    def norm(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.plain.norm(tokens)
