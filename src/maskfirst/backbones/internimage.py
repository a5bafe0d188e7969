"""InternImage: a pyramid whose blocks look around by DCNv3 where those of a transformer attend.

Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskfirst.backbones.blocks import drop_rates, run
from maskfirst.backbones.deformable import at_least_single, softmax_of_few
from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.pyramid import STRIDES
from maskfirst.backbones.timm_models import load_timm
from maskfirst.contracts import Backbone
from maskfirst.ops.dcnv3 import Window, dcnv3

NORM_EPS = 1e-6
POST_NORMED = 2
"""The stage, counted from 0, that may have norms between its blocks."""
Norms = Literal["before", "after", "both"]


@dataclass(frozen=True)
class Design:
    """What tells one InternImage from another, by the names of its arguments."""

    width: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    norms: Norms
    layer_scale: float | None = None
    offset_scale: float = 1.0
    kernel: int = 3
    centre_scale: bool = False
    post_norms: tuple[int, ...] = ()


_H = Design(320, (6, 6, 32, 6), (10, 20, 40, 80), "both", None, 1.0, 5, True, (5, 11, 17, 23, 29))
DESIGNS = {
    "t": Design(64, (4, 4, 18, 4), (4, 8, 16, 32), "before", 1.0),
    "s": Design(80, (4, 4, 21, 4), (5, 10, 20, 40), "after", 1.0),
    "b": Design(112, (4, 4, 21, 4), (7, 14, 28, 56), "after", 1.0),
    "l": Design(160, (5, 5, 22, 5), (10, 20, 40, 80), "after", 1.0, 2.0),
    "xl": Design(192, (5, 5, 24, 5), (12, 24, 48, 96), "after", 1.0, 2.0),
    "h": _H,
    "g": replace(
        _H,
        width=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        norms="after",
        post_norms=(5, 11, 17, 23, 29, 35, 41, 47),
    ),
}
"""As segmentation has them, which begins layer scales with 1; all but the widths is also what classification has."""


class DCNv3(nn.Module):
    """Each token sums 9 tokens around itself, each of `groups` of channels in its own way, and of its own choice.

    Where it looks, and by which weights, follows from a depthwise convolution of `kernel` x `kernel`, normed. `centre_scale`:
    so does how much of its own value each group keeps. Places and sums are computed in single precision at least, whatever
    the autocast.
    """

    def __init__(self, width: int, groups: int, kernel: int, offset_scale: float, centre_scale: bool) -> None:
        super().__init__()
        self.groups = groups
        self.window = Window(offset_scale=offset_scale)
        points = self.window.kernel**2
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.offsets = nn.Linear(width, groups * points * 2)
        self.weights = nn.Linear(width, groups * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.centre = nn.Linear(width, groups) if centre_scale else None
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.offsets, self.weights, *([self.centre] if self.centre is not None else ())):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, maps: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        value = self.value(maps)
        around = nn.functional.gelu(self.norm(self.depthwise(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
        with torch.autocast(maps.device.type, enabled=False):
            chooser = around.to(self.offsets.weight.dtype)
            given = (at_least_single(value), self.offsets(chooser), self.weights(chooser))
            if torch.is_grad_enabled():
                # Places and shares of all points are made anew in the backward pass instead of being kept.
                seen = checkpoint(self._look, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                seen = self._look(*given)
        seen = seen.to(value.dtype)
        if self.centre is not None:
            share = self.centre(around).sigmoid()[..., None]
            own, others = (each.unflatten(-1, (self.groups, -1)) for each in (value, seen))
            seen = torch.lerp(others, own, share.to(own.dtype)).flatten(-2)
        return self.output(seen)

    def _look(self, value: Tensor, offsets: Tensor, scores: Tensor) -> Float[Tensor, "B h w C"]:
        offsets = at_least_single(offsets).unflatten(-1, (self.groups, -1, 2))
        shares = softmax_of_few(at_least_single(scores).unflatten(-1, (self.groups, -1)))
        return dcnv3(value.unflatten(-1, (self.groups, -1)), offsets, shares, self.window)


class Branch(nn.Module):
    """A map and what `part` makes of it, normed before or after or both, by a learned `scale` a channel where there is one."""

    def __init__(self, part: nn.Module, width: int, norms: Norms, scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.before = nn.Identity() if norms == "after" else nn.LayerNorm(width, NORM_EPS)
        self.part = part
        self.after = nn.Identity() if norms == "before" else nn.LayerNorm(width, NORM_EPS)
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))
        self.drop_path: nn.Module = load_timm().layers.DropPath(drop_path)

    def forward(self, maps: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        made = self.drop_path(self.after(self.part(self.before(maps))))
        return maps + made if self.scale is None else torch.addcmul(maps, made, self.scale)


class Block(nn.Module):
    """A branch that looks around, and one in which each token is by itself."""

    def __init__(self, width: int, groups: int, hidden: int, design: Design, drop_path: float) -> None:
        super().__init__()
        expand, contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for linear in (expand, contract):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        around = DCNv3(width, groups, design.kernel, design.offset_scale, design.centre_scale)
        self.look = Branch(around, width, design.norms, design.layer_scale, drop_path)
        feedforward = nn.Sequential(expand, nn.GELU(), contract)
        self.mix = Branch(feedforward, width, design.norms, design.layer_scale, drop_path)

    def forward(self, maps: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        return self.mix(self.look(maps))


class Halving(nn.Module):
    """A convolution of 3 x 3 at every other place, and a norm; channels last on both sides."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=bias)
        self.norm = nn.LayerNorm(outputs, NORM_EPS)

    def forward(self, maps: Float[Tensor, "B H W c"]) -> Float[Tensor, "B h w C"]:
        return self.norm(self.convolution(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks on maps of one stride. `post_norms`: a norm after each block of these indices; `norm`: one after the last."""

    def __init__(
        self, entrance: nn.Module, blocks: Sequence[Block], width: int, post_norms: Sequence[int], norm: bool
    ) -> None:
        super().__init__()
        # In the order in which they run: layer decay goes by it.
        self.entrance = entrance
        self.blocks = nn.ModuleList(blocks)
        self.after = {index: place for place, index in enumerate(post_norms)}
        self.post_norms = nn.ModuleList(nn.LayerNorm(width, NORM_EPS) for _ in post_norms)
        self.norm = nn.LayerNorm(width, NORM_EPS) if norm else nn.Identity()

    def forward(self, maps: Float[Tensor, "B H W c"], checkpointing: bool) -> Float[Tensor, "B h w C"]:
        maps = self.entrance(maps)
        for index, block in enumerate(self.blocks):
            maps = run(block, maps, checkpointing=checkpointing)
            if index in self.after:
                maps = self.post_norms[self.after[index]](maps)
        return self.norm(maps)


class InternImage(Backbone):
    """A pyramid of strides 4, 8, 16 and 32 px, its widths doubling. `model`: t, s, b, l, xl, h or g.

    The others change the model; None: the model's. `width`: of the first map. `depths`, `groups`: blocks, and groups of
    channels that look around by themselves, one number a stage. `norms`: where in a block's branches. `layer_scale`: what the
    branches' scales begin with; where the model has none, a number gives it some. `offset_scale`: of the distances of the
    points that DCNv3 reads. `kernel`: side of its depthwise convolution. `centre_scale`: each group keeps a share of its own
    value. `post_norms`: blocks of the third stage that a norm follows. `mlp_ratio`: the hidden width of a block's second
    branch, to its width. `drop_path`: the rate at which the last block's branches are dropped, the first block's being 0.
    `checkpointing`: blocks are run anew in the backward pass, which takes less memory and more time.
    """

    def __init__(
        self,
        model: Literal["t", "s", "b", "l", "xl", "h", "g"] = "t",
        width: int | None = None,
        depths: tuple[int, ...] | None = None,
        groups: tuple[int, ...] | None = None,
        norms: Norms | None = None,
        layer_scale: float | None = None,
        offset_scale: float | None = None,
        kernel: int | None = None,
        centre_scale: bool | None = None,
        post_norms: tuple[int, ...] | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        changes: dict[str, Any] = {
            "width": width,
            "depths": depths,
            "groups": groups,
            "norms": norms,
            "layer_scale": layer_scale,
            "offset_scale": offset_scale,
            "kernel": kernel,
            "centre_scale": centre_scale,
            "post_norms": post_norms,
        }
        design = replace(DESIGNS[model], **{key: value for key, value in changes.items() if value is not None})
        widths = tuple(design.width * 2**stage for stage in range(len(STRIDES)))
        _check(design, widths)
        stages = []
        rates = drop_rates(drop_path, design.depths)
        for stage, (channels, parts, some) in enumerate(zip(widths, design.groups, rates, strict=True)):
            entrance = (
                Halving(channels // 2, channels, bias=False)
                if stage
                else nn.Sequential(Halving(3, channels // 2, True), nn.GELU(), Halving(channels // 2, channels, True))
            )
            hidden = int(channels * mlp_ratio)
            blocks = [Block(channels, parts, hidden, design, rate) for rate in some]
            between = design.post_norms if stage == POST_NORMED else ()
            stages.append(Stage(entrance, blocks, channels, between, design.norms != "after" or design.centre_scale))
        self.stages = nn.ModuleList(stages)
        self.checkpointing = checkpointing
        self.channels = widths
        self.strides = STRIDES
        self.mean = mean
        self.multiple = STRIDES[-1]
        self.pixels = Pixels(mean, std, self.multiple)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        maps = self.pixels(pixels).permute(0, 2, 3, 1)
        found = []
        for stage in self.stages:
            maps = stage(maps, self.checkpointing)
            found.append(maps.permute(0, 3, 1, 2))
        return found


def _check(design: Design, widths: Sequence[int]) -> None:
    """Raises ValueError, in one line, where numbers do not go together."""
    for key, values in (("depths", design.depths), ("groups", design.groups)):
        if len(values) != len(widths) or min(values) < 1:
            raise ValueError(f"{key} {list(values)} should be {len(widths)} numbers of at least 1, one a stage")
    if design.width % 2:
        raise ValueError(f"width {design.width} should be even, as the stem has half of it")
    for channels, parts in zip(widths, design.groups, strict=True):
        if channels % parts:
            raise ValueError(f"{channels} channels do not fall into {parts} groups; change width or groups")
    if not design.kernel % 2:
        raise ValueError(f"kernel {design.kernel} should be odd, so that it has a centre")
    off = [index for index in design.post_norms if not 0 <= index < design.depths[POST_NORMED]]
    if off:
        raise ValueError(f"post_norms {off}: the third stage has blocks 0..{design.depths[POST_NORMED] - 1}")
