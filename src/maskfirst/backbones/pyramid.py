"""Pyramid: maps of strides 4, 8, 16 and 32 px of one of timm's hierarchical networks, Swin, ConvNeXt, ResNet and others.

Liu et al., "Swin Transformer", 2021; Liu et al., "A ConvNet for the 2020s", 2022; He et al., "Deep Residual Learning", 2016.
"""

from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.swin import SwinBlock
from maskfirst.backbones.timm_models import create, pretrained_model, take_over
from maskfirst.contracts import Backbone, Resizable

STRIDES = (4, 8, 16, 32)


class FrozenNorm(nn.Module):
    """A batch norm whose statistics and scales are constants, by the same names."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, tensor in norm.state_dict().items():
            if name != "num_batches_tracked":
                self.register_buffer(name, tensor.clone())
        self.eps = norm.eps

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + self.eps).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return torch.addcmul(shift[:, None, None], maps, scale[:, None, None])


def _freeze_norms(trunk: nn.Module) -> None:
    for place, norm in list(trunk.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if type(norm) is not nn.BatchNorm2d:
            # Such as timm's BatchNormAct2d, which has the activation within.
            raise ValueError(f"freeze_norms is for plain batch norms, and {place} is a {type(norm).__name__}")
        trunk.set_submodule(place, FrozenNorm(norm))


class Pyramid(Backbone, Resizable):
    """The last map of each stride of timm's `model`, which may have any size of picture.

    `widths`, `depths`, `heads`: one a stage, and `window`, tokens, where the model has such (Swin: all, its widths doubling;
    ConvNeXt: widths and depths); None: the model's. `norms`: a LayerNorm of its own on each map, eps `norm_eps`, as dense
    prediction gives Swin and ConvNeXt. `freeze_norms`: batch norms keep their statistics and scales, as in small batches.
    `pretrained` downloads timm's weights; a tag such as `.ms_in22k` chooses among them.
    """

    def __init__(
        self,
        model: str = "swin_tiny_patch4_window7_224",
        widths: tuple[int, ...] | None = None,
        depths: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
        window: int | None = None,
        drop_path: float = 0.0,
        norms: bool = True,
        norm_eps: float = 1e-5,
        freeze_norms: bool = False,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {"depths": depths, "num_heads": heads, "window_size": window}
        if model.startswith("swin_"):
            settings |= {"embed_dim": widths and widths[0], "strict_img_size": False, "always_partition": True}
        else:
            settings |= {"dims": widths}
        trunk = create(model, "model", "*", drop_path_rate=drop_path, **settings)
        if pretrained:
            own = trunk.state_dict()
            take_over(
                trunk,
                pretrained_model(model).state_dict(),
                lambda name, tensor: _resized(name, tensor, own[name]),
                "leave out widths, depths and heads",
            )
        reductions = [info["reduction"] for info in trunk.feature_info]
        self.taps = [index for index, stride in enumerate(reductions) if stride in STRIDES]
        if tuple(reductions[index] for index in self.taps) != STRIDES:
            raise ValueError(f"{model} has maps of strides {reductions}, and a pyramid needs {list(STRIDES)}")
        self.channels = tuple(trunk.feature_info[index]["num_chs"] for index in self.taps)
        if widths is not None and widths != self.channels:
            raise ValueError(f"widths {list(widths)} are not what {model} makes of them, {list(self.channels)}")
        trunk.prune_intermediate_layers(self.taps, prune_norm=True, prune_head=True)
        if model.startswith("swin_"):
            for index, stage in enumerate(trunk.layers):
                # The first two stages keep most for the backward pass, and are a third of the work or less.
                stage.blocks = nn.Sequential(*(SwinBlock(block, again=index < 2) for block in stage.blocks))
        if freeze_norms:
            _freeze_norms(trunk)
        self.trunk = trunk
        self.norms = nn.ModuleList(nn.LayerNorm(width, norm_eps) for width in self.channels) if norms else None
        self.strides = STRIDES
        self.mean = mean
        self.multiple = STRIDES[-1]
        self.pixels = Pixels(mean, std, self.multiple)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        maps = self.trunk.forward_intermediates(
            self.pixels(pixels), indices=self.taps, norm=False, intermediates_only=True
        )
        if self.norms is None:
            return maps
        return [
            norm(tapped.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, tapped in zip(self.norms, maps, strict=True)
        ]

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Swin's tables of relative positions are resized to other windows, bicubically."""
        own = self.state_dict().get(name)
        return None if own is None else _resized(name, tensor, own)


def _resized(name: str, tensor: Tensor, own: Tensor) -> Tensor | None:
    """A table (rows, heads) of a square window's relative positions for `own`'s window; other tensors as they are.

    None where the number of heads or the kind of tensor does not allow it.
    """
    if tensor.shape == own.shape:
        return tensor
    if not name.endswith("relative_position_bias_table") or tensor.ndim != 2 or tensor.shape[1] != own.shape[1]:
        return None
    source, goal = isqrt(len(tensor)), isqrt(len(own))
    if source * source != len(tensor):
        return None
    maps = tensor.float().T.unflatten(1, (source, source))[None]
    resized = F.interpolate(maps, size=(goal, goal), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(tensor.dtype)
