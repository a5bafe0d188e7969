"""Neighbourhood attention: every token of a map attends to a square of tokens around it, which stays whole at the borders.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated Neighborhood Attention Transformer",
2022.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maskfirst.ops.runs import at_a_time

SIDE = 8
"""Queries along one side of a tile: fewer cost more reading, more cost more scores that no one asked for."""
SCORES = 2**19
"""That are made at a time: 2 MiB in single precision, which stay in the caches."""


def neighbourhood_attention(
    queries: Float[Tensor, "B H W M D"],
    keys: Float[Tensor, "B H W M D"],
    values: Float[Tensor, "B H W M D"],
    bias: Float[Tensor, "M S S"],
    dilation: int = 1,
) -> Float[Tensor, "B H W _W"]:
    """What each token sees of its k x k neighbours, `dilation` px apart, in each of M heads, the heads side by side.

    `bias`: added to the scores by how far down and right a key lies of its query, -(k - 1) to k - 1 steps, S = 2 k - 1, k odd.
    Where a square would leave the map it is moved inside, so that all have k x k tokens. Raises ValueError where one is larger
    than the map. Scores are scaled by 1 / sqrt(D). Differentiable in all four.

    Tiles of queries attend to all tokens that any of their queries has near, by plain attention whose bias is minus infinity
    where a query has not. That makes one to four times as many scores, all by products of matrices: on a CPU three to ten times
    as fast as neighbour by neighbour.
    """
    height, width, heads = queries.shape[1:4]
    kernel = (bias.shape[-1] + 1) // 2
    if bias.shape[-2] != bias.shape[-1] or not kernel % 2 or dilation < 1:
        raise ValueError(f"bias {list(bias.shape)} should be of an odd window, and dilation {dilation} at least 1")
    if min(height, width) < kernel * dilation:
        raise ValueError(f"a map of {height} x {width} is smaller than a window of {kernel} with dilation {dilation}")
    tables = [
        each.flatten(3).flatten(0, 2).contiguous() for each in (queries * queries.shape[-1] ** -0.5, keys, values)
    ]
    # One more step, in which nothing is seen.
    bias = F.pad(bias, (0, 1, 0, 1), value=float("-inf"))
    starts = height * width * torch.arange(queries.shape[0], device=bias.device)[:, None]
    seen, places = [], []
    for down in _tiles(height, kernel, dilation):
        for across in _tiles(width, kernel, dilation):
            biases = _biases(bias, down, across)
            # A graph has pictures in any number, and so no number of scores.
            batch = 1 if torch.compiler.is_exporting() else queries.shape[0]
            step = at_a_time(SCORES // (batch * len(across.keys) * biases.numel()), queries)
            for first in range(0, len(down.keys), step):
                part = slice(first, first + step)
                asked, looked = (
                    _flat(rows[part], columns, width, bias.device)
                    for rows, columns in ((down.queries, across.queries), (down.keys, across.keys))
                )
                read = [
                    F.embedding(starts + index.flatten(), table).view(-1, index.shape[1], heads, queries.shape[-1])
                    for index, table in zip((asked, looked, looked), tables, strict=True)
                ]
                query, key, value = (each.transpose(1, 2).contiguous() for each in read)
                found = _attend(query, key, value, biases)
                seen.append(found.transpose(1, 2).reshape(queries.shape[0], -1, tables[0].shape[1]))
                places.append(asked.flatten())
    return _sorted(torch.cat(seen, 1), torch.cat(places), height * width).unflatten(1, (height, width))


class Layout(NamedTuple):
    """What the N tiles of maps of one size read, as tensors, which a graph makes of the size that it is given.

    `queries`, `keys`: rows of a table of all tokens, each with its heads; of the last, that of a token beyond the map, where a
    key is outside. `steps`: the index of the bias for the queries and keys along one side of a tile. `hidden`: what is added
    to the scores, minus infinity where a key is not near its query. `found`: rows of a table of all tiles, heads and queries.
    """

    queries: Int64[Tensor, "N M Q"]
    keys: Int64[Tensor, "N M K"]
    steps: Int64[Tensor, "_S _K"]
    hidden: Float[Tensor, "N 1 Q K"]
    found: Int64[Tensor, "B H W M"]


def layout_of_any_size(maps: Float[Tensor, "B H W _C"], heads: int, kernel: int, dilation: int) -> Layout:
    """Of maps whose sizes may be symbols, for windows of an odd `kernel`, which reach beyond maps that are smaller than they.

    All tiles are alike, and only their number depends on the size. The last one of a line ends with it, so that windows that
    are moved inside lie in the tiles of their queries.
    """
    # As tensors: exporters take minutes to simplify terms of sizes.
    batch, height, width = (torch.full((), size, dtype=torch.int64, device=maps.device) for size in maps.shape[:3])
    down, across = (_Axis(length, kernel, dilation) for length in (height, width))
    # A size of its own, for the same reason.
    count = cast("int", (batch * down.tiles * across.tiles).item())
    torch._check(count >= 1)
    number = torch.arange(count, device=maps.device)
    starts = number // (down.tiles * across.tiles) * height
    rows, columns = down.read(number // across.tiles % down.tiles), across.read(number % across.tiles)
    head = torch.arange(heads, device=maps.device)

    def places(below: Int64[Tensor, "N Y"], beside: Int64[Tensor, "N X"]) -> Int64[Tensor, "N M L"]:
        own = (starts[:, None] + below)[:, :, None] * width + beside[:, None]
        inside = (below < height)[:, :, None] & (beside < width)[:, None]
        return torch.where(inside, own, batch * height * width).flatten(1)[:, None] * heads + head[:, None]

    seen, unseen = maps.new_zeros(()), maps.new_full((), float("-inf"))
    below, beside = (torch.where(each.near, seen, unseen) for each in (rows, columns))
    hidden = (below[:, :, None, :, None] + beside[:, None, :, None, :]).flatten(3).flatten(1, 2)
    pictures, above, before = (torch.arange(size, device=maps.device) for size in maps.shape[:3])
    (tile, row), (next_to, column) = down.find(above), across.find(before)
    tiles = (pictures[:, None] * down.tiles + tile)[:, :, None] * across.tiles + next_to
    found = (tiles[..., None] * heads + head) * down.side**2 + (row[:, None] * down.side + column)[..., None]
    asked, looked = places(rows.queries, columns.queries), places(rows.keys, columns.keys)
    return Layout(asked, looked, down.steps(maps.device), hidden[:, None], found)


def neighbourhood_attention_of_any_size(
    queries: Float[Tensor, "B H W M D"],
    keys: Float[Tensor, "B H W M D"],
    values: Float[Tensor, "B H W M D"],
    bias: Float[Tensor, "M S S"],
    layout: Layout,
    beyond: Float[Tensor, "2 M D"],
) -> Float[Tensor, "B H W _W"]:
    """What `neighbourhood_attention` gives, by operators whose sizes may be symbols, for graphs that take maps of any size.

    `layout`: of these maps and heads, and of the bias's windows. `beyond`: the key and the value of every token below or on the
    right of the map. All scores are in memory at once.
    """
    query = F.embedding(layout.queries, (queries * queries.shape[-1] ** -0.5).flatten(0, 3))
    key, value = (
        F.embedding(layout.keys, torch.cat([each.flatten(0, 3), last]))
        for each, last in zip((keys, values), beyond, strict=True)
    )
    scores = query @ key.transpose(-2, -1)
    scores += _spread(bias, layout.steps)
    scores += layout.hidden
    return F.embedding(layout.found, (scores.softmax(-1) @ value).flatten(0, 2)).flatten(3)


def neighbours(length: int, kernel: int, dilation: int, place: int) -> tuple[int, int]:
    """Of a token of a line of `length`: the first of its `kernel` neighbours, and its own number among steps of `dilation`.

    The tokens whose distance `dilation` divides are a line of their own, in whose steps both are told.
    """
    own, line = divmod(place, dilation)
    count = -(-(length - line) // dilation)
    return min(max(own - kernel // 2, 0), count - kernel), own


def _attend(
    queries: Float[Tensor, "X M Q D"],
    keys: Float[Tensor, "X M K D"],
    values: Float[Tensor, "X M K D"],
    biases: Float[Tensor, "M Q K"],
) -> Float[Tensor, "X M Q D"]:
    """torch's own attention looks for queries that see nothing, and takes half as long again."""
    scores = queries @ keys.transpose(-2, -1)
    scores += biases
    return scores.softmax(-1) @ values


class _Tiles(NamedTuple):
    """Tiles of one axis whose queries have their keys at the same steps.

    `queries`, `keys`: places, one tuple a tile. `steps`: for each query of a tile and each key the index of the bias; the last
    one, that of nothing, where the key is none of the query's neighbours.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def _tiles(length: int, kernel: int, dilation: int) -> tuple[_Tiles, ...]:
    """Of all lines of an axis, by their steps. Where two tiles of a line overlap, both have the same queries."""
    longest = -(-length // dilation)
    # A line that one tile's keys reach all of is one tile.
    tiles = 1 if longest < SIDE + kernel else -(-longest // SIDE)
    side = -(-longest // tiles)
    span = min(longest, side + kernel - 1)
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    for line in range(min(dilation, length)):
        count = -(-(length - line) // dilation)
        for tile in range(tiles):
            begin = max(min(tile * side, count - side), 0)
            # A line that is shorter than a tile has its last token several times.
            queries = [min(begin + index, count - 1) for index in range(side)]
            first = max(min(begin - kernel // 2, count - span), 0)
            steps = tuple(
                _steps(neighbours(length, kernel, dilation, own * dilation + line), first, span, kernel)
                for own in queries
            )
            keys = [min(first + index, count - 1) for index in range(span)]
            places = tuple(tuple(each * dilation + line for each in own) for own in (queries, keys))
            alike[steps].append((places[0], places[1]))
    return tuple(
        _Tiles(tuple(queries for queries, _ in found), tuple(keys for _, keys in found), steps)
        for steps, found in alike.items()
    )


def _steps(near: tuple[int, int], first: int, span: int, kernel: int) -> tuple[int, ...]:
    """The bias's index for each of `span` keys from `first` on."""
    start, own = near
    return tuple(
        key - own + kernel - 1 if start <= key < start + kernel else 2 * kernel - 1
        for key in range(first, first + span)
    )


def _flat(
    rows: tuple[tuple[int, ...], ...], columns: tuple[tuple[int, ...], ...], width: int, device: torch.device
) -> Int64[Tensor, "T N"]:
    """The places of all tokens of all tiles that rows and columns make, in a map laid out row by row."""
    down = torch.tensor(rows, device=device)[:, None, :, None] * width
    return (down + torch.tensor(columns, device=device)[:, None, :]).flatten(2).flatten(0, 1)


def _biases(bias: Float[Tensor, "M S S"], down: _Tiles, across: _Tiles) -> Float[Tensor, "M Q K"]:
    """Of every query of a tile for every key of it."""
    rows, columns = (torch.tensor(each.steps, device=bias.device) for each in (down, across))
    # Columns first, while there are few rows, and then rows, which lie together.
    spread = bias.index_select(2, columns.flatten()).unflatten(2, columns.shape).transpose(1, 2).contiguous()
    spread = spread.index_select(2, rows.flatten()).unflatten(2, rows.shape)
    return spread.transpose(1, 2).flatten(3).flatten(1, 2)


def _sorted(seen: Float[Tensor, "B X C"], places: Int64[Tensor, " X"], count: int) -> Float[Tensor, "B N C"]:
    """What stands for each of `count` places; of those that stand for the same place any one, as they are equal."""
    order = torch.empty(count, dtype=places.dtype, device=places.device)
    order[places] = torch.arange(len(places), device=places.device)
    return seen.index_select(1, order)


class _Read(NamedTuple):
    """What tiles read along one axis: the places of their queries and keys, and which key each query has near."""

    queries: Int64[Tensor, "N S"]
    keys: Int64[Tensor, "N K"]
    near: Bool[Tensor, "N S K"]


@dataclass(frozen=True)
class _Axis:
    """One axis of a map, whose `length` is a tensor, as its number is not known; the rest as for `neighbourhood_attention`."""

    length: Int64[Tensor, ""]
    kernel: int
    dilation: int

    @property
    def side(self) -> int:
        """Queries along one side of a tile, so many that half a window more on both sides holds a whole one at a border."""
        return max(SIDE, self.kernel // 2 + 1)

    @property
    def tiles(self) -> Int64[Tensor, ""]:
        """Of all lines together: tile after tile, and in each of them line after line."""
        return (self.length + (self.side * self.dilation - 1)) // (self.side * self.dilation) * self.dilation

    def read(self, number: Int64[Tensor, " N"]) -> _Read:
        tile, line = (number // self.dilation)[:, None], (number % self.dilation)[:, None]
        count = self._count(line)
        begin = self._begin(tile, count)
        own = begin + torch.arange(self.side, device=number.device)
        key = begin - self.kernel // 2 + torch.arange(self.side + self.kernel - 1, device=number.device)
        first = torch.minimum((own - self.kernel // 2).clamp(min=0), count - self.kernel)
        after = key[:, None] - first[:, :, None]
        # Those after the end of a line are asked for by no one.
        queries = torch.minimum(own * self.dilation + line, self.length - 1)
        return _Read(queries, key.clamp(min=0) * self.dilation + line, (after >= 0) & (after < self.kernel))

    def steps(self, device: torch.device) -> Int64[Tensor, "S K"]:
        """The index of the bias for each query of any tile and each key. For a key that is too far it means nothing."""
        query, key = (torch.arange(count, device=device) for count in (self.side, self.side + self.kernel - 1))
        return (key - query[:, None] + self.kernel // 2).clamp(0, 2 * self.kernel - 2)

    def find(self, place: Int64[Tensor, " L"]) -> tuple[Int64[Tensor, " L"], Int64[Tensor, " L"]]:
        """The tile that a place is a query of, and the query's number in it."""
        own, line = place // self.dilation, place % self.dilation
        tile = own // self.side
        return tile * self.dilation + line, own - self._begin(tile, self._count(line))

    def _count(self, line: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Tokens of a line, of which there are enough for a window, if beyond the map."""
        return (self.length.clamp(min=self.kernel * self.dilation) + (self.dilation - 1) - line) // self.dilation

    def _begin(self, tile: Int64[Tensor, "..."], count: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """The first query of a tile. A line that is shorter than a tile ends before it."""
        return torch.minimum(tile * self.side, count - self.side).clamp(min=0)


def _spread(bias: Float[Tensor, "M S S"], steps: Int64[Tensor, "Y X"]) -> Float[Tensor, "M _Q _K"]:
    """Of every query of a tile for every key of it, both along the same steps down and across."""
    spread = bias.index_select(2, steps.flatten()).unflatten(2, steps.shape)
    spread = spread.index_select(1, steps.flatten()).unflatten(1, steps.shape)
    return spread.transpose(2, 3).flatten(3).flatten(1, 2)
