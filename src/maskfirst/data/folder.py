"""Pictures and label maps in folders, paired by name; the reader that all data sets of such pairs share."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int32, Integer, UInt8
from torch import Tensor

from maskfirst.contracts import Dataset
from maskfirst.data.images import IMAGE_ENDINGS, read_image, read_label_map
from maskfirst.data.vocabulary import from_names, load, of_folder
from maskfirst.errors import UserError, nearest
from maskfirst.types import VOID, Sample, Vocabulary

UNKNOWN = -2
"""In place of a class: a number that a label map should not hold."""


class DataError(UserError):
    """A data folder, or a label map in it, that is not as the recipe says."""


@dataclass(frozen=True)
class Pair:
    """A picture and its label map on disk; `key` is the picture's path in its folder without the ending."""

    key: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Listing:
    """What a split holds: the pairs in order of their keys, images without a label, labels without an image."""

    place: str
    pairs: tuple[Pair, ...]
    images: tuple[Path, ...] = ()
    labels: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Coding:
    """What the numbers in label maps mean.

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

    def meaning(self, number: int) -> int:
        """The class of a number in a label map, VOID or UNKNOWN."""
        if self._table is not None:
            return VOID if number == self.ignore and not self.colors else self._table.get(number, UNKNOWN)
        shifted = number + self.shift
        if number == self.ignore or (self.shift < 0 and shifted < 0):
            return VOID
        return shifted if 0 <= shifted < len(self.vocabulary) else UNKNOWN

    def __str__(self) -> str:
        count = len(self.vocabulary)
        if self.colors:
            return f"{count} classes by colour, black for none"
        if self.ids is not None:
            return f"{count} classes by `ids`, ignore {self.ignore}"
        return f"{count} classes, ignore {self.ignore}" + (f", shift {self.shift}" if self.shift else "")

    def name(self, number: int) -> str:
        """A number in a label map, as messages call it."""
        return f"color ({number >> 16}, {number >> 8 & 255}, {number & 255})" if self.colors else f"value {number}"

    def decode(
        self, values: Integer[np.ndarray, "H W"], place: Path
    ) -> tuple[Int32[np.ndarray, "H W"], Int[np.ndarray, " N"]]:
        """The index into the classes present of every pixel, VOID for none; and these classes, ascending.

        Raises DataError naming `place`, the number and its first pixel, where a number is UNKNOWN.
        """
        numbers, _ = distinct(values)
        classes = np.array([self.meaning(int(number)) for number in numbers])
        if UNKNOWN in classes:
            number = int(numbers[classes.tolist().index(UNKNOWN)])
            y, x = first(values, number)
            raise DataError(
                f"{place}: {self.name(number)} at (y {y}, x {x}) is no class: {self}; `maskfirst check` finds all such"
            )
        present = np.unique(classes[classes != VOID])
        indices = np.where(classes == VOID, VOID, np.searchsorted(present, classes)).astype(np.int32)
        if values.itemsize > 2:
            return indices[np.searchsorted(numbers, values)], present
        table = np.zeros(int(numbers[-1]) + 1, np.int32)
        table[numbers] = indices
        return table[values], present


class Paired(Dataset):
    """Pairs of pictures and label maps on disk, one segment a class. Abstract but for the listing and the coding.

    A listing may have images without labels, which are an error as soon as the samples are asked for, so that
    `maskfirst check` can tell of them all.
    """

    def __init__(self, listing: Listing, coding: Coding) -> None:
        """Raises DataError where the listing is empty."""
        if not listing.pairs and not listing.images:
            raise DataError(f"{listing.place}: no pictures here ({', '.join(IMAGE_ENDINGS)}); the split is empty")
        self.listing = listing
        self.coding = coding
        self.vocabulary = coding.vocabulary

    @functools.cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs. Raises DataError where images have no labels."""
        lost = self.listing.images
        if lost:
            raise DataError(
                f"{self.listing.place}: {len(lost)} of {len(lost) + len(self.listing.pairs)} images have no label map: "
                f"{', '.join(path.name for path in lost[:3])}{', ...' if len(lost) > 3 else ''}; "
                "add them or remove the images, `maskfirst check` lists all"
            )
        return self.listing.pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def keys(self) -> Sequence[str]:
        return [pair.key for pair in self.pairs]

    def __getitem__(self, index: int) -> Sample:
        return self.sample(self.pairs[index])

    def sample(self, pair: Pair) -> Sample:
        """The pair as a sample. Raises ImageError and DataError."""
        image, values = self.read(pair)
        ids, classes = self.coding.decode(values, pair.label)
        return Sample(
            image,
            torch.from_numpy(ids)[None],
            torch.from_numpy(classes).long(),
            torch.zeros(len(classes), dtype=torch.bool),
            pair.key,
        )

    def read(self, pair: Pair) -> tuple[UInt8[Tensor, "3 H W"], Integer[np.ndarray, "H W"]]:
        """The picture, and the numbers in its label map as they are (see read_label_map).

        Raises ImageError where a file cannot be read, DataError where their sizes differ.
        """
        image, values = read_image(pair.image), read_label_map(pair.label, self.coding.colors)
        size = tuple(image.shape[-2:])
        if values.shape != size:
            turned = "; was it drawn on the picture before its EXIF rotation?" if values.shape == size[::-1] else ""
            raise DataError(
                f"{pair.label}: {values.shape[1]} x {values.shape[0]} px, "
                f"but {pair.image} has {size[1]} x {size[0]} px{turned}"
            )
        return image, values


class Folder(Paired):
    """Any folder of pictures and label maps."""

    def __init__(
        self,
        root: str,
        images: str = "images/{split}",
        labels: str = "annotations/{split}",
        split: str = "train",
        vocabulary: str | list[str] | None = None,
        shift: int = 0,
        ignore: int = 255,
        ids: dict[int, int | str | None] | None = None,
        colors: bool = False,
        ending: str = ".png",
        limit: int | None = None,
    ) -> None:
        """`images` and `labels`: folders in `root`, searched with all folders inside, `{split}` being the split's name.

        A picture's label map has the picture's path and stem, followed by `ending`. `vocabulary`: a bundled name, a
        YAML or text file in `root`, a list of names, or None for the `classes.yaml` or `classes.txt` in `root`.
        `shift`, `ignore`, `ids`, `colors`: what the label maps' numbers mean (see Coding). `limit`: use so many pairs.
        Raises DataError or VocabularyError.
        """
        place = Path(root)
        folders = [template.replace("{split}", split) for template in (images, labels)]
        listing = match(place, folders[0], folders[1], ending, limit)
        if vocabulary is None:
            words = of_folder(place)
        elif isinstance(vocabulary, str):
            words = load(vocabulary, place)
        else:
            words = from_names(vocabulary)
        super().__init__(listing, Coding(words, shift, ignore, ids, colors))


def match(root: Path, images: str, labels: str, ending: str = ".png", limit: int | None = None) -> Listing:
    """The pairs of two folders in `root`: label maps have their picture's path and stem, followed by `ending`."""
    pictures, maps = files(folder(root, images), IMAGE_ENDINGS), files(folder(root, labels), (ending,))
    return Listing(
        str(root / images),
        tuple(Pair(key, path, maps[key]) for key, path in pictures.items() if key in maps)[:limit],
        tuple(path for key, path in pictures.items() if key not in maps),
        tuple(path for key, path in maps.items() if key not in pictures),
    )


def match_list(root: Path, images: str, labels: str, names: str, limit: int | None = None) -> Listing:
    """The pairs that the text file `names` in `root` lists, one stem a line. Raises DataError where a picture is missing."""
    pictures, maps = files(folder(root, images), IMAGE_ENDINGS), files(folder(root, labels), (".png",))
    try:
        listed = (root / names).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / names}: the list of the split's pictures cannot be read: {error}") from error
    missing = [stem for stem in listed if stem not in pictures]
    if missing:
        raise DataError(
            f"{root / names}: lists {len(missing)} pictures that {root / images} lacks: {', '.join(missing[:3])}"
        )
    return Listing(
        str(root / names),
        tuple(Pair(stem, pictures[stem], maps[stem]) for stem in listed if stem in maps)[:limit],
        tuple(pictures[stem] for stem in listed if stem not in maps),
    )


def folder(root: Path, inside: str) -> Path:
    """The folder `inside` of `root`. Raises DataError naming the first part that is missing and the nearest that is not."""
    path = root
    if not root.is_dir():
        beside = _folders(root.parent)
        raise DataError(f"{root}: no such folder.{nearest(root.name, beside)}")
    for part in Path(inside).parts:
        if not (path / part).is_dir():
            beside = _folders(path)
            there = f" It has: {', '.join(beside[:8])}." if beside else " It has no folders."
            raise DataError(f"{path}: no folder '{part}'.{nearest(part, beside)}{there}")
        path = path / part
    return path


def files(path: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder and all inside it, by their path in it without the ending, in order. Hidden ones are left out.

    Raises DataError where two differ in their endings alone.
    """
    found: dict[str, Path] = {}
    seen = set()
    for place, inner, names in os.walk(path, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in names:
            ending = next((ending for ending in endings if name.lower().endswith(ending.lower())), None)
            if ending is None or name.startswith("."):
                continue
            file = Path(place, name)
            key = file.relative_to(path).as_posix()[: -len(ending)]
            if key in found:
                raise DataError(f"{path}: {found[key].name} and {name} share a stem; rename or remove one")
            found[key] = file
    return dict(sorted(found.items()))


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


def choose(split: str, known: Mapping[str, str], place: str) -> str:
    """What `known` calls `split`. Raises DataError where it knows none of that name."""
    if split not in known:
        raise DataError(f"{place}: no split '{split}'.{nearest(split, known)} Known: {', '.join(known)}.")
    return known[split]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
