"""Pictures and label maps in folders, paired by name; the reader that all data sets of such pairs share."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from maskfirst.contracts import Dataset
from maskfirst.data.coding import Code, Coding, DataError, Merged, Truth
from maskfirst.data.components import Components
from maskfirst.data.images import IMAGE_ENDINGS, read_image, read_label_map
from maskfirst.data.vocabulary import from_names, load, of_folder
from maskfirst.errors import nearest
from maskfirst.types import Sample, Vocabulary

T = TypeVar("T")


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


class Paired(Dataset):
    """Pairs of pictures and label maps on disk. Abstract but for the listing, the coding and the opening of things.

    A listing may have images without labels, which are an error as soon as the samples are asked for, so that
    `maskfirst check` can tell of them all.
    """

    def __init__(self, listing: Listing, coding: Code, components: Components | None = None) -> None:
        """`components`: opens the things that the coding leaves whole. Raises DataError where the listing is empty."""
        if not listing.pairs and not listing.images:
            raise DataError(f"{listing.place}: no pictures here ({', '.join(IMAGE_ENDINGS)}); the split is empty")
        self.listing = listing
        self.coding = coding
        self.components = components
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

    def shown(self, index: int) -> frozenset[int]:
        label = self.pairs[index].label
        return frozenset(self.coding.decode(read_label_map(label, self.coding.colors), label).classes.tolist())

    def sample(self, pair: Pair) -> Sample:
        """The pair as a sample. Raises ImageError and DataError."""
        image, values = self.read(pair)
        truth = self.coding.decode(values, pair.label)
        return to_sample(image, truth if self.components is None else self.components.open(truth), pair.key)

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
        merge: dict[str, list[str]] | None = None,
        instances: Literal["components"] | None = None,
        smallest: int = 1,
        ending: str = ".png",
        limit: int | None = None,
    ) -> None:
        """`images` and `labels`: folders in `root`, searched with all folders inside, `{split}` being the split's name.

        A picture's label map has the picture's path and stem, followed by `ending`. `vocabulary`: a bundled name, a
        YAML or text file in `root`, a list of names, or None for the `classes.yaml` or `classes.txt` in `root`.
        `shift`, `ignore`, `ids`, `colors`: what the label maps' numbers mean (see Coding). `merge`: name -> the names that
        count as it, which may be new; `void` takes in those that are no class (see Merged). `instances`: `components` opens
        things where they do not touch, those of less than `smallest` px together as a crowd (see Components). `limit`: use
        so many pairs. Raises DataError or VocabularyError.
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
        code: Code = Coding(words, shift, ignore, ids, colors)
        if merge is not None:
            code = Merged(code, merge)
        super().__init__(listing, code, opened(code.vocabulary, instances, smallest))


def to_sample(image: UInt8[Tensor, "3 H W"], truth: Truth, key: str) -> Sample:
    """A picture and its truth as what a data set yields."""
    classes, crowd = torch.from_numpy(truth.classes), torch.from_numpy(truth.crowd)
    return Sample(image, torch.from_numpy(truth.ids)[None], classes, crowd, key)


def opened(vocabulary: Vocabulary, instances: Literal["components"] | None, smallest: int) -> Components | None:
    """What the keys `instances` and `smallest` of a data set of label maps ask for."""
    return None if instances is None else Components(vocabulary.things, smallest)


def match(
    root: Path,
    images: str,
    labels: str,
    ending: str = ".png",
    limit: int | None = None,
    image_endings: tuple[str, ...] = IMAGE_ENDINGS,
) -> Listing:
    """The pairs of two folders in `root`: label maps have their picture's path and stem, followed by `ending`.

    `image_endings`: what follows the stem in the names of pictures.
    """
    pictures, maps = files(folder(root, images), image_endings), files(folder(root, labels), (ending,))
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


def choose(split: str, known: Mapping[str, T], place: str) -> T:
    """What `known` calls `split`. Raises DataError where it knows none of that name."""
    if split not in known:
        raise DataError(f"{place}: no split '{split}'.{nearest(split, known)} Known: {', '.join(known)}.")
    return known[split]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
