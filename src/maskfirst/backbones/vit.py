"""Plain ViT from timm, opened block by block, and the maps tapped from its residual stream.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; tapped and shrunk as in SegViT (Zhang et al., 2022).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Backbone, Resizable, Trunk
from maskfirst.errors import UserError, nearest
from maskfirst.frames import Size

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def load_timm() -> Any:
    """timm, or one line that says why it cannot be imported."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch breaks its own import, and timm's with it.
        raise UserError(
            f"timm cannot be imported ({error}): torchvision must be the one built for this torch "
            f"({torch.__version__}); install both from the same index"
        ) from error
    return timm


def resize_positions(table: Float[Tensor, "1 M D"], grid: Size) -> Float[Tensor, "1 N D"]:
    """The square grid in the last rows of a position table, bicubic to `grid`; leading rows (class token) are dropped.

    Half-pixel centres, no antialias (mmseg's `resize_pos_embed`).
    """
    side = int(table.shape[1] ** 0.5)
    square = table[:, table.shape[1] - side * side :]
    if grid == (side, side):
        return square
    maps = square.transpose(1, 2).reshape(1, -1, side, side)
    return F.interpolate(maps, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class TimmViT(Trunk, Resizable):
    """A plain ViT of timm's: patch tokens only, the class token being embedded and dropped as SegViT does.

    `size`: the square picture, px, whose grid the position table has; other grids interpolate it at run time. `model`: timm's
    name, with a tag such as `.augreg_in21k_ft_in1k` to choose among its pretrained weights; `pretrained` downloads them.
    `drop_path_on`: the branches that are dropped in training, "mlp" (mmseg 0.24) or "both" (mmseg before and after).
    `final_norm`: without it `norm` is the identity and has no parameters. `norm_eps`: of every LayerNorm; None: the model's.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        model: str = "vit_base_patch16_224",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        patch: int | None = None,
        drop_path: float = 0.0,
        drop_path_on: Literal["mlp", "both"] = "both",
        final_norm: bool = True,
        norm_eps: float | None = None,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        timm = load_timm()
        known = [*timm.list_models("vit_*"), *timm.list_pretrained("vit_*")]
        if model not in known:
            raise ValueError(f"timm has no plain ViT '{model}'.{nearest(model, known)}")
        norm = None if norm_eps is None else partial(timm.layers.LayerNorm, eps=norm_eps)
        chosen: dict[str, Any] = {
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "patch_size": patch,
            "norm_layer": norm,
        }
        sides = max(size)
        self.vit: Any = timm.create_model(
            model,
            img_size=sides,
            num_classes=0,
            global_pool="",
            drop_path_rate=drop_path,
            final_norm=final_norm,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        if pretrained:
            try:
                trained = timm.create_model(model, pretrained=True, num_classes=0, global_pool="")
            except (OSError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"the pretrained weights of {model} could not be fetched ({reason}); give `weights:` instead"
                ) from error
            self._start_from(trained)
        if drop_path_on == "mlp":
            for block in self.vit.blocks:
                block.drop_path1 = nn.Identity()
        self.width = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.patch = self.vit.patch_embed.patch_size[0]
        self.mean = mean
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def _start_from(self, trained: nn.Module) -> None:
        """Takes over the weights of a ViT of another size. timm would resize the positions with other bicubic weights."""
        theirs = trained.state_dict()
        theirs["pos_embed"] = self.resize_from("vit.pos_embed", theirs["pos_embed"])
        own = self.vit.state_dict()
        if any(theirs.get(name) is None or theirs[name].shape != tensor.shape for name, tensor in own.items()):
            raise ValueError("pretrained weights are for the model as timm has it; leave out width, depth and patch")
        self.vit.load_state_dict({name: theirs[name] for name in own})

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        height, width = pixels.shape[-2:]
        pixels = (pixels - self.shift) / self.scale
        pixels = F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.vit.patch_embed.proj(pixels)
        grid = (maps.shape[-2], maps.shape[-1])
        positions = resize_positions(self.vit.pos_embed, grid)
        if self.vit.cls_token is not None:
            # The class token is a parameter that nothing reads; times zero it keeps a gradient, which several
            # processes need from every parameter, and weight decay as in the original.
            positions = positions + 0.0 * self.vit.cls_token
        return maps.flatten(2).transpose(1, 2) + positions, grid

    def block(self, index: int, tokens: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        return self.vit.blocks[index](tokens)

    def shrink_block(
        self, index: int, queries: Float[Tensor, "B M D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        block = self.vit.blocks[index]
        attention = block.attn
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
        # The norm runs anew for keys and for values as in the original, whose published multiply-adds count both;
        # it is one block, 0.01 % of the whole.
        sources = (block.norm1(queries), block.norm1(tokens), block.norm1(tokens))
        query, key, value = (
            F.linear(source, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for source, weight, bias in zip(sources, weights, biases, strict=True)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + block.drop_path1(attention.proj(seen))
        return queries + block.drop_path2(block.mlp(block.norm2(queries)))

    def norm(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.vit.norm(tokens)

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Position tables of other sizes are resized bicubically, the class row kept."""
        own = self.vit.pos_embed
        if name != "vit.pos_embed" or tensor.ndim != 3 or tensor.shape[-1] != own.shape[-1]:
            return None
        side = int(tensor.shape[1] ** 0.5)
        leading = tensor.shape[1] - side * side
        goal = int(own.shape[1] ** 0.5)
        if leading != own.shape[1] - goal * goal:
            return None
        return torch.cat([tensor[:, :leading], resize_positions(tensor.float(), (goal, goal)).to(tensor.dtype)], 1)


def _check_depths(depths: Sequence[int], trunk: Trunk) -> tuple[int, ...]:
    if not depths or any(a >= b for a, b in pairwise(depths)) or depths[0] < 0 or depths[-1] >= trunk.depth:
        raise ValueError(f"depths {list(depths)} must rise within 0..{trunk.depth - 1}, the blocks of the trunk")
    return tuple(depths)


Step = Callable[[int, Tensor, Size], tuple[Tensor, Size]]
"""Block `index` applied to tokens on their grid: the tokens and the grid after it."""


def _tapped(tokens: Tensor, grid: Size, depths: Sequence[int], step: Step) -> list[Float[Tensor, "B _c _h _w"]]:
    """The maps after the blocks `depths`, of tokens that go through all blocks up to the last of these."""
    maps = []
    for index in range(depths[-1] + 1):
        tokens, grid = step(index, tokens, grid)
        if index in depths:
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))
    return maps


class Taps(Backbone):
    """The residual stream of a plain ViT after the blocks `depths` (from 0), shallow to deep, without a norm."""

    def __init__(self, trunk: Trunk, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.trunk = trunk
        self.depths = _check_depths(depths, trunk)
        self.channels = (trunk.width,) * len(self.depths)
        self.strides = (trunk.patch,) * len(self.depths)
        self.mean = trunk.mean
        self.multiple = trunk.patch

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        def step(index: int, tokens: Tensor, grid: Size) -> tuple[Tensor, Size]:
            return self.trunk.block(index, tokens, grid), grid

        return _tapped(*self.trunk.embed(pixels), self.depths, step)


class ShrunkTaps(Backbone):
    """Taps of a plain ViT whose token grid is halved at block `shrink` (SegViT's query-down).

    The tokens of even rows and columns become that block's queries, all tokens its keys and values. No new parameters.
    """

    def __init__(self, trunk: Trunk, depths: tuple[int, ...], shrink: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.depths = _check_depths(depths, trunk)
        if not 0 < shrink <= self.depths[-1]:
            raise ValueError(f"shrink {shrink} must be a block in 1..{self.depths[-1]}, before the last tap")
        self.shrink = shrink
        self.channels = (trunk.width,) * len(self.depths)
        self.strides = tuple(trunk.patch if depth < shrink else 2 * trunk.patch for depth in self.depths)
        self.mean = trunk.mean
        self.multiple = trunk.patch

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        def step(index: int, tokens: Tensor, grid: Size) -> tuple[Tensor, Size]:
            if index != self.shrink:
                return self.trunk.block(index, tokens, grid), grid
            even = tokens.unflatten(1, grid)[:, ::2, ::2]
            return self.trunk.shrink_block(index, even.flatten(1, 2), tokens), (even.shape[1], even.shape[2])

        return _tapped(*self.trunk.embed(pixels), self.depths, step)
