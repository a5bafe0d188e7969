"""UperNet: a pyramid's coarsest map pooled at several scales, led down to its finest one, and all maps joined to classify.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018; with the auxiliary head of Zhao et al., "Pyramid
Scene Parsing Network", CVPR 2017.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Backbone, Proposer
from maskfirst.frames import Size
from maskfirst.proposers.dense import PixelRows, one_name_each
from maskfirst.types import Batch, Proposals, Vocabulary


class ConvNorm(nn.Module):
    """A convolution without bias, its batch norm and ReLU, of one map or of several joined at the size of the first.

    In training a channel of one value alone, as a single picture has it pooled to 1 x 1, has no spread to be normalised by;
    the running statistics then take its place.
    """

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs)

    def forward(
        self, first: Float[Tensor, "B _c h w"], *others: Float[Tensor, "B _c _h _w"]
    ) -> Float[Tensor, "B D h w"]:
        return self._normed(self._joined(first, *others) if others else self.convolution(first)).relu_()

    def _joined(self, first: Tensor, *others: Tensor) -> Float[Tensor, "B D h w"]:
        weights = self.convolution.weight.split([each.shape[1] for each in (first, *others)], 1)
        mixed = F.conv2d(first, weights[0], padding=self.convolution.padding)
        return mixed + resized_convolutions(others, weights[1:], (first.shape[-2], first.shape[-1]))

    def _normed(self, mixed: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        norm = self.norm
        # Other norms are those that processes share, which see the values of all.
        if self.training and mixed[:, 0].numel() == 1 and type(norm) is nn.BatchNorm2d:
            return F.batch_norm(mixed, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return norm(mixed)


def resized_convolutions(
    maps: tuple[Float[Tensor, "B _c _h _w"], ...], weights: tuple[Float[Tensor, "D _c s s"], ...], size: Size
) -> Float[Tensor, "B D H W"]:
    """The sum of the convolutions, of odd side s and zero-padded, of each map with its weight after resizing it to `size`.

    Channels are mixed before the resizing, which commutes with it and costs a quarter where a map is half as large. Shifting
    and resizing are then one product an axis.
    """
    height, width = size
    lines, rows = [], []
    for source, weight in zip(maps, weights, strict=True):
        outputs, _, side, _ = weight.shape
        columns = _shifted_resizing(source.shape[-1], width, side, source).flatten(1)
        rows.append(_shifted_resizing(source.shape[-2], height, side, source).transpose(1, 2).flatten(1))
        tokens = source.permute(0, 2, 3, 1)
        for line in weight.permute(2, 3, 0, 1):
            mixed = F.linear(tokens, line.flatten(0, 1)).unflatten(-1, (side, outputs))
            lines.append((columns @ mixed.flatten(2, 3)).flatten(2))
    joined = torch.cat(rows, 1) @ torch.cat(lines, 1)
    return joined.unflatten(-1, (width, -1)).permute(0, 3, 1, 2)


def _shifted_resizing(length: int, goal: int, side: int, like: Tensor) -> Float[Tensor, "goal length side"]:
    """What each place of an axis of `length` gives to the place of each tap around each place of the axis resized to `goal`."""
    places = torch.eye(length, dtype=like.dtype, device=like.device)
    resizing = F.interpolate(places[None], size=goal, mode="linear", align_corners=False)[0].T
    return F.pad(resizing, (0, 0, side // 2, side // 2)).unfold(0, side, 1)


class UperNet(Proposer):
    """One competing mask a class, already named, on the grid of the backbone's finest map. Semantic only.

    `backbone`: several maps, fine to coarse. `width`: of all maps inside. `pools`: the grids, one side each, that the coarsest
    map is averaged to. `dropout`: of whole channels before the classifiers. `auxiliary_width`: of a second head, on map
    `auxiliary_tap` alone, whose guess counts `auxiliary_weight` in the loss and is made only where there is truth; None: none.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "upernet",
        "backbone": {
            "kind": "pyramid",
            "model": "swin_tiny_patch4_window7_224",
            "widths": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1],
            "heads": [1, 1, 2, 2],
            "window": 4,
        },
        "width": 16,
        "auxiliary_width": 8,
    }

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: Vocabulary,
        width: int = 512,
        pools: tuple[int, ...] = (1, 2, 3, 6),
        dropout: float = 0.1,
        auxiliary_width: int | None = 256,
        auxiliary_tap: int = 2,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        channels, strides = backbone.channels, backbone.strides
        if len(strides) < 2 or any(fine >= coarse for fine, coarse in pairwise(strides)):
            raise ValueError(
                f"upernet needs several maps, fine to coarse, and this backbone has strides {list(strides)}; "
                "`pyramid` gives such, `simple_pyramid` makes them of others"
            )
        if min(pools, default=1) < 1:
            raise ValueError(f"pools {list(pools)} are sides of grids, which must be at least 1")
        if auxiliary_width is not None and not -len(channels) <= auxiliary_tap < len(channels):
            raise ValueError(f"auxiliary_tap {auxiliary_tap}: the backbone has {len(channels)} maps")
        self.backbone = backbone
        self.pools = pools
        self.pooled = nn.ModuleList(ConvNorm(channels[-1], width, 1) for _ in pools)
        self.bottleneck = ConvNorm(channels[-1] + len(pools) * width, width, 3)
        self.laterals = nn.ModuleList(ConvNorm(inputs, width, 1) for inputs in channels[:-1])
        self.smooth = nn.ModuleList(ConvNorm(width, width, 3) for _ in channels[:-1])
        self.join = ConvNorm(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(width, len(vocabulary))
        self.auxiliary = (
            None
            if auxiliary_width is None
            else nn.Sequential(
                ConvNorm(channels[auxiliary_tap], auxiliary_width, 3),
                nn.Dropout2d(dropout),
                _classifier(auxiliary_width, len(vocabulary)),
            )
        )
        self.auxiliary_tap = auxiliary_tap
        self.auxiliary_weight = auxiliary_weight
        self.width = None
        self.tasks = frozenset({"semantic"})
        self.mean = backbone.mean
        self.multiple = backbone.multiple

    def forward(self, batch: Batch) -> Proposals:
        # Channels last, as the products over channels want them and convolutions have them fastest.
        maps = [each.contiguous(memory_format=torch.channels_last) for each in self.backbone(batch.pixels)]
        earlier: tuple[Proposals, ...] = ()
        if self.auxiliary is not None and batch.truth is not None:
            guess = self._on_canvas(self.auxiliary(maps[self.auxiliary_tap]), batch, self.auxiliary_tap)
            earlier = (Proposals(guess, competing=True, names=one_name_each(guess), weight=self.auxiliary_weight),)
        masks = self._on_canvas(self.classifier(self.dropout(self.merged(maps))), batch, 0)
        return Proposals(masks, competing=True, names=one_name_each(masks), earlier=earlier)

    def merged(self, maps: list[Float[Tensor, "B _c _h _w"]]) -> Float[Tensor, "B D h w"]:
        """All that the maps know, on the grid of the finest."""
        pooled = (mix(_averaged(maps[-1], side)) for mix, side in zip(self.pooled, self.pools, strict=True))
        levels = [lateral(each) for lateral, each in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self.bottleneck(maps[-1], *pooled))
        for index in reversed(range(len(levels) - 1)):
            size = levels[index].shape[-2:]
            levels[index] = levels[index] + F.interpolate(levels[index + 1], size, mode="bilinear", align_corners=False)
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        return self.join(*smoothed, levels[-1])

    def _on_canvas(self, masks: Tensor, batch: Batch, tap: int) -> Tensor:
        """Masks of a map's grid without what the backbone has padded a canvas by that its multiple does not divide."""
        height, width = (-(-side // self.backbone.strides[tap]) for side in batch.pixels.shape[-2:])
        return masks[..., :height, :width]


def _averaged(maps: Float[Tensor, "B C h w"], side: int) -> Float[Tensor, "B C {side} {side}"]:
    """A map averaged to a grid of `side` x `side`."""
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(maps, side)
    # Exporters know pooling to a grid for maps of one size alone.
    down, across = (_averaging(length, side, maps) for length in maps.shape[-2:])
    return down @ maps @ across.T


def _averaging(length: int, side: int, like: Tensor) -> Float[Tensor, "{side} length"]:
    """The share of each place of an axis in each of `side` averages, which overlap where `side` does not divide it."""
    cells = torch.arange(side, device=like.device)[:, None]
    places = torch.arange(length, device=like.device)
    # A cell reaches from floor(cell * length / side) to ceil((cell + 1) * length / side).
    inside = ((places + 1) * side > cells * length) & (places * side < (cells + 1) * length)
    return inside / inside.sum(1, keepdim=True).to(like.dtype)


def _classifier(width: int, classes: int) -> PixelRows:
    classifier = PixelRows(width, classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    return classifier
