"""Attention-to-Mask: the similarity of class tokens to the picture's tokens, before its softmax, is the mask.

Zhang et al., "SegViT: Semantic Segmentation with Plain Vision Transformers", NeurIPS 2022.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Backbone, PerClass, Proposer, Resizable
from maskfirst.frames import Size, resize
from maskfirst.types import Batch, Proposals, Vocabulary


class Attention(nn.Module):
    """Multi-head attention with separate projections; its probabilities are dropped out in training."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def _split(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ((self.q, queries), (self.k, memory), (self.v, memory))
        q, k, v = (linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, source in pairs)
        return q, k, v

    def forward(self, queries: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]) -> Float[Tensor, "B Q D"]:
        q, k, v = self._split(queries, memory)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(seen.transpose(1, 2).flatten(2))

    def with_similarity(
        self, queries: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]:
        """What the queries saw, and their scaled similarity to the memory before the softmax, averaged over heads."""
        q, k, v = self._split(queries, memory)
        similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = F.dropout(similarity.softmax(-1), self.dropout, self.training)
        return self.proj((shares @ v).transpose(1, 2).flatten(2)), similarity.mean(1)


class DecoderLayer(nn.Module):
    """A post-norm transformer decoder layer: self-attention, cross-attention, ReLU FFN of width 4D; LayerNorm eps 1e-5."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def _exchange(self, tokens: Tensor) -> Tensor:
        return self.norm1(tokens + self.dropout(self.self_attention(tokens, tokens)))

    def _update(self, tokens: Tensor, seen: Tensor) -> Tensor:
        tokens = self.norm2(tokens + self.dropout(seen))
        hidden = self.dropout(self.expand(tokens).relu())
        return self.norm3(tokens + self.dropout(self.contract(hidden)))

    def forward(self, tokens: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]) -> Float[Tensor, "B Q D"]:
        tokens = self._exchange(tokens)
        return self._update(tokens, self.cross_attention(tokens, memory))

    def with_similarity(
        self, tokens: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]:
        """The tokens after the layer, and the masks: how alike tokens and memory were in its cross-attention."""
        tokens = self._exchange(tokens)
        seen, similarity = self.cross_attention.with_similarity(tokens, memory)
        return self._update(tokens, seen), similarity


class Entrance(nn.Module):
    """One tap of the backbone brought to the head's width and normed."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        return self.norm(self.proj(maps.flatten(2).transpose(1, 2)))


class Tokens(nn.Module):
    """One tap of the backbone as it is, row by row."""

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
        return maps.flatten(2).transpose(1, 2)


def _initialise(head: nn.Module, spread: float) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=spread, a=-2.0, b=2.0)
            nn.init.zeros_(module.bias)


class Decoder(nn.Module):
    """A stack of decoder layers initialised as SegViT's.

    Linears are truncated normal, std `spread` (0.02 there); the packed input projections of the self-attention
    are Xavier-uniform and the same in every layer, since the original's layers start as copies of one.
    """

    def __init__(self, layers: int, width: int, heads: int, dropout: float, spread: float = 0.02) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers {layers} must be at least 1")
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        _initialise(self, spread)
        packed = nn.init.xavier_uniform_(torch.empty(3 * width, width))
        for layer in self:
            attention = layer.self_attention
            for linear, weight in zip((attention.q, attention.k, attention.v), packed.chunk(3), strict=True):
                with torch.no_grad():
                    linear.weight.copy_(weight)

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(cast("Iterable[DecoderLayer]", self.layers))

    def forward(self, tokens: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]) -> Float[Tensor, "B Q D"]:
        for layer in self:
            tokens = layer(tokens, memory)
        return tokens

    def with_similarity(
        self, tokens: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]
    ) -> list[tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]]:
        """Tokens and similarity after every layer."""
        guesses = []
        for layer in self:
            tokens, similarity = layer.with_similarity(tokens, memory)
            guesses.append((tokens, similarity))
        return guesses


class Queries(nn.Module, PerClass):
    """The learned class tokens (K, D): query c stands for class c."""

    class_rows: ClassVar[Mapping[str, bool]] = {"weight": False}

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))


class FreeQueries(nn.Module):
    """Learned tokens (Q, D) that stand for no class in particular."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))


class GridQueries(nn.Module, Resizable):
    """One learned token a place of a square grid (SegViT's query-up); this is all the position there is."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.randn(side * side, width))

    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """Tables of other square grids are resized bilinearly."""
        side = int(tensor.shape[0] ** 0.5)
        if (
            name != "weight"
            or tensor.ndim != 2
            or side * side != tensor.shape[0]
            or tensor.shape[1] != self.weight.shape[1]
        ):
            return None
        maps = tensor.float().T.unflatten(1, (side, side))
        return resize(maps, (self.side, self.side)).flatten(1).T.to(tensor.dtype)


def _class_tokens(queries: int | None, vocabulary: Vocabulary, width: int) -> Queries | FreeQueries:
    return Queries(len(vocabulary), width) if queries is None else FreeQueries(queries, width)


def _tasks(queries: int | None) -> frozenset[str]:
    # A query that stands for its class finds one mask a class, which is no instance.
    return frozenset({"semantic"}) if queries is None else frozenset({"semantic", "instance", "panoptic"})


def _last(guesses: list[Proposals], batch: Batch, resolution: Size | None, earlier: int | None) -> Proposals:
    """The last guess as the answer; the first of the others ride along where there is truth to compare them with."""
    last = guesses[-1]
    kept = tuple(guesses[:-1][:earlier]) if batch.truth is not None else ()
    return Proposals(last.masks, resolution=resolution, queries=last.queries, earlier=kept)


ReadOut = Literal["size", "canvas"]


class ATM(Proposer):
    """SegViT's cascade: class tokens visit the backbone's taps, deepest first, and their similarities add up to masks.

    `queries` None: query c stands for class c (criterion `fixed`, as published); a number: free queries for criterion
    `set`. `read_out`: masks are enlarged to the recipe's `size` whatever the canvas, as published, or to the canvas.
    `spread`: std of the head's initial weights; widths far below the published want more. `earlier`: how many of the
    guesses before the last are trained too, from the first on; None: all.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "atm",
        "backbone": {
            "kind": "taps",
            "depths": [0, 1],
            "trunk": {
                "kind": "vit",
                "model": "vit_tiny_patch16_224",
                "width": 32,
                "depth": 2,
                "heads": 2,
                "final_norm": False,
            },
        },
        "width": 16,
        "heads": 2,
        "layers": 1,
    }

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: Vocabulary,
        size: tuple[int, int],
        width: int = 384,
        heads: int = 12,
        layers: int = 3,
        queries: int | None = None,
        dropout: float = 0.1,
        spread: float = 0.02,
        read_out: ReadOut = "size",
        earlier: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.queries = _class_tokens(queries, vocabulary, width)
        stages = len(backbone.channels)
        self.entrances = nn.ModuleList(Entrance(channels, width) for channels in reversed(backbone.channels))
        _initialise(self.entrances, spread)
        self.decoders = nn.ModuleList(Decoder(layers, width, heads, dropout, spread) for _ in range(stages))
        self.width = width
        self.earlier = earlier
        self.tasks = _tasks(queries)
        self.mean = backbone.mean
        self.multiple = backbone.multiple
        self.resolution: Size | None = size if read_out == "size" else None

    def forward(self, batch: Batch) -> Proposals:
        maps = self.backbone(batch.pixels)
        tokens = self.queries.weight.expand(batch.pixels.shape[0], -1, -1)
        masks: Tensor | None = None
        stages: list[Proposals] = []
        decoders = cast("Iterable[Decoder]", self.decoders)
        for tap, entrance, layers in zip(reversed(maps), self.entrances, decoders, strict=True):
            tokens, similarity = layers.with_similarity(tokens, entrance(tap))[-1]
            grid = (tap.shape[-2], tap.shape[-1])
            similarity = similarity.unflatten(2, grid)
            masks = similarity if masks is None else resize(masks, grid) + similarity
            stages.append(Proposals(masks, queries=tokens))
        return _last(stages, batch, self.resolution, self.earlier)


class SingleATM(Proposer):
    """Many masks from one memory: every layer of every decoder gives its own, and the last one counts.

    With several taps the memory is the sum of all, each projected and normed, deepest first; without `project` it is the
    sum of the taps as they are, whose channels must then be `width`.
    """

    example: ClassVar[Mapping[str, Any]] = {**ATM.example, "kind": "atm_single"}

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: Vocabulary,
        size: tuple[int, int],
        width: int = 384,
        heads: int = 12,
        layers: int = 3,
        queries: int | None = None,
        dropout: float = 0.1,
        spread: float = 0.02,
        read_out: ReadOut = "size",
        earlier: int | None = None,
        project: bool = True,
    ) -> None:
        super().__init__()
        if len(set(backbone.strides)) > 1:
            raise ValueError(f"atm_single sums its taps, which must share one stride; got {list(backbone.strides)}")
        if not project and set(backbone.channels) != {width}:
            raise ValueError(f"project is false, so width {width} must be the taps' {list(backbone.channels)} channels")
        self.backbone = backbone
        self.queries = _class_tokens(queries, vocabulary, width)
        self.entrances = nn.ModuleList(
            Entrance(channels, width) if project else Tokens() for channels in reversed(backbone.channels)
        )
        _initialise(self.entrances, spread)
        self.decoders = nn.ModuleList(Decoder(layers, width, heads, dropout, spread) for _ in backbone.channels)
        self.width = width
        self.earlier = earlier
        self.tasks = _tasks(queries)
        self.mean = backbone.mean
        self.multiple = backbone.multiple
        self.resolution: Size | None = size if read_out == "size" else None

    def forward(self, batch: Batch) -> Proposals:
        maps = self.backbone(batch.pixels)
        grid = (maps[-1].shape[-2], maps[-1].shape[-1])
        entered = [entrance(tap) for entrance, tap in zip(self.entrances, reversed(maps), strict=True)]
        memory = torch.stack(entered).sum(0)
        tokens = self.queries.weight.expand(batch.pixels.shape[0], -1, -1)
        guesses = []
        for layers in cast("Iterable[Decoder]", self.decoders):
            guessed = layers.with_similarity(tokens, memory)
            guesses += [Proposals(similarity.unflatten(2, grid), queries=queries) for queries, similarity in guessed]
            tokens = guessed[-1][0]
        return _last(guesses, batch, self.resolution, self.earlier)


class ShrunkATM(Proposer):
    """SegViT-Shrunk: learned tokens, one a place, collect what the shrunk backbone kept, and ATM reads them (query-up).

    The masks' grid is `size`/patch whatever the canvas, as the tokens are bound to it.
    """

    example: ClassVar[Mapping[str, Any]] = {
        **ATM.example,
        "kind": "atm_shrunk",
        "backbone": {**ATM.example["backbone"], "kind": "shrunk_taps", "shrink": 1},
    }

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: Vocabulary,
        size: tuple[int, int],
        width: int = 512,
        heads: int = 16,
        layers: int = 3,
        dropout: float = 0.1,
        spread: float = 0.02,
        earlier: int | None = None,
    ) -> None:
        super().__init__()
        if size[0] != size[1]:
            raise ValueError(
                f"atm_shrunk needs a square size, got {size[0]}x{size[1]}: its tokens lie on a square grid"
            )
        self.backbone = backbone
        self.grid_queries = GridQueries(size[0] // backbone.multiple, width)
        self.entrances = nn.ModuleList(Entrance(channels, width) for channels in backbone.channels)
        _initialise(self.entrances, spread)
        self.decoders = nn.ModuleList(Decoder(layers, width, heads, dropout, spread) for _ in backbone.channels)
        self.queries = Queries(len(vocabulary), width)
        self.masks = Decoder(layers, width, heads, dropout, spread)
        self.width = width
        self.earlier = earlier
        self.tasks = _tasks(None)
        self.mean = backbone.mean
        self.multiple = backbone.multiple
        self.resolution: Size = size

    def forward(self, batch: Batch) -> Proposals:
        maps = self.backbone(batch.pixels)
        places = self.grid_queries.weight.expand(batch.pixels.shape[0], -1, -1)
        for tap, entrance, layers in zip(maps, self.entrances, self.decoders, strict=True):
            places = layers(places, entrance(tap))
        side = self.grid_queries.side
        tokens = self.queries.weight.expand(batch.pixels.shape[0], -1, -1)
        guesses = [
            Proposals(similarity.unflatten(2, (side, side)), queries=tokens)
            for tokens, similarity in self.masks.with_similarity(tokens, places)
        ]
        return _last(guesses, batch, self.resolution, self.earlier)
