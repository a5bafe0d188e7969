"""Codings: what the numbers in a label map mean, and which segments they make."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from maskfirst.errors import UserError, nearest
from maskfirst.types import VOID, Vocabulary

UNKNOWN = -2
"""In place of a class: a number that a label map should not hold."""
NO_CLASS = "void"
"""What `merge` calls pixels without a class."""


class DataError(UserError):
    """A data folder, or a file of truth in it, that is not as the recipe says."""


class Part(NamedTuple):
    """What a number stands for: a class (or VOID, or UNKNOWN), and which of its segments."""

    meaning: int
    instance: int = 0
    crowd: bool = False


@dataclass(frozen=True, eq=False)
class Truth:
    """The segments of one label map: `ids` index them, VOID for none; their classes; which stand for many."""

    ids: Int32[np.ndarray, "H W"]
    classes: Int64[np.ndarray, " N"]
    crowd: Bool[np.ndarray, " N"]


class Code(ABC):
    """What the numbers in label maps mean. `colors`: they are colours, packed as r * 65536 + g * 256 + b."""

    vocabulary: Vocabulary
    colors: bool

    @abstractmethod
    def part(self, number: int) -> Part:
        """What a number in a label map stands for."""

    @abstractmethod
    def name(self, number: int) -> str:
        """A number in a label map, as messages call it."""

    def meaning(self, number: int) -> int:
        """The class of a number in a label map, VOID or UNKNOWN."""
        return self.part(number).meaning

    def decode(self, values: Integer[np.ndarray, "H W"], place: Path) -> Truth:
        """The segments, in the order of their classes and instances.

        Raises DataError naming `place`, the number and its first pixel, where a number is UNKNOWN.
        """
        numbers, _ = distinct(values)
        parts = [self.part(int(number)) for number in numbers]
        for number, part in zip(numbers, parts, strict=True):
            if part.meaning == UNKNOWN:
                y, x = first(values, int(number))
                raise DataError(
                    f"{place}: {self.name(int(number))} at (y {y}, x {x}) is no class: {self}; "
                    "`maskfirst check` finds all such"
                )
        present = sorted({part for part in parts if part.meaning != VOID})
        order = {part: index for index, part in enumerate(present)}
        indices = np.array([order.get(part, VOID) for part in parts], np.int32)
        if values.itemsize > 2:
            ids = indices[np.searchsorted(numbers, values)]
        else:
            table = np.zeros(int(numbers[-1]) + 1, np.int32)
            table[numbers] = indices
            ids = table[values]
        classes = np.array([part.meaning for part in present], np.int64)
        return Truth(ids, classes, np.array([part.crowd for part in present], bool))


@dataclass(frozen=True)
class Coding(Code):
    """Numbers that are classes, one segment a class.

    `ignore` marks pixels without a class (VOID). `shift` is added to every other number; where it is negative, numbers
    that fall below 0 are VOID too: -1 is "0 is unlabelled, classes count from 1". `ids` says instead which class, by index
    or name, each number stands for, None for VOID. `colors`: label maps are painted in the vocabulary's colours, black
    being VOID where no class is black.
    """

    vocabulary: Vocabulary
    shift: int = 0
    ignore: int = 255
    ids: Mapping[int, int | str | None] | None = None
    colors: bool = False

    def __post_init__(self) -> None:
        if (self.ids is not None) + self.colors + (self.shift != 0) > 1:
            raise DataError(
                "set one of `shift`, `ids` and `colors`, as each alone says what a label map's numbers mean"
            )
        _ = self._table

    @functools.cached_property
    def _table(self) -> Mapping[int, int] | None:
        """The class of each number, where that is not plain arithmetic."""
        names = self.vocabulary.names
        if self.colors:
            table = {red << 16 | green << 8 | blue: c for c, (red, green, blue) in enumerate(self.vocabulary.colors)}
            if len(table) < len(names):
                raise DataError(
                    "`colors: true` needs a colour of its own for every class; some share one in this vocabulary"
                )
            return {0: VOID} | table
        if self.ids is None:
            return None
        table = {}
        for number, meant in self.ids.items():
            if isinstance(meant, str) and meant not in names:
                raise DataError(f"ids: {number} stands for unknown class '{meant}'.{nearest(meant, names)}")
            if isinstance(meant, int) and not 0 <= meant < len(names):
                raise DataError(
                    f"ids: {number} stands for class {meant}, but there are {len(names)} (0..{len(names) - 1})"
                )
            table[number] = VOID if meant is None else names.index(meant) if isinstance(meant, str) else meant
        return table

    def part(self, number: int) -> Part:
        if self._table is not None:
            return Part(VOID if number == self.ignore and not self.colors else self._table.get(number, UNKNOWN))
        shifted = number + self.shift
        if number == self.ignore or (self.shift < 0 and shifted < 0):
            return Part(VOID)
        return Part(shifted if 0 <= shifted < len(self.vocabulary) else UNKNOWN)

    def __str__(self) -> str:
        count = len(self.vocabulary)
        if self.colors:
            return f"{count} classes by colour, black for none"
        if self.ids is not None:
            return f"{count} classes by `ids`, ignore {self.ignore}"
        return f"{count} classes, ignore {self.ignore}" + (f", shift {self.shift}" if self.shift else "")

    def name(self, number: int) -> str:
        return color_name(number) if self.colors else f"value {number}"


class Merged(Code):
    """A coding of many classes as one of fewer: each of the new ones takes some of the old ones in."""

    def __init__(self, fine: Code, merge: Mapping[str, Sequence[str]]) -> None:
        """`merge`: name -> the old names that count as it, NO_CLASS -> those that count as no class at all.

        The other classes stay. A name that is new comes where its first member was, with that one's colour and number, and
        is a thing where all its members are. Raises DataError where a name is unknown or counted twice.
        """
        old = fine.vocabulary
        target: dict[str, str] = {}
        for name, members in merge.items():
            for member in members:
                if member not in old.names:
                    raise DataError(f"merge: {name}: unknown class '{member}'.{nearest(member, old.names)}")
                if target.setdefault(member, name) != name:
                    raise DataError(f"merge: '{member}' is counted as both '{target[member]}' and '{name}'")
        kept = [target.get(name, name) for name in old.names]
        names = tuple(dict.fromkeys(name for name in kept if name != NO_CLASS or NO_CLASS not in merge))
        if not names:
            raise DataError(f"merge: leaves no class at all; {NO_CLASS} takes every one in")
        # A class that stays keeps its own colour and number, even where a member comes before it.
        source = [old.names.index(name) if name in old.names else kept.index(name) for name in names]
        things = {
            index
            for index, name in enumerate(names)
            if all(place in old.things for place, goal in enumerate(kept) if goal == name)
        }
        self.fine, self.colors = fine, fine.colors
        self.vocabulary = Vocabulary(
            names,
            frozenset(things),
            tuple(old.colors[index] for index in source),
            tuple(old.ids[index] for index in source),
        )
        self._classes = [names.index(name) if name in names else VOID for name in kept]

    def part(self, number: int) -> Part:
        part = self.fine.part(number)
        return part if part.meaning < 0 else part._replace(meaning=self._classes[part.meaning])

    def name(self, number: int) -> str:
        return self.fine.name(number)

    def __str__(self) -> str:
        return f"{self.fine}, merged into {len(self.vocabulary)}"


@dataclass(frozen=True)
class Numbered(Code):
    """Numbers that tell instances apart: each is a segment of a thing class; stuff is one segment a class.

    `split` gives the class, by index (or VOID, or UNKNOWN), and the instance of a number, None where it stands for a group
    of things that are not told apart: a crowd. `what` describes the numbers for messages.
    """

    vocabulary: Vocabulary
    split: Callable[[int], tuple[int, int | None]]
    what: str
    colors: bool = False

    def part(self, number: int) -> Part:
        index, instance = self.split(number)
        if index not in self.vocabulary.things:
            return Part(index)
        return Part(index, -1, True) if instance is None else Part(index, instance)

    def name(self, number: int) -> str:
        return color_name(number) if self.colors else f"value {number}"

    def __str__(self) -> str:
        return f"{len(self.vocabulary)} classes as {self.what}"


def color_name(number: int) -> str:
    """A packed colour, as messages call it."""
    return f"color ({number >> 16}, {number >> 8 & 255}, {number & 255})"


def distinct(values: Integer[np.ndarray, "H W"]) -> tuple[Integer[np.ndarray, " N"], Integer[np.ndarray, " N"]]:
    """The numbers that occur, ascending, and how often each does."""
    if values.itemsize > 2:
        numbers, counts = np.unique(values, return_counts=True)
        return numbers, counts
    counts = np.bincount(values.ravel())
    numbers = np.flatnonzero(counts)
    return numbers, counts[numbers]


def first(values: Integer[np.ndarray, "H W"], number: int) -> tuple[int, int]:
    """(y, x) of the first pixel, row by row, that holds `number`."""
    y, x = divmod(int((values == number).argmax()), values.shape[1])
    return y, x
