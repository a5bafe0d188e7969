"""DiNAT: a pyramid whose tokens attend to their neighbours, in some blocks to near ones and in others to dilated ones.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskfirst.backbones.blocks import drop_rates, run
from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.pyramid import STRIDES
from maskfirst.backbones.timm_models import load_timm
from maskfirst.contracts import Backbone, Resizable
from maskfirst.ops.neighbourhood_attention import (
    Layout,
    layout_of_any_size,
    neighbourhood_attention,
    neighbourhood_attention_of_any_size,
)

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Design:
    """What tells one DiNAT from another, by the names of its arguments."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    kernel: int
    dilations: tuple[tuple[int, ...], ...]
    mlp_ratio: float
    layer_scale: float | None = None


_FINE, _COARSE = ((1, 16, 1), (1, 4, 1, 8)), ((1, 2, 1, 2, 1),)
_MIDDLE = (1, 2, 1, 3, 1, 4)
_T = Design(64, (3, 4, 18, 5), (2, 4, 8, 16), 7, (*_FINE, 3 * _MIDDLE, *_COARSE), 3.0)
DESIGNS = {
    "m": replace(_T, depths=(3, 4, 6, 5), dilations=(*_FINE, _MIDDLE, *_COARSE)),
    "t": _T,
    "s": replace(_T, width=96, heads=(3, 6, 12, 24), mlp_ratio=2.0),
    "b": replace(_T, width=128, heads=(4, 8, 16, 32), mlp_ratio=2.0),
    "l": Design(
        192,
        (3, 4, 18, 5),
        (6, 12, 24, 48),
        11,
        ((1, 20, 1), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), *_COARSE),
        2.0,
    ),
}
"""With the dilations of segmentation: for pictures of 512 px, and l, which is OneFormer's, for those of 640 to 1024 px."""


class NeighbourhoodAttention(nn.Module):
    """Each token attends to `kernel` x `kernel` tokens around it, `dilation` px apart.

    A map that is smaller than such a window is filled up with zeros, whose keys and values are what the layer's bias makes of
    nothing, and which are attended to like others. `layout`: of maps whose size is a symbol, None where it is a number.
    """

    def __init__(self, width: int, heads: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.dilation = dilation
        self.least = kernel * dilation
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1))
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.bias, std=0.02)
        _begin(self.qkv, self.proj)

    def forward(self, maps: Float[Tensor, "B h w C"], layout: Layout | None = None) -> Float[Tensor, "B h w C"]:
        if layout is not None:
            beyond = self.qkv.bias.unflatten(0, (3, self.heads, -1))[1:]
            return self.proj(neighbourhood_attention_of_any_size(*self._parts(maps), self.bias, layout, beyond))
        height, width = maps.shape[1:3]
        if min(height, width) < self.least:
            maps = F.pad(maps, (0, 0, 0, max(self.least - width, 0), 0, max(self.least - height, 0)))
        given = (*self._parts(maps), self.bias, self.dilation)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Scores are made anew in the backward pass: they would be many times as large as the map.
            seen = checkpoint(neighbourhood_attention, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            seen = neighbourhood_attention(*given)
        return self.proj(seen[:, :height, :width])

    def _parts(self, maps: Float[Tensor, "B h w C"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, h, w, M, D)."""
        queries, keys, values = self.qkv(maps).unflatten(-1, (3, self.heads, -1)).unbind(3)
        return queries, keys, values


class Block(nn.Module):
    """Attention among neighbours, and a feed-forward part; each of them normed before, scaled where `layer_scale` is one."""

    def __init__(self, width: int, heads: int, design: Design, dilation: int, drop_path: float) -> None:
        super().__init__()
        hidden = int(width * design.mlp_ratio)
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attention = NeighbourhoodAttention(width, heads, design.kernel, dilation)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        _begin(self.expand, self.contract)
        self.scale1, self.scale2 = (
            None if design.layer_scale is None else nn.Parameter(torch.full((width,), design.layer_scale))
            for _ in range(2)
        )
        self.drop_path: nn.Module = load_timm().layers.DropPath(drop_path)

    def forward(self, maps: Float[Tensor, "B h w C"], layout: Layout | None = None) -> Float[Tensor, "B h w C"]:
        maps = _added(maps, self.drop_path(self.attention(self.norm1(maps), layout)), self.scale1)
        return _added(maps, self.drop_path(self.contract(F.gelu(self.expand(self.norm2(maps))))), self.scale2)


class Halving(nn.Module):
    """Convolutions of 3 x 3 at every other place, nothing between them, and a norm; channels last on both sides."""

    def __init__(self, widths: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=bias) for inputs, outputs in pairwise(widths))
        )
        self.norm = nn.LayerNorm(widths[-1], NORM_EPS)

    def forward(self, maps: Float[Tensor, "B H W c"]) -> Float[Tensor, "B h w C"]:
        return self.norm(self.convolutions(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks on maps of one stride."""

    def __init__(self, entrance: Halving, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.entrance = entrance
        self.blocks = nn.ModuleList(blocks)
        self.heads, self.kernel = blocks[0].attention.heads, blocks[0].attention.kernel
        self.dilations = tuple(block.attention.dilation for block in blocks)

    def forward(self, maps: Float[Tensor, "B H W c"], checkpointing: bool) -> Float[Tensor, "B h w C"]:
        maps = self.entrance(maps)
        layouts = self._layouts(maps)
        for block, dilation in zip(self.blocks, self.dilations, strict=True):
            maps = run(block, maps, layouts.get(dilation), checkpointing=checkpointing)
        return maps

    def _layouts(self, maps: Float[Tensor, "B h w C"]) -> Mapping[int, Layout]:
        """By dilation; none where the size of maps is known, as attention lays out its tiles faster then."""
        if not any(isinstance(side, torch.SymInt) for side in maps.shape[1:3]):
            return {}
        return {each: layout_of_any_size(maps, self.heads, self.kernel, each) for each in set(self.dilations)}


class DiNAT(Backbone, Resizable):
    """A pyramid of strides 4, 8, 16 and 32 px, its widths doubling, each map normed. `model`: m, t, s, b or l.

    The others change the model; None: the model's. `width`: of the first map. `depths`, `heads`: one number a stage.
    `kernel`: side of the windows, odd. `dilations`: distances of the tokens in a window, a list a stage and a number a block;
    1 everywhere is NAT. `mlp_ratio`: the hidden width of a block's feed-forward part, to its width. `layer_scale`: what the
    scales of a block's branches begin with; without one they have none. `drop_path`: the rate at which the last block's
    branches are dropped, the first block's being 0. `checkpointing`: blocks are run anew in the backward pass, which takes
    less memory and more time.
    """

    def __init__(
        self,
        model: Literal["m", "t", "s", "b", "l"] = "t",
        width: int | None = None,
        depths: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
        kernel: int | None = None,
        dilations: tuple[tuple[int, ...], ...] | None = None,
        mlp_ratio: float | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        changes: dict[str, Any] = {
            "width": width,
            "depths": depths,
            "heads": heads,
            "kernel": kernel,
            "dilations": dilations,
            "mlp_ratio": mlp_ratio,
            "layer_scale": layer_scale,
        }
        design = replace(DESIGNS[model], **{key: value for key, value in changes.items() if value is not None})
        widths = tuple(design.width * 2**stage for stage in range(len(STRIDES)))
        _check(design, widths)
        rates = drop_rates(drop_path, design.depths)
        stages = []
        for stage, channels in enumerate(widths):
            entrance = Halving((channels // 2, channels) if stage else (3, channels // 2, channels), bias=not stage)
            steps = zip(design.dilations[stage], rates[stage], strict=True)
            blocks = [Block(channels, design.heads[stage], design, dilation, rate) for dilation, rate in steps]
            stages.append(Stage(entrance, blocks))
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(nn.LayerNorm(channels, NORM_EPS) for channels in widths)
        self.checkpointing = checkpointing
        self.channels = widths
        self.strides = STRIDES
        self.mean = mean
        self.multiple = STRIDES[-1]
        self.pixels = Pixels(mean, std, self.multiple)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        maps = self.pixels(pixels).permute(0, 2, 3, 1)
        found = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            maps = stage(maps, self.checkpointing)
            found.append(norm(maps).permute(0, 3, 1, 2))
        return found

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Tables of relative positions are resized to other windows, bicubically, as the original's are."""
        own = self.state_dict().get(name)
        if own is None or tensor.shape == own.shape:
            return tensor if own is not None else None
        if not name.endswith("attention.bias") or tensor.ndim != 3 or len(tensor) != len(own):
            return None
        resized = F.interpolate(tensor.float()[None], size=own.shape[1:], mode="bicubic", align_corners=False)
        return resized[0].to(tensor.dtype)


def _added(maps: Tensor, made: Tensor, scale: Tensor | None) -> Tensor:
    return maps + made if scale is None else torch.addcmul(maps, made, scale)


def _begin(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


def _check(design: Design, widths: Sequence[int]) -> None:
    """Raises ValueError, in one line, where numbers do not go together."""
    for key, values in (("depths", design.depths), ("heads", design.heads)):
        if len(values) != len(widths) or min(values) < 1:
            raise ValueError(f"{key} {list(values)} should be {len(widths)} numbers of at least 1, one a stage")
    if design.width % 2:
        raise ValueError(f"width {design.width} should be even, as the first convolution has half of it")
    for channels, heads in zip(widths, design.heads, strict=True):
        if channels % heads:
            raise ValueError(f"{channels} channels do not fall into {heads} heads; change width or heads")
    if not design.kernel % 2 or design.kernel < 1:
        raise ValueError(f"kernel {design.kernel} should be odd, so that a window has a middle")
    counts = tuple(len(each) for each in design.dilations)
    if counts != design.depths or min(min(each) for each in design.dilations) < 1:
        raise ValueError(
            f"dilations {[list(each) for each in design.dilations]} should be {list(design.depths)} numbers of at least 1 "
            "in a list a stage, one a block, as depths has them"
        )
