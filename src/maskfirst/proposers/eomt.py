"""EoMT: queries join the tokens of a plain ViT for its last blocks, and what they become there finds the masks.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Proposer, Trunk
from maskfirst.frames import Size, resize
from maskfirst.proposers.atm import FreeQueries
from maskfirst.types import TASKS, Batch, Proposals

Span = tuple[float, float]
"""Shares of the training between which the masking of one block fades out."""


class Enlarge(nn.Module):
    """Maps of twice the size: every place becomes 2 x 2, which then mix with their neighbours, channel by channel.

    A transposed convolution without overlap is a linear layer, and channels lie last throughout: both, and the norm, are
    faster so.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.open = nn.Linear(width, 4 * width, bias=False)
        self.bias = nn.Parameter(torch.empty(width))
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # As a transposed convolution begins.
        for parameter in (self.open.weight, self.bias):
            nn.init.uniform_(parameter, -0.5 * width**-0.5, 0.5 * width**-0.5)

    def forward(self, maps: Float[Tensor, "B h w D"]) -> Float[Tensor, "B 2*h 2*w D"]:
        opened = self.open(maps).unflatten(-1, (2, 2, -1))  # (B, h, w, 2, 2, D)
        opened = (opened.permute(0, 1, 3, 2, 4, 5) + self.bias).flatten(1, 2).flatten(2, 3)
        mixed = self.mix(F.gelu(opened).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(mixed)


class EoMT(Proposer):
    """Queries that join the last `blocks` blocks of a plain ViT. `upscale`: doublings of the mask grid; None: to 4..7 px.

    In training each of these blocks lets its queries look only into the masks that they have so far, and this masking fades
    out block by block, so that none is left for predicting, where attention is fastest without. `annealing`: for every block
    the shares of training (first, last) between which the chance that a query is masked falls from 1 to 0, as
    (1 - p)^power; None: as published, sixths of training that begin evenly spaced from 1/6 to 4/6.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "eomt",
        "trunk": {
            "kind": "vit",
            "model": "vit_small_patch14_reg4_dinov2",
            "patch": 8,
            "width": 32,
            "depth": 3,
            "heads": 2,
        },
        "queries": 3,
        "blocks": 2,
        "upscale": 1,
    }

    def __init__(
        self,
        trunk: Trunk,
        queries: int = 200,
        blocks: int = 4,
        upscale: int | None = None,
        annealing: tuple[Span, ...] | None = None,
        power: float = 0.9,
    ) -> None:
        super().__init__()
        if not 1 <= blocks <= trunk.depth:
            raise ValueError(f"blocks {blocks} must lie in 1..{trunk.depth}, the blocks of the trunk")
        if queries < 1:
            raise ValueError(f"queries {queries} must be at least 1")
        if annealing is None:
            annealing = published_annealing(blocks)
        if len(annealing) != blocks or any(not 0 <= first <= last for first, last in annealing):
            raise ValueError(f"annealing must have {blocks} pairs, one a block, of rising shares of training")
        width = trunk.width
        self.trunk = trunk
        self.queries = FreeQueries(queries, width)
        doublings = max(1, int(math.log2(trunk.patch)) - 2) if upscale is None else upscale
        self.upscale = nn.Sequential(*(Enlarge(width) for _ in range(doublings)))
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.blocks = blocks
        self.annealing = annealing
        self.power = power
        self.masking = (1.0,) * blocks
        self.width = width
        self.tasks = frozenset(TASKS)
        # The original pads its pictures black before they are normalised.
        self.mean = (0.0, 0.0, 0.0)
        self.multiple = trunk.patch

    def at(self, progress: float) -> None:
        self.masking = tuple(masking(progress, span, self.power) for span in self.annealing)

    def forward(self, batch: Batch) -> Proposals:
        tokens, grid = self.trunk.embed(batch.pixels)
        first = self.trunk.depth - self.blocks
        for index in range(first):
            tokens = self.trunk.block(index, tokens, grid)
        tokens = torch.cat([self.queries.weight.expand(batch.pixels.shape[0], -1, -1), tokens], 1)
        earlier = []
        for index, chance in enumerate(self.masking, first):
            masked = self.training and chance > 0
            mask = None
            if masked or batch.truth is not None:
                guess = self._guess(tokens, grid)
                mask = self._mask(guess.masks, grid, tokens.shape[1], chance) if masked else None
                earlier.append(guess)
            tokens = self.trunk.block(index, tokens, grid, mask)
        last = self._guess(tokens, grid)
        kept = tuple(earlier) if batch.truth is not None else ()
        return Proposals(last.masks, queries=last.queries, earlier=kept)

    def _guess(self, tokens: Float[Tensor, "B N D"], grid: Size) -> Proposals:
        """What the queries among the tokens stand for now."""
        normed = self.trunk.norm(tokens)
        queries = normed[:, : len(self.queries.weight)]
        maps = self.upscale(normed[:, normed.shape[1] - grid[0] * grid[1] :].unflatten(1, grid))
        return Proposals(_products(maps, self.mask_head(queries)), queries=queries)

    def _mask(
        self, masks: Float[Tensor, "B Q h w"], grid: Size, tokens: int, chance: float
    ) -> Bool[Tensor, "B {tokens} {tokens}"]:
        """Queries look at each other, at the prefix and into their masks; a share of them, and all others, everywhere."""
        inside = resize(masks.detach(), grid).flatten(2) > 0
        count, queries, places = inside.shape
        if chance < 1:
            inside |= (torch.rand(count, queries, device=inside.device) > chance)[..., None]
        mask = torch.ones(count, tokens, tokens, dtype=torch.bool, device=inside.device)
        mask[:, :queries, tokens - places :] = inside
        return mask


def _products(maps: Float[Tensor, "B h w D"], embedded: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q h w"]:
    if torch.compiler.is_compiling():
        # A graph has pictures in any number.
        return (embedded @ maps.flatten(1, 2).mT).unflatten(2, maps.shape[1:3])
    # A linear layer for each picture: faster than the product that torch makes of an einsum over the batch.
    pairs = zip(maps, embedded, strict=True)
    return torch.stack([F.linear(places, own) for places, own in pairs]).permute(0, 3, 1, 2)


def masking(progress: float, span: Span, power: float) -> float:
    """The chance, at this share of training, that a query of a block sees only its mask."""
    first, last = span
    if progress < first:
        return 1.0
    return 0.0 if progress >= last else (1 - (progress - first) / (last - first)) ** power


def published_annealing(blocks: int) -> tuple[Span, ...]:
    """The spans of the released configurations, which have 3, 4 and 5 blocks."""
    firsts = [1 / 6 + index / max(blocks - 1, 1) / 2 for index in range(blocks)]
    return tuple((first, first + 1 / 6) for first in firsts)
