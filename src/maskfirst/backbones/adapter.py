"""ViT-Adapter: convolutions beside a plain ViT, which hand it maps of finer and coarser strides and take what it makes of them.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.blocks import run
from maskfirst.backbones.deformable import DeformableAttention, places_on
from maskfirst.backbones.doubling import Doubling
from maskfirst.backbones.pixels import Pixels, fill_up
from maskfirst.backbones.pyramid import STRIDES
from maskfirst.backbones.timm_models import load_timm
from maskfirst.contracts import Backbone, Trunk
from maskfirst.frames import Size

PATCH = 16


@dataclass(frozen=True)
class Geometry:
    """Where tokens lie in pictures of one size. `patches`: the trunk's grid; `maps`: those of strides 8, 16 and 32 px.

    `onto_maps`: places of the patches on these maps; `onto_patches`: places of the maps' tokens on the grid.
    """

    patches: Size
    maps: tuple[Size, Size, Size]
    onto_maps: Float[Tensor, "N 3 2"]
    onto_patches: Float[Tensor, "S 1 2"]

    @classmethod
    def of(cls, patches: Size, device: torch.device) -> "Geometry":
        height, width = patches
        maps = ((2 * height, 2 * width), patches, (height // 2, width // 2))
        return cls(patches, maps, places_on(maps, [patches], device), places_on([patches], maps, device))

    def split(self, tokens: Float[Tensor, "B S D"]) -> list[Float[Tensor, "B D _h _w"]]:
        """The three maps, their channels last in memory."""
        parts = tokens.split([height * width for height, width in self.maps], 1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, self.maps, strict=True)]


class SpatialPrior(nn.Module):
    """Convolutions of normalised pixels: a map of stride 4 px, and the tokens of maps of 8, 16 and 32 px."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, channels, 2),
            *_convolution(channels, channels, 1),
            *_convolution(channels, channels, 1),
            nn.MaxPool2d(3, 2, 1),
        )
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.down = nn.ModuleList(
            nn.Sequential(*_convolution(inputs, outputs, 2)) for inputs, outputs in pairwise(widths)
        )
        # Convolutions of 1 x 1 of maps whose channels lie last, as do those of tokens.
        self.project = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        for linear in cast("Iterable[nn.Linear]", self.project):
            _begin(linear, width)

    def forward(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B D h w"], list[Float[Tensor, "B _n D"]]]:
        # Bright pixels, normalised, would lose a grey level to bf16.
        with torch.autocast(pixels.device.type, enabled=False):
            half = self.stem[0](pixels.contiguous(memory_format=torch.channels_last))
        maps = [self.stem[1:](half)]
        for step in self.down:
            maps.append(step(maps[-1]))
        fine, *coarse = (project(each.permute(0, 2, 3, 1)) for project, each in zip(self.project, maps, strict=True))
        return fine.permute(0, 3, 1, 2), [each.flatten(1, 2) for each in coarse]


class Injector(nn.Module):
    """The trunk's patches look at the maps beside it; a learned gate a channel, `gate` at first, lets in what they see."""

    def __init__(self, width: int, heads: int, points: int, ratio: float, gate: float, norm_eps: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, norm_eps)
        self.token_norm = nn.LayerNorm(width, norm_eps)
        self.attention = DeformableAttention(width, heads, 3, points, ratio)
        self.gate = nn.Parameter(torch.full((width,), gate))

    def forward(
        self, patches: Float[Tensor, "B N D"], tokens: Float[Tensor, "B S D"], geometry: Geometry
    ) -> Float[Tensor, "B N D"]:
        queries, seen = self.query_norm(patches), self.token_norm(tokens)
        return patches + self.gate * self.attention(queries, seen, geometry.maps, geometry.onto_maps)


class ConvolutionFeedForward(nn.Module):
    """A feed-forward part between whose layers every map's tokens mix with their neighbours, channel by channel."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, width)
        for linear in (self.expand, self.contract):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        _begin(self.mix, 9)

    def forward(self, tokens: Float[Tensor, "B S D"], geometry: Geometry) -> Float[Tensor, "B S D"]:
        mixed = [self.mix(each).flatten(2).transpose(1, 2) for each in geometry.split(self.expand(tokens))]
        return self.contract(F.gelu(torch.cat(mixed, 1)))


class Extractor(nn.Module):
    """The maps' tokens look at the trunk's patches. `hidden`: channels of the feed-forward part; None: there is none."""

    def __init__(
        self, width: int, heads: int, points: int, ratio: float, hidden: int | None, drop_path: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, norm_eps)
        self.token_norm = nn.LayerNorm(width, norm_eps)
        self.attention = DeformableAttention(width, heads, 1, points, ratio)
        self.norm = None if hidden is None else nn.LayerNorm(width, norm_eps)
        self.feedforward = None if hidden is None else ConvolutionFeedForward(width, hidden)
        self.drop_path: nn.Module = load_timm().layers.DropPath(drop_path)

    def forward(
        self, tokens: Float[Tensor, "B S D"], patches: Float[Tensor, "B N D"], geometry: Geometry
    ) -> Float[Tensor, "B S D"]:
        queries, seen = self.query_norm(tokens), self.token_norm(patches)
        tokens = tokens + self.attention(queries, seen, [geometry.patches], geometry.onto_patches)
        if self.norm is None or self.feedforward is None:
            return tokens
        return tokens + self.drop_path(self.feedforward(self.norm(tokens), geometry))


class Adapter(Backbone):
    """A pyramid of strides 4, 8, 16 and 32 px, as wide as `trunk`, a plain ViT with patches of 16 px.

    `interactions`: groups of the trunk's blocks, first and last of each; before a group an injector hands its patches what
    is in the maps, and after it an extractor the maps what is in the patches. None: four groups of one length. `heads`,
    `points`: of all deformable attention, whose values have `value_ratio` of the width. `stem`: channels of the first
    convolutions. `feedforward_ratio`: channels within an extractor's feed-forward part, to the width; none of them has such a
    part without `convolution_ffn`. `extra_extractors`: further ones after the last group. `add_trunk`: the patches after four
    groups are added to the four maps. `gate`: what the injectors' gates begin with; the original has 0 with plain ViTs and
    1e-6 with BEiT. `drop_path`: the rate at which every extractor's feed-forward part is dropped. `norm_eps`: of every
    LayerNorm. `checkpointing`: blocks, injectors and extractors are run anew in the backward pass, which takes less memory
    and more time.

    Tokens before the patches, class and registers, go through the blocks alone.
    """

    def __init__(
        self,
        trunk: Trunk,
        interactions: tuple[tuple[int, int], ...] | None = None,
        heads: int = 6,
        value_ratio: float = 1.0,
        stem: int = 64,
        points: int = 4,
        feedforward_ratio: float = 0.25,
        convolution_ffn: bool = True,
        extra_extractors: int = 2,
        add_trunk: bool = True,
        gate: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if trunk.patch != PATCH:
            raise ValueError(
                f"adapter needs patches of {PATCH} px, and its trunk has {trunk.patch} px; give the trunk `patch: {PATCH}`, "
                "to which kernels of other sizes are resized"
            )
        self.groups = _groups(interactions, trunk.depth)
        if add_trunk and len(self.groups) != len(STRIDES):
            raise ValueError(
                f"add_trunk adds the patches after {len(STRIDES)} groups of blocks, one to a map, and interactions has "
                f"{len(self.groups)}; set add_trunk to false"
            )
        width = trunk.width
        hidden = int(width * feedforward_ratio)
        if hidden < 1:
            raise ValueError(f"feedforward_ratio {feedforward_ratio} of width {width} leaves no channel")

        def extractors(count: int) -> nn.ModuleList:
            inner = hidden if convolution_ffn else None
            return nn.ModuleList(
                Extractor(width, heads, points, value_ratio, inner, drop_path, norm_eps) for _ in range(count)
            )

        self.trunk = trunk
        self.prior = SpatialPrior(width, stem)
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.injectors = nn.ModuleList(Injector(width, heads, points, value_ratio, gate, norm_eps) for _ in self.groups)
        self.extractors = extractors(len(self.groups))
        self.extra_extractors = extractors(extra_extractors)
        self.enlarge = Doubling(width)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in STRIDES)
        self.add_trunk = add_trunk
        self.checkpointing = checkpointing
        self.channels = (width,) * len(STRIDES)
        self.strides = STRIDES
        self.mean = trunk.mean
        self.multiple = STRIDES[-1]
        self.pixels = Pixels(trunk.mean, trunk.std, self.multiple)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        pixels = fill_up(pixels, self.mean, self.multiple)
        fine, levels = self.prior(self.pixels(pixels))
        tokens = torch.cat([each + level for each, level in zip(levels, self.level_embed, strict=True)], 1)
        seen, grid = self.trunk.embed(pixels)
        geometry = Geometry.of(grid, pixels.device)
        leading, patches = seen[:, : self.trunk.prefix], seen[:, self.trunk.prefix :]
        after = []
        for (first, last), injector, extractor in zip(self.groups, self.injectors, self.extractors, strict=True):
            patches = self._run(injector, patches, tokens, geometry)
            seen = torch.cat([leading, patches], 1) if self.trunk.prefix else patches
            for index in range(first, last + 1):
                seen = self._run(self.trunk.block, index, seen, grid)
            leading, patches = seen[:, : self.trunk.prefix], seen[:, self.trunk.prefix :]
            tokens = self._run(extractor, tokens, patches, geometry)
            after.append(patches)
        for extractor in self.extra_extractors:
            tokens = self._run(extractor, tokens, patches, geometry)
        eighth, *coarse = geometry.split(tokens)
        maps = [self.enlarge(eighth) + fine, eighth, *coarse]
        if self.add_trunk:
            maps = [each + _resized(patches, grid, each) for each, patches in zip(maps, after, strict=True)]
        return [norm(each) for norm, each in zip(self.norms, maps, strict=True)]

    def _run(self, part: Callable[..., Tensor], *given: Any) -> Tensor:
        return run(part, *given, checkpointing=self.checkpointing)


def _groups(interactions: Sequence[tuple[int, int]] | None, depth: int) -> tuple[tuple[int, int], ...]:
    """First and last block of every group."""
    if interactions is None:
        length, rest = divmod(depth, 4)
        if rest or not length:
            raise ValueError(
                f"a trunk of {depth} blocks does not fall into four groups of one length; give `interactions`"
            )
        return tuple((length * group, length * (group + 1) - 1) for group in range(4))
    ends = [-1, *(last for _, last in interactions)]
    follow = all(before + 1 == first <= last for before, (first, last) in zip(ends[:-1], interactions, strict=True))
    if not follow or ends[-1] != depth - 1:
        told = [list(group) for group in interactions]
        raise ValueError(
            f"interactions {told} should be groups in a row of the trunk's blocks 0..{depth - 1}, all of them"
        )
    return tuple(interactions)


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    """A convolution of 3 x 3, its batch norm and a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    _begin(convolution, 9 * outputs)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _begin(layer: nn.Linear | nn.Conv2d, fan_out: int) -> None:
    """The first weights of a convolution of which an input reaches `fan_out` outputs."""
    nn.init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _resized(patches: Tensor, grid: Size, like: Tensor) -> Float[Tensor, "B D h w"]:
    """The map of the patches in the size of another."""
    maps = patches.transpose(1, 2).unflatten(2, grid)
    size = (like.shape[-2], like.shape[-1])
    if size == grid:
        return maps
    # Where channels lie last torch takes four times as long.
    return F.interpolate(maps.contiguous(), size=size, mode="bilinear", align_corners=False)
