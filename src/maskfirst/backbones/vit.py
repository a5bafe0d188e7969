"""Plain ViT from timm, opened block by block, and the maps tapped from its residual stream.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; tapped and shrunk as in SegViT (Zhang et al., 2022). DINOv2 (Oquab
et al., 2023) adds register tokens and scaled layers, DINOv3 (Siméoni et al., 2025) positions that turn queries and keys.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.stem_vit import NormConv
from maskfirst.backbones.swin import windows
from maskfirst.backbones.timm_models import create, load_timm, pretrained_model, resize_kernel, take_over
from maskfirst.contracts import Backbone, Receiver, Resizable, Trunk
from maskfirst.errors import UserError
from maskfirst.frames import Size
from maskfirst.ops.sine_positions import code


def resize_positions(
    table: Float[Tensor, "1 M D"], grid: Size, antialias: bool = False, offset: float | None = None
) -> Float[Tensor, "1 N D"]:
    """The square grid in the last rows of a position table, bicubic to `grid`; leading rows (class token) are dropped.

    Half-pixel centres. Without antialias as mmseg's `resize_pos_embed`, with it as DINOv2 with registers; even where
    nothing shrinks, the two have other weights. `offset`: the grid is taken for so much larger, and is resized to even where
    it is the table's own, as DINO and DINOv2 without registers do with 0.1.
    """
    side = int(table.shape[1] ** 0.5)
    square = table[:, table.shape[1] - side * side :]
    if grid == (side, side) and offset is None:
        return square
    maps = square.transpose(1, 2).reshape(1, -1, side, side)
    if offset is None:
        maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    else:
        factors = [(length + offset) / side for length in grid]
        maps = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False, antialias=antialias)
    return maps.flatten(2).transpose(1, 2)


def rotations(periods: Float[Tensor, " P"], grid: Size, leading: int, zoom: float = 1.0) -> Float[Tensor, "N 8*P"]:
    """Sines, then cosines, by which DINOv3 turns the 4P channels of a head, for `leading` tokens and the grid's patches.

    The leading ones stay as they are. A patch's centre lies in -1..1 on each axis, times `zoom`; the first P of the pairs
    (channel c with c + 2P) turn by its y, the others by its x, once in each of `periods`.
    """
    height, width = grid
    steps = (torch.arange(side, device=periods.device).add(0.5).mul(2 / side).sub(1) for side in grid)
    rows, columns = (2 * math.pi * zoom * step[:, None] / periods for step in steps)
    parts = []
    for turn, idle in ((torch.sin, 0.0), (torch.cos, 1.0)):
        down = turn(rows)[:, None].expand(-1, width, -1)
        across = turn(columns)[None].expand(height, -1, -1)
        half = torch.cat([down, across], -1).flatten(0, 1)
        parts.append(F.pad(half.repeat(1, 2), (0, 0, leading, 0), value=idle))
    return torch.cat(parts, -1)


class TimmViT(Trunk, Resizable, Receiver):
    """A plain ViT of timm's, those of DINOv2 and DINOv3 among them.

    `size`: the square picture, px, whose grid the position table has; other grids interpolate it at run time. `model`: timm's
    name, with a tag such as `.augreg_in21k_ft_in1k` to choose among its pretrained weights; `pretrained` downloads them.
    `drop_path_on`: the branches that are dropped in training, "mlp" (mmseg 0.24) or "both" (mmseg before and after).
    `final_norm`: without it `norm` is the identity and has no parameters. `norm_eps`: of every LayerNorm; None: the model's.
    `layer_scale`: what the scales of its branches begin with; it adds them where the model has none. None: the model's,
    which are 1e-5 in DINOv2 and DINOv3 and for pretrained weights only. `class_token`: whether it and the registers lead the
    patches through the blocks, or are embedded and dropped as SegViT does; None: where there are registers; "absent": the
    class token is no parameter, and the position table has no row for it, as in ViT-Adapter; registers lead the patches then.
    `interpolate_offset`: see `resize_positions`; 0.1 is DINOv2's own. `windowed`: blocks whose patches look
    only at those of their window of `window` x `window` patches, which is filled up with zeros at the border. `zoom`: in
    training the coordinates of DINOv3's patches are multiplied by a factor drawn log-uniformly from 1/zoom..zoom for every
    batch, as its own training does with 2; None: never. `start`: how a model begins that nobody has trained: as timm's, or
    "alike", with sines for positions and with queries and keys alike, so that tokens look at what is near and like them; it
    learns from few pictures in a fraction of the steps (Trockman and Kolter, "Mimetic Initialization of Self-Attention
    Layers", 2023). `stem`: channels of the first of the 3x3 convolutions that take the place of the patch embedding, for
    training from scratch (Xiao et al., "Early Convolutions Help Transformers See Better", 2021); None: none.
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
        layer_scale: float | None = None,
        class_token: bool | Literal["absent"] | None = None,
        interpolate_offset: float | None = None,
        window: int | None = None,
        windowed: tuple[int, ...] = (),
        zoom: float | None = None,
        start: Literal["timm", "alike"] = "timm",
        stem: int | None = None,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        timm = load_timm()
        self.vit: Any = create(
            model,
            "plain ViT",
            "vit_*",
            "deit_*",
            img_size=max(size),
            global_pool="",
            drop_path_rate=drop_path,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            patch_size=patch,
            norm_layer=None if norm_eps is None else partial(timm.layers.LayerNorm, eps=norm_eps),
            init_values=layer_scale,
            class_token=False if class_token == "absent" else None,
        )
        self.rotary = isinstance(self.vit, timm.models.eva.Eva)
        if type(self.vit) not in (timm.models.vision_transformer.VisionTransformer, timm.models.eva.Eva) or (
            self.rotary and not isinstance(self.vit.rope, timm.layers.RotaryEmbeddingDinoV3)
        ):
            raise ValueError(
                f"'{model}' has positions of a kind that this trunk does not know; take a DINOv3 or a plain ViT"
            )
        if not final_norm:
            self.vit.norm = nn.Identity()
        registers = self.vit.reg_token is not None
        if class_token == "absent" and self.rotary:
            raise ValueError(f"class_token absent: '{model}' turns what follows its class token; leave the key out")
        if interpolate_offset is not None and self.vit.pos_embed is None:
            raise ValueError(f"interpolate_offset: '{model}' has no position table to resize; leave the key out")
        if stem is not None:
            self.vit.patch_embed.proj = _stem(stem, self.vit.patch_embed.patch_size[0], self.vit.embed_dim)
        if start == "alike" and self.rotary:
            raise ValueError(f"start alike: '{model}' has no position table to begin with sines; leave the key out")
        if start == "alike":
            _begin_alike(self.vit)
        self.interpolate_offset = interpolate_offset
        self.antialias = registers and interpolate_offset is None
        trained = pretrained_model(model, global_pool="").state_dict() if pretrained else {}
        if pretrained:
            # Scales that the model has not begin as they were told to.
            scales = {name: tensor for name, tensor in self.vit.state_dict().items() if name.endswith(".gamma")}
            take_over(
                self.vit,
                scales | trained,
                # timm would resize the positions with other bicubic weights.
                lambda name, tensor: self.resize_from(f"vit.{name}", tensor),
                "leave out width and depth",
            )
        if drop_path_on == "mlp":
            for block in self.vit.blocks:
                block.drop_path1 = nn.Identity()
        self.width = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.patch = self.vit.patch_embed.patch_size[0]
        leading = registers if class_token in (None, "absent") else class_token is True
        if self.rotary and not leading:
            raise ValueError(
                f"class_token false: '{model}' turns what follows its class token and registers; keep them"
            )
        if zoom is not None and (zoom < 1 or not self.rotary):
            raise ValueError(f"zoom {zoom} is for the coordinates of DINOv3, and at least 1")
        self.prefix = self.vit.num_prefix_tokens if leading else 0
        self.window = _check_windows(window, windowed, self.depth)
        self.windowed = windowed
        if windowed and self.prefix:
            raise ValueError(f"windowed: windows are of patches, and '{model}' has tokens before them in its blocks")
        self.zoom = zoom
        self.zoomed = 1.0
        self.mean, self.std = mean, std
        self.pixels = Pixels(mean, std, self.patch)
        self.receive({f"vit.{name}": tensor for name, tensor in trained.items()})

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        maps = self.vit.patch_embed.proj(self.pixels(pixels))
        grid = (maps.shape[-2], maps.shape[-1])
        patches = maps.flatten(2).transpose(1, 2)
        table: Tensor | None = self.vit.pos_embed
        positions = None if table is None else resize_positions(table, grid, self.antialias, self.interpolate_offset)
        special = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        if self.prefix:
            leading = torch.cat(special, 1)
            if table is not None and not self.vit.no_embed_class:
                leading = leading + table[:, : self.prefix]
            if positions is not None:
                patches = patches + positions
            self.zoomed = self._draw_zoom()
            return torch.cat([leading.expand(pixels.shape[0], -1, -1), patches], 1), grid
        for token in special:
            # They are parameters that nothing reads; times zero they keep a gradient, which several processes need from
            # every parameter, and weight decay as in the original.
            positions = (0.0 if positions is None else positions) + 0.0 * token.sum(1, keepdim=True)
        return patches if positions is None else patches + positions, grid

    def _draw_zoom(self) -> float:
        """What multiplies the coordinates in the blocks until the next picture is embedded."""
        if self.zoom is None or not self.training:
            return 1.0
        most = math.log(self.zoom)
        return torch.empty(1).uniform_(-most, most).exp().item()

    def block(
        self,
        index: int,
        tokens: Float[Tensor, "B N D"],
        grid: Size,
        mask: Bool[Tensor, "B N N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        block, seen = self.vit.blocks[index], None if mask is None else mask[:, None]
        if index in self.windowed:
            if mask is not None or tokens.shape[1] != grid[0] * grid[1]:
                raise UserError(f"block {index} looks through windows, at patches alone; leave it out of `windowed`")
            tokens = tokens + block.drop_path1(block.ls1(self._look_around(block.attn, block.norm1(tokens), grid)))
            return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        if not self.rotary:
            return block(tokens, attn_mask=seen)
        # timm leaves the first tokens as they are, as many as its own prefix has, and turns all others.
        leading = tokens.shape[1] - grid[0] * grid[1] - self.vit.num_prefix_tokens
        turns = rotations(self.vit.rope.periods, grid, leading, self.zoomed)
        return block(tokens, rope=turns, attn_mask=seen)

    def _look_around(self, attention: Any, tokens: Tensor, grid: Size) -> Float[Tensor, "B N D"]:
        """Attention within windows (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022)."""
        side, (height, width) = self.window, grid
        # Padded after the projection, so that keys and values there are 0 and not its bias.
        below, beside = (-(-length // side) * side - length for length in grid)
        maps = F.pad(attention.qkv(tokens).unflatten(1, grid), (0, 0, 0, beside, 0, below))
        inside = windows(maps, (side, side))
        query, key, value = (
            each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for each in inside.flatten(0, 2).flatten(1, 2).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        maps = seen.view(*inside.shape[:-1], -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return attention.proj(maps[:, :height, :width].flatten(1, 2))

    def shrink_block(
        self, index: int, queries: Float[Tensor, "B M D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        if self.rotary:
            raise UserError("a DINOv3 cannot be shrunk, as its blocks turn tokens by their places; take another trunk")
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
        queries = queries + block.drop_path1(block.ls1(attention.proj(seen)))
        return queries + block.drop_path2(block.ls2(block.mlp(block.norm2(queries))))

    def norm(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.vit.norm(tokens)

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Position tables are resized bicubically, the class row kept where there is one here; patch kernels as FlexiViT's."""
        if name == "vit.patch_embed.proj.weight":
            return resize_kernel(tensor, self.vit.patch_embed.proj.weight)
        own = self.vit.pos_embed
        if name != "vit.pos_embed" or own is None or tensor.ndim != 3 or tensor.shape[-1] != own.shape[-1]:
            return None
        side = int(tensor.shape[1] ** 0.5)
        goal = int(own.shape[1] ** 0.5)
        leading = own.shape[1] - goal * goal
        if leading not in (0, tensor.shape[1] - side * side):
            return None
        positions = resize_positions(tensor.float(), (goal, goal), self.antialias).to(tensor.dtype)
        return torch.cat([tensor[:, :leading], positions], 1)

    @torch.no_grad()
    def receive(self, tensors: Mapping[str, Tensor]) -> Collection[str]:
        """A table's row for the class token is kept as `class_position`, or added to the token where there is no place for it.

        DINOv2's own tables have that row whether there are registers or not, timm's only where there are none.
        """
        table, own = tensors.get("vit.pos_embed"), self.vit.pos_embed
        if table is None or own is None or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
            return ()
        row = table[0, 0] if table.shape[1] == isqrt(table.shape[1]) ** 2 + 1 else None
        token, theirs = self.vit.cls_token, tensors.get("vit.cls_token")
        if token is None or not self.prefix:
            self.class_position = None if row is None else row.to(own, copy=True)
            self.remark = (
                "they have no position of a class token, which is 0 where it is asked for" if row is None else None
            )
        elif row is not None and self.vit.no_embed_class and theirs is not None and theirs.shape == token.shape:
            token.copy_(theirs + row)
        return ()


def _stem(channels: int, patch: int, width: int) -> nn.Sequential:
    """3x3 convolutions of stride 2, each of twice the channels of the one before and the last of `width`."""
    halvings = patch.bit_length() - 1
    if patch != 2**halvings or patch < 4:
        raise ValueError(f"stem: patches of {patch} px are not made by halving; take a model with patches of 16 or 8")
    widths = [3, *(channels * 2**place for place in range(halvings - 1))]
    convolutions = [part for pair in pairwise(widths) for part in (NormConv(*pair, 2), nn.ReLU())]
    return nn.Sequential(*convolutions, nn.Conv2d(widths[-1], width, 3, 2, 1))


@torch.no_grad()
def _begin_alike(vit: Any) -> None:
    """Sines as positions of the patches, and queries and keys as the same random rotation of what they are made from."""
    patches = vit.pos_embed[:, vit.pos_embed.shape[1] - vit.patch_embed.num_patches :]
    patches.copy_(code(_centers(vit.patch_embed.grid_size), vit.embed_dim))
    for block in vit.blocks:
        queries, keys, _ = block.attn.qkv.weight.chunk(3)
        nn.init.normal_(queries, std=vit.embed_dim**-0.5)
        keys.copy_(queries)


def _centers(grid: Size) -> Float[Tensor, "N 2"]:
    """(y, x) of the middles of a grid's cells, row by row, whose sides are -1..1."""
    y, x = ((2 * torch.arange(count) + 1) / count - 1 for count in grid)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def _check_windows(window: int | None, windowed: Sequence[int], depth: int) -> int:
    """The side of the windows; 0 where there are none."""
    if windowed and window is None:
        raise ValueError("windowed: the side of the windows is missing; give `window` in patches")
    if window is not None and (window < 1 or not windowed):
        raise ValueError(f"window {window} should be at least 1 patch, and `windowed` say which blocks have it")
    if any(not 0 <= index < depth for index in windowed):
        raise ValueError(f"windowed {list(windowed)} should be blocks, 0..{depth - 1}")
    return window or 0


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
            patches = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
            maps.append(patches.transpose(1, 2).unflatten(2, grid))
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
        if trunk.prefix:
            raise ValueError(
                "a grid of patches is shrunk, without tokens before it; set the trunk's class_token to false"
            )
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
