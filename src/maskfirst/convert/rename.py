"""Renaming: a table of rules brings every tensor of a foreign checkpoint to its place in our model, or leaves it knowingly."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from maskfirst.errors import UserError, listed

SHOWN = 10
"""Keys of each kind that an error's line names; its attributes have them all."""

Template = str | Callable[[re.Match[str]], str]
"""Our key, with the groups of the match as `\\1`, or a function that makes it where they must be counted anew."""


@dataclass(frozen=True)
class Move:
    """A foreign key whose whole name `match` fits is our key `to`. `turn` brings the tensor into our layout."""

    match: str
    to: Template
    turn: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """One foreign tensor, cut into equal parts along its first axis, becomes the keys `to`, in order."""

    match: str
    to: tuple[Template, ...]


@dataclass(frozen=True)
class Copy:
    """One foreign tensor, which several places share there, becomes each of the keys `to`, brought there by its `turns`."""

    match: str
    to: tuple[Template, ...]
    turns: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(frozen=True)
class Join:
    """One of several foreign tensors that, turned and put after one another along the first axis, become one of ours.

    `part` is its place 0..parts-1.
    """

    match: str
    to: Template
    part: int
    parts: int
    turn: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Leave:
    """A foreign key that is knowingly left behind, and why."""

    match: str
    reason: str


Rule = Move | Split | Copy | Join | Leave


class Misfit(NamedTuple):
    """A tensor whose shape is not the one that our key has; `wanted` is None where it cannot even be cut or turned."""

    key: str
    found: tuple[int, ...]
    wanted: tuple[int, ...] | None

    def __str__(self) -> str:
        wanted = "cannot be brought into our layout" if self.wanted is None else f"must be {list(self.wanted)}"
        return f"{self.key} {list(self.found)} {wanted}"


class RenameError(UserError):
    """Everything in which a checkpoint and a model do not fit, in one line.

    `unknown`: foreign keys without a rule. `homeless`: foreign keys whose rule leads to a key that the model has not, as
    (foreign, ours). `missing`: our keys without a source. `misfits`: shapes. `twice`: our keys with several sources.
    """

    def __init__(
        self,
        unknown: Sequence[str],
        homeless: Sequence[tuple[str, str]],
        missing: Sequence[str],
        misfits: Sequence[Misfit],
        twice: Sequence[str],
    ) -> None:
        self.unknown = tuple(unknown)
        self.homeless = tuple(homeless)
        self.missing = tuple(missing)
        self.misfits = tuple(misfits)
        self.twice = tuple(twice)
        parts = (
            ("keys of it without a rule", self.unknown),
            ("without a place in the model", [f"{foreign} (as {ours})" for foreign, ours in self.homeless]),
            ("keys of the model without a source", self.missing),
            ("of another shape", [str(misfit) for misfit in self.misfits]),
            ("keys of the model with two sources", self.twice),
        )
        told = [f"{what} ({len(keys)}): {listed(keys, SHOWN)}" for what, keys in parts if keys]
        super().__init__(f"the checkpoint does not fit the model: {'; '.join(told)}")


@dataclass(frozen=True, eq=False)
class Renamed:
    """Tensors by our keys. `homes`: the keys that each foreign tensor went to. `left`: why the others were left behind."""

    tensors: dict[str, Tensor]
    homes: dict[str, tuple[str, ...]]
    left: dict[str, str]


@dataclass
class _Faults:
    unknown: list[str] = field(default_factory=list)
    homeless: list[tuple[str, str]] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def rename(tensors: Mapping[str, Tensor], rules: Iterable[Rule], target_shapes: Mapping[str, Sequence[int]]) -> Renamed:
    """Every tensor by the first rule whose `match` its whole key fits; nothing is dropped, made up or resized.

    `target_shapes`: the shape of each of our keys. Raises RenameError, which lists all that does not fit.
    """
    compiled = _compiled(rules)
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    parts: dict[str, int] = {}
    homes: dict[str, tuple[str, ...]] = {}
    left: dict[str, str] = {}
    faults = _Faults()
    for key, tensor in tensors.items():
        led = _led(key, compiled)
        if led is None:
            faults.unknown.append(key)
            continue
        rule, goals = led
        if isinstance(rule, Leave):
            left[key] = rule.reason
            continue
        homes[key] = goals
        made = _made(rule, tensor)
        if made is None:
            faults.misfits.append(Misfit(key, tuple(tensor.shape), None))
        first, count = (rule.part, rule.parts) if isinstance(rule, Join) else (0, 1)
        for home, piece in zip(goals, made or (tensor,) * len(goals), strict=True):
            if home not in target_shapes:
                faults.homeless.append((key, home))
            elif first in pieces[home]:
                faults.twice.append(home)
            pieces[home][first] = piece
            parts[home] = count
    broken = {home for misfit in faults.misfits for home in homes[misfit.key]}
    ours: dict[str, Tensor] = {}
    missing = [key for key in target_shapes if key not in parts or len(pieces[key]) != parts[key]]
    for key, shape in target_shapes.items():
        if key in missing or key in broken:
            continue
        ordered = [pieces[key][part] for part in range(parts[key])]
        ours[key] = ordered[0] if len(ordered) == 1 else _joined(ordered)
        if tuple(ours[key].shape) != tuple(shape):
            faults.misfits.append(Misfit(key, tuple(ours[key].shape), tuple(shape)))
    if faults.unknown or faults.homeless or missing or faults.misfits or faults.twice:
        raise RenameError(faults.unknown, faults.homeless, missing, faults.misfits, faults.twice)
    return Renamed(ours, homes, left)


def destinations(keys: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[str, ...]]:
    """Where the rules lead each key: our keys, none for what is left behind. Raises RenameError for keys without a rule."""
    compiled = _compiled(rules)
    led = {key: _led(key, compiled) for key in keys}
    unknown = [key for key, found in led.items() if found is None]
    if unknown:
        raise RenameError(unknown, (), (), (), ())
    return {key: found[1] for key, found in led.items() if found is not None}


def count(keys: Iterable[str], match: str) -> int:
    """How many numbers, or other words, stand in the first group of the keys that fit `match` whole: blocks, for example."""
    return len({found[1] for key in keys if (found := re.fullmatch(match, key))})


def _compiled(rules: Iterable[Rule]) -> list[tuple[re.Pattern[str], Rule]]:
    return [(re.compile(rule.match), rule) for rule in rules]


def _led(key: str, compiled: Sequence[tuple[re.Pattern[str], Rule]]) -> tuple[Rule, tuple[str, ...]] | None:
    """The first rule that fits a key, and our keys that it leads to."""
    fitting = ((rule, match) for regex, rule in compiled if (match := regex.fullmatch(key)))
    found = next(fitting, None)
    if found is None:
        return None
    rule, match = found
    templates = () if isinstance(rule, Leave) else rule.to if isinstance(rule, Split | Copy) else (rule.to,)
    return rule, tuple(_filled(template, match) for template in templates)


def _filled(template: Template, match: re.Match[str]) -> str:
    return match.expand(template) if isinstance(template, str) else template(match)


def _made(rule: Move | Split | Copy | Join, tensor: Tensor) -> tuple[Tensor, ...] | None:
    """The tensor as its rule wants it, in pieces of their own memory; None where its shape does not allow that."""
    if isinstance(rule, Copy) and not rule.turns:
        return tuple(tensor.clone() for _ in rule.to)
    if isinstance(rule, Split):
        count = len(rule.to)
        if tensor.ndim == 0 or tensor.shape[0] % count:
            return None
        return tuple(piece.clone() for piece in tensor.chunk(count))
    turns = rule.turns if isinstance(rule, Copy) else () if rule.turn is None else (rule.turn,)
    if not turns:
        return (tensor,)
    try:
        return tuple(turn(tensor).contiguous() for turn in turns)
    except (RuntimeError, IndexError):
        return None


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces after one another; the first alone where they do not go together, which then shows as its shape."""
    if len({piece.shape[1:] for piece in pieces}) > 1 or pieces[0].ndim == 0:
        return pieces[0]
    return torch.cat(list(pieces))
