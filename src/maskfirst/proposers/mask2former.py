"""Mask2Former: queries that each look only where their mask of the layer before lies, and mask embeddings over a fine map.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Backbone, Proposer
from maskfirst.frames import Size, resize
from maskfirst.ops.sine_positions import sine_positions
from maskfirst.proposers.pixel_decoder import PixelDecoder
from maskfirst.types import Batch, Proposals

LEVELS = 3
"""Encoded maps that the layers visit in turn, coarse to fine."""


class Attention(nn.Module):
    """Multi-head attention with separate projections, to some tokens only where `seen` says so.

    `dropout`: of the attention itself, while it is trained.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        # As one packed matrix would be initialised, which the original has.
        packed = nn.init.xavier_uniform_(torch.empty(3 * width, width))
        for linear, weight in zip((self.q, self.k, self.v), packed.chunk(3), strict=True):
            with torch.no_grad():
                linear.weight.copy_(weight)
        nn.init.xavier_uniform_(self.proj.weight)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
        seen: Bool[Tensor, "B 1 Q N"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        pairs = ((self.q, queries), (self.k, keys), (self.v, values))
        q, k, v = (linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, source in pairs)
        dropout = self.dropout if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, seen, dropout).transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    """What a post-norm transformer decoder layer is made of, ReLU between; its kinds tell what looks at what, and when."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)

    def fed(self, queries: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What both attentions have made of the queries, each taken further by itself."""
        return self.norm3(queries + self.dropout(self.contract(self.dropout(self.expand(queries).relu()))))


class DecoderLayer(PostNormLayer):
    """Looks at the map first, where `seen`, and at the other queries then."""

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        positions: Float[Tensor, "Q D"],
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
        seen: Bool[Tensor, "B 1 Q N"],
    ) -> Float[Tensor, "B Q D"]:
        queries = self.norm1(queries + self.cross_attention(queries + positions, keys, values, seen))
        placed = queries + positions
        queries = self.norm2(queries + self.self_attention(placed, placed, queries))
        return self.fed(queries)


class Memory(NamedTuple):
    """What queries look at: the map for masks, and of each encoded map keys, values, and the map for masks at its size."""

    features: Float[Tensor, "B C h w"]
    keys: list[Float[Tensor, "B _n D"]]
    values: list[Float[Tensor, "B _n D"]]
    shrunk: list[Float[Tensor, "B C _n"]]

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "B C h w"],
        encoded: Sequence[Float[Tensor, "B D _h _w"]],
        level_embed: Float[Tensor, "L D"],
    ) -> "Memory":
        """`encoded`: as wide as the queries, coarse to fine; `level_embed`: what tells them apart."""
        sizes = [(each.shape[-2], each.shape[-1]) for each in encoded]
        values = [
            (each.flatten(2) + level[:, None]).transpose(1, 2) for each, level in zip(encoded, level_embed, strict=True)
        ]
        keys = [
            value + sine_positions(size, value.shape[-1], value.device)
            for value, size in zip(values, sizes, strict=True)
        ]
        return cls(features, keys, values, [resize(features.detach(), size).flatten(2) for size in sizes])


def decode(
    queries: Float[Tensor, "B Q D"],
    positions: Float[Tensor, "Q D"],
    memory: Memory,
    layers: Iterable[DecoderLayer],
    norm: Callable[[Tensor], Tensor],
    mask_embed: Callable[[Tensor], Tensor],
    every: bool,
) -> list[tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]]:
    """The normed queries and their masks after the last layer, or, with `every`, before the first and after each."""
    stages = [norm(queries)]
    embeddings = [mask_embed(stages[0])]
    for index, layer in enumerate(layers):
        level = index % len(memory.keys)
        open_to = may_see(embeddings[-1], memory.shrunk[level])
        queries = layer(queries, positions, memory.keys[level], memory.values[level], open_to)
        stages.append(norm(queries))
        embeddings.append(mask_embed(stages[-1]))
    first = 0 if every else -1
    # The masks of all stages in one product, whose gradient is one product, too.
    masks = torch.cat(embeddings[first:], 1) @ memory.features.flatten(2)
    masks = masks.unflatten(2, memory.features.shape[-2:]).unflatten(1, (-1, queries.shape[1]))
    return list(zip(stages[first:], masks.unbind(1), strict=True))


def may_see(embedded: Float[Tensor, "B Q C"], shrunk: Float[Tensor, "B C N"]) -> Bool[Tensor, "B 1 Q N"]:
    """Where each query may look: inside of its mask, or everywhere if that is empty.

    A mask shrunk is the shrunk map multiplied, as resizing is linear; so no mask is made whole for this.
    """
    with torch.no_grad():
        # Their sign decides, for which half precision would be too coarse.
        with torch.autocast(embedded.device.type, enabled=False):
            inside = embedded.detach().float() @ shrunk.float() >= 0
        return (inside | ~inside.any(-1, keepdim=True))[:, None]


def check_maps(kind: str, backbone: Backbone) -> None:
    """Raises ValueError unless `backbone` gives a proposer of this `kind` four maps, fine to coarse."""
    if len(backbone.channels) != LEVELS + 1 or any(fine >= coarse for fine, coarse in pairwise(backbone.strides)):
        raise ValueError(
            f"{kind} needs four maps, fine to coarse, and this backbone has strides {list(backbone.strides)}; "
            "`pyramid` gives such, `simple_pyramid` makes them of others"
        )


def mask_embedding(width: int, mask_width: int) -> nn.Sequential:
    """From a query to what the map for masks is multiplied with."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask_width)
    )


def guesses(
    stages: Sequence[tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q _h _w"]]],
    canvas: Size,
    stride: int,
) -> Proposals:
    """The last stage's proposals with those before as earlier ones. A backbone may have padded the `canvas`; masks do not."""
    height, width = (-(-side // stride) for side in canvas)
    *earlier, last = (Proposals(masks[..., :height, :width], queries=queries) for queries, masks in stages)
    return Proposals(last.masks, queries=last.queries, earlier=tuple(earlier))


class Mask2Former(Proposer):
    """Learned queries, none for a class in particular, masks on the grid of the backbone's finest map.

    `backbone`: four maps, fine to coarse. `width`, `heads`, `decoder_*`: of the queries; `pixel_width`, `encoder_*`,
    `points`: of the pixel decoder, None: as wide and with as many heads as the queries. `mask_width`: of the map that mask
    embeddings are multiplied with. With truth in the batch, `earlier` are the learned queries' own guess and every layer's
    but the last; without, only the last layer's masks are made whole.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "mask2former",
        "backbone": {
            "kind": "pyramid",
            "model": "swin_tiny_patch4_window7_224",
            "widths": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1],
            "heads": [1, 1, 2, 2],
            "window": 4,
        },
        "queries": 6,
        "width": 16,
        "mask_width": 16,
        "heads": 2,
        "encoder_layers": 1,
        "encoder_feedforward": 16,
        "decoder_layers": 3,
        "decoder_feedforward": 16,
    }

    def __init__(
        self,
        backbone: Backbone,
        queries: int = 100,
        width: int = 256,
        mask_width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        encoder_feedforward: int = 1024,
        decoder_layers: int = 9,
        decoder_feedforward: int = 2048,
        points: int = 4,
        pixel_width: int | None = None,
    ) -> None:
        super().__init__()
        check_maps("mask2former", backbone)
        pixel_width = pixel_width or width
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(
            backbone.channels, pixel_width, mask_width, heads, encoder_layers, encoder_feedforward, points
        )
        self.entrances = nn.ModuleList(
            nn.Identity() if pixel_width == width else _entrance(pixel_width, width) for _ in range(LEVELS)
        )
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.positions = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, decoder_feedforward) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.mask_embed = mask_embedding(width, mask_width)
        self.width = width
        self.tasks = frozenset({"semantic", "instance", "panoptic"})
        self.mean = backbone.mean
        self.multiple = backbone.multiple
        self.stride = backbone.strides[0]

    def forward(self, batch: Batch) -> Proposals:
        features, encoded = self.pixel_decoder(self.backbone(batch.pixels))
        stages = self.decode(features, encoded, every=batch.truth is not None)
        return guesses(stages, (batch.pixels.shape[-2], batch.pixels.shape[-1]), self.stride)

    def decode(
        self, features: Float[Tensor, "B C h w"], encoded: list[Float[Tensor, "B _d _h _w"]], every: bool
    ) -> list[tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]]:
        """The normed queries and their masks after the last layer, or, with `every`, before the first and after each."""
        entered = [entrance(each) for entrance, each in zip(self.entrances, encoded, strict=True)]
        memory = Memory.of(features, entered, self.level_embed)
        layers = cast("Iterable[DecoderLayer]", self.layers)
        queries = self.queries.expand(features.shape[0], -1, -1)
        return decode(queries, self.positions, memory, layers, self.norm, self.mask_embed, every)


def _entrance(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 1)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    nn.init.zeros_(cast("Tensor", convolution.bias))
    return convolution
