"""Cityscapes: streets of 50 cities in 19 classes, 8 of them things, straight from its label and instance maps.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from maskfirst.data.coding import UNKNOWN, Coding, Numbered
from maskfirst.data.folder import Listing, Paired, choose, match
from maskfirst.data.vocabulary import load
from maskfirst.types import VOID, Vocabulary

Drawn = Literal["fine", "coarse"]

_LABELS = range(34)
"""All label ids, those that are not evaluated included; a licence plate has none, and is drawn as nothing."""
_INSTANCES = 1000
"""An instance map holds label * 1000 + instance, or the label alone: for stuff, and for groups of things."""
_PARTS = {
    "fine": {"train": "train", "val": "val", "test": "test"},
    "coarse": {"train": "train", "val": "val", "train_extra": "train_extra"},
}

_BROKEN = frozenset({"troisdorf/troisdorf_000000_000073"})
"""Of `train_extra`: a black frame without any truth."""


class Cityscapes(Paired):
    """The semantic task: `leftImg8bit/{split}/{city}` and label ids from `gtFine` or `gtCoarse`; 2,975 and 500 fine ones."""

    def __init__(
        self, root: str = "data/cityscapes", split: str = "train", truth: Drawn = "fine", limit: int | None = None
    ) -> None:
        """`split`: train, val, or test (without truth), coarse also train_extra. `limit`: use so many. Raises DataError."""
        words = load("cityscapes")
        ids = {label: _classes(words).get(label) for label in _LABELS}
        super().__init__(_listing(Path(root), split, truth, "labelIds", limit), Coding(words, ids=ids))


class CityscapesCoarse(Paired):
    """The semantic task, from the coarse polygons of `train_extra`, which leave the borders of things without a class."""

    def __init__(self, root: str = "data/cityscapes", limit: int | None = None) -> None:
        """Of 19,998 pictures those are passed over that are known to be broken. See Cityscapes."""
        words = load("cityscapes")
        ids = {label: _classes(words).get(label) for label in _LABELS}
        listing = _listing(Path(root), "train_extra", "coarse", "labelIds", None)
        pairs = [pair for pair in listing.pairs if pair.key not in _BROKEN]
        super().__init__(replace(listing, pairs=tuple(pairs)[:limit]), Coding(words, ids=ids))


class CityscapesPanoptic(Paired):
    """The panoptic task, from instance ids. Things that are drawn as a group are crowds, as in the official conversion."""

    def __init__(
        self, root: str = "data/cityscapes", split: str = "train", truth: Drawn = "fine", limit: int | None = None
    ) -> None:
        """See Cityscapes."""
        super().__init__(_listing(Path(root), split, truth, "instanceIds", limit), instance_ids(load("cityscapes")))


class CityscapesInstance(Paired):
    """The instance task, from instance ids: the 8 things, groups of them being crowds."""

    def __init__(
        self, root: str = "data/cityscapes", split: str = "train", truth: Drawn = "fine", limit: int | None = None
    ) -> None:
        """See Cityscapes."""
        words = load("cityscapes_things")
        super().__init__(_listing(Path(root), split, truth, "instanceIds", limit), instance_ids(words))


def instance_ids(vocabulary: Vocabulary) -> Numbered:
    """What `*_instanceIds.png` hold, by the label ids of a vocabulary; labels that it lacks are VOID."""
    classes = _classes(vocabulary)

    def split(number: int) -> tuple[int, int | None]:
        label, instance = divmod(number, _INSTANCES) if number >= _INSTANCES else (number, None)
        return classes.get(label, VOID if label in _LABELS else UNKNOWN), instance

    return Numbered(vocabulary, split, f"label * {_INSTANCES} + instance")


def _classes(vocabulary: Vocabulary) -> Mapping[int, int]:
    return {label: index for index, label in enumerate(vocabulary.ids)}


def _listing(root: Path, split: str, truth: Drawn, kind: str, limit: int | None) -> Listing:
    part, name = choose(split, _PARTS[truth], "cityscapes"), f"gt{truth.capitalize()}"
    pictures = ("_leftImg8bit.png", "_leftImg8bit.jpg")
    return match(root, f"leftImg8bit/{part}", f"{name}/{part}", f"_{name}_{kind}.png", limit, pictures)
