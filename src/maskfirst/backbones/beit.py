"""BEiT: a plain ViT whose patches know each other's relative places from a table of biases in every block; any grid of them.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022; BEiT v2 (Peng et al., 2022) is the same network. Tables are
carried to other windows as ViT-Adapter does (Chen et al., 2023).
"""

from functools import partial
from math import isqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from maskfirst.backbones.timm_models import create, load_timm, pretrained_model, resize_kernel, take_over
from maskfirst.contracts import Resizable, Trunk
from maskfirst.errors import UserError
from maskfirst.frames import Size

TABLE = "relative_position_bias_table"
EXTRA = 3
"""Last rows of a table: from the class token to a patch, from a patch to the class token, and from that to itself."""


def geometric_places(count: int, goal: int) -> tuple[float, np.ndarray]:
    """The ratio of a progression, and where it puts `count` relative places (odd, 0 amid them) on an axis of `goal`.

    Steps from the middle outwards grow by the ratio, so that the outermost reach the ends: near places stay as they were
    learnt, far ones are stretched. The ratio is found by bisection, and is 1.01 at least.
    """
    steps, low, high = count // 2, 1.01, 1.5
    ratio = high
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > goal // 2:
            high = ratio
        else:
            low = ratio
    away = np.cumsum(ratio ** np.arange(steps))
    return ratio, np.concatenate([-away[::-1], [0.0], away])


def geometric_table(table: Float[Tensor, "R M"], window: Size) -> Float[Tensor, "S M"]:
    """The biases of M heads in a square window of several patches, carried to `window` by a spline through geometric places.

    The last three rows are kept. Raises ValueError where the table is of no such window.
    """
    side = _side(table)
    if side == 0:
        raise ValueError(f"a table of {len(table)} rows is of no square window of several patches")
    goals = [2 * length - 1 for length in window]
    if goals == [side, side]:
        return table
    down, across = (geometric_places(side, goal)[1] for goal in goals)
    rows, columns = (np.arange(goal) - goal // 2 for goal in goals)
    degree = min(3, side - 1)
    carried = [
        # Beyond the outermost places it stays as it is there.
        RectBivariateSpline(down, across, head.reshape(side, side), kx=degree, ky=degree, s=0)(rows, columns).reshape(
            -1
        )
        for head in table[:-EXTRA].double().numpy(force=True).T
    ]
    return torch.cat([torch.from_numpy(np.stack(carried, -1)).to(table), table[-EXTRA:]])


def _side(table: Tensor) -> int:
    """Relative places on an axis of the square window that a table may be of; 0 where there is none, or only one of them."""
    count = max(len(table) - EXTRA, 0)
    side = isqrt(count)
    return side if side * side == count and side % 2 == 1 and side > 1 else 0


def bicubic_table(table: Float[Tensor, "R M"], window: Size, grid: Size) -> Float[Tensor, "S M"]:
    """The biases of `window` resized to those of `grid`, with half-pixel centres; the last three rows are kept."""
    if grid == window:
        return table
    here, there = ((2 * height - 1, 2 * width - 1) for height, width in (window, grid))
    maps = table[:-EXTRA].T.unflatten(1, here)[None]
    resized = F.interpolate(maps, size=there, mode="bicubic", align_corners=False)
    return torch.cat([resized[0].flatten(1).T, table[-EXTRA:]])


def table_rows(grid: Size, device: torch.device | None = None) -> Int32[Tensor, "N N"]:
    """The row of a table of `grid` for the token of a row here that looks at that of a column; the class token comes first."""
    height, width = grid
    y, x = (torch.arange(side, dtype=torch.int32, device=device) for side in grid)
    down = (y[:, None] - y + height - 1) * (2 * width - 1)
    across = x[:, None] - x + width - 1
    patches = (down[:, None, :, None] + across[None, :, None]).flatten(2).flatten(0, 1)
    rows = F.pad(patches, (1, 0, 1, 0))
    first = (2 * height - 1) * (2 * width - 1)
    rows[0, 1:], rows[1:, 0], rows[0, 0] = first, first + 1, first + 2
    return rows


class BEiT(Trunk, Resizable):
    """A BEiT of timm's, whose class token leads the patches through the blocks.

    `size`: the picture, px, whose grid of patches, the window, the tables belong to; other grids resize them at run time.
    `model`: timm's name, with a tag such as `.in22k_ft_in22k` to choose among its pretrained weights; `pretrained` downloads
    them. `layer_scale`: what the scales of its branches begin with; None: the model's. `final_norm`: without it `norm` is the
    identity and has no parameters, as in ViT-Adapter. `norm_eps`: of every LayerNorm; None: the model's, 1e-6.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        model: str = "beit_base_patch16_224",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        patch: int | None = None,
        drop_path: float = 0.0,
        final_norm: bool = False,
        norm_eps: float | None = None,
        layer_scale: float | None = None,
        pretrained: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        timm = load_timm()
        if layer_scale == 0:
            raise ValueError("layer_scale 0 would keep every branch from learning at first; take 1e-6")
        self.vit: Any = create(
            model,
            "BEiT",
            "beit_*",
            "beitv2_*",
            # One patch, as timm would keep the places of all pairs of tokens in every block.
            img_size=patch or 16,
            global_pool="",
            drop_path_rate=drop_path,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            patch_size=patch,
            norm_layer=None if norm_eps is None else partial(timm.layers.LayerNorm, eps=norm_eps),
            init_values=layer_scale,
        )
        if not final_norm:
            self.vit.norm = nn.Identity()
        self.width = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.patch = self.vit.patch_embed.patch_size[0]
        self.prefix = 1
        self.window = (-(-size[0] // self.patch), -(-size[1] // self.patch))
        count = (2 * self.window[0] - 1) * (2 * self.window[1] - 1) + EXTRA
        for block in self.vit.blocks:
            block.attn.relative_position_index = None
            block.attn.relative_position_bias_table = nn.Parameter(torch.zeros(count, block.attn.num_heads))
        self.rows: Tensor
        self.register_buffer("rows", table_rows(self.window), persistent=False)
        if pretrained:
            take_over(
                self.vit,
                # The norm of what was averaged there is that of the tokens here.
                {
                    name.replace("fc_norm.", "norm."): each
                    for name, each in pretrained_model(model).state_dict().items()
                },
                lambda name, tensor: self.resize_from(f"vit.{name}", tensor),
                "leave out width and depth",
            )
        self.mean, self.std = mean, std
        self.pixels = Pixels(mean, std, self.patch)

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        maps = self.vit.patch_embed.proj(self.pixels(pixels))
        leading = self.vit.cls_token.expand(maps.shape[0], -1, -1)
        return torch.cat([leading, maps.flatten(2).transpose(1, 2)], 1), (maps.shape[-2], maps.shape[-1])

    def block(
        self,
        index: int,
        tokens: Float[Tensor, "B N D"],
        grid: Size,
        mask: Bool[Tensor, "B N N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        block = self.vit.blocks[index]
        attended = self._attend(block.attn, block.norm1(tokens), grid, mask)
        tokens = tokens + block.drop_path1(block.gamma_1 * attended)
        return tokens + block.drop_path2(block.gamma_2 * block.mlp(block.norm2(tokens)))

    def _attend(self, attention: Any, tokens: Tensor, grid: Size, mask: Tensor | None) -> Float[Tensor, "B N D"]:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        projected = F.linear(tokens, attention.qkv.weight, bias)
        query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        leading = tokens.shape[1] - 1 - grid[0] * grid[1]
        places = self._biases(attention.relative_position_bias_table, grid, leading).to(query.dtype)[None]
        if mask is not None:
            places = places.masked_fill(~mask[:, None], -torch.inf)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=places)
        return attention.proj(seen.transpose(1, 2).flatten(2))

    def _biases(self, table: Tensor, grid: Size, leading: int) -> Float[Tensor, "M N N"]:
        """What is added to the similarity of every pair of tokens; nothing for `leading` ones before the class token."""
        rows = self.rows if grid == self.window else table_rows(grid, table.device)
        table = bicubic_table(table, self.window, grid)
        if leading:
            rows = F.pad(rows, (leading, 0, leading, 0), value=len(table))
            table = F.pad(table, (0, 0, 0, 1))
        # Head by head, which is three times as fast as row by row of the table.
        return table.T.contiguous().index_select(1, rows.flatten()).unflatten(1, rows.shape)

    def shrink_block(
        self, index: int, queries: Float[Tensor, "B M D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        raise UserError("a BEiT cannot be shrunk, as its blocks know tokens by their places; take another trunk")

    def norm(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.vit.norm(tokens)

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Tables of square windows are carried to this one geometrically; patch kernels as FlexiViT's."""
        own = self.state_dict().get(name)
        if own is None:
            return None
        if name == "vit.patch_embed.proj.weight":
            return resize_kernel(tensor, own)
        if not name.endswith(TABLE) or tensor.ndim != 2 or tensor.shape[1] != own.shape[1] or not _side(tensor):
            return None
        return geometric_table(tensor, self.window)
