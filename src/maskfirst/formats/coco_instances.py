"""COCO's instance files: one JSON of pictures, categories and annotations, or a bare list of results.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014; https://cocodataset.org/#format-data
"""

import contextlib
import math
import threading
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from maskfirst.formats import FormatError, rle
from maskfirst.formats.coco import (
    Image,
    Key,
    as_categories,
    categories,
    class_of,
    images,
    load,
    own_categories,
    rows,
    shortest,
    write,
)
from maskfirst.formats.instances import Instances
from maskfirst.formats.rle import Rle
from maskfirst.frames import Size
from maskfirst.types import Segments, Vocabulary


class CocoInstances:
    """A file of truth, or of predictions in the same form: read once, its masks opened picture by picture.

    `vocabulary`: the names, by default the file's own. `images`: its pictures, with and without annotations.
    `warnings` counts, as pictures are read, what is odd but can mean one thing only.
    """

    def __init__(self, path: Path | str, vocabulary: Vocabulary | None = None, scored: bool = False) -> None:
        """With `vocabulary`, classes are its indices, found as `coco.categories` says. `scored`: all must have a score.

        Raises FormatError.
        """
        content = load(path, _compact)
        self.path = Path(path)
        self.vocabulary, self.index = categories(content, path, vocabulary)
        self.images = images(content, path)
        self.warnings: Counter[str] = Counter()
        self._annotations = _Annotations(self.path, self.index, self.images, self.warnings)
        for position, row in enumerate(rows(content, "annotations", path)):
            self._annotations.add(row, f"annotations[{position}]", scored)

    def read(self, key: Key) -> Instances:
        """The instances of a picture, in the file's order; scores are 1 where it has none. Raises FormatError, KeyError."""
        return self._annotations.read(key)

    def shown(self, key: Key) -> frozenset[int]:
        """The classes of a picture's instances."""
        return frozenset(index for _, index, _ in self._annotations.rows[key])


@dataclass(frozen=True)
class ToldMask:
    """A mask, and what a file tells of it, which may be nothing. `place` is its own in the file; `category` is a number.

    `class_scores`: as the file has them, unchecked.
    """

    place: str
    rle: Rle
    category: int | None
    score: float | None
    class_scores: Any


class CocoMasks:
    """A file of the same form by any tool, in which classes and scores may be missing: masks with what is told of them.

    `images`: its pictures. `categories`: its own, None where it has none. `numbers`: those that it uses for categories.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises FormatError."""
        content = load(path, _compact)
        if isinstance(content, list):
            raise FormatError(f"{path}: a bare list of results does not tell its pictures' names; give it `images`")
        self.path = Path(path)
        self.images = images(content, path)
        # Tools that know no classes write an empty list.
        self.categories = own_categories(content, path) if content.get("categories") else None
        self._rows: dict[Key, list[tuple[str, _Row]]] = {key: [] for key in self.images}
        for position, row in enumerate(rows(content, "annotations", path)):
            place = f"{path}: annotations[{position}]"
            if not isinstance(row, _Row):
                raise FormatError(f"{place}: should be an object with an `image_id` and a `segmentation`")
            _check(row, self.images, place)
            if row.category is not None and type(row.category) is not int:
                raise FormatError(f"{place}: category_id should be a number, got {row.category!r}")
            if not row.crowd:
                self._rows[row.picture].append((place, row))

    @property
    def numbers(self) -> list[int]:
        return sorted({row.category for _, row in self._all() if row.category is not None})

    @property
    def nameless(self) -> str | None:
        """The place of the first mask without a class, where others have one; else None."""
        places = [place for place, row in self._all() if row.category is None and row.class_scores is None]
        return places[0] if 0 < len(places) < sum(1 for _ in self._all()) else None

    def _all(self) -> "Iterator[tuple[str, _Row]]":
        return chain.from_iterable(self._rows.values())

    def read(self, key: Key) -> list[ToldMask]:
        """The masks of a picture, in the file's order, without crowds. Raises FormatError, KeyError."""
        picture, found = self.images[key], self._rows[key]
        masks = rle.read([row.mask for _, row in found], (picture.height, picture.width), lambda i: found[i][0])
        return [
            ToldMask(place, mask, row.category, None if row.score is None else float(row.score), row.class_scores)
            for (place, row), mask in zip(found, masks, strict=True)
        ]


class Results(Mapping):
    """Scored predictions from a bare list, which numbers pictures and categories as a file of truth does.

    `Instances` of every picture of the truth by its key, none where the list has none; masks are opened when asked for. A plain
    Mapping, as what checks types would open an item of one that says of what.
    """

    def __init__(self, path: Path | str, truth: CocoInstances) -> None:
        """Raises FormatError."""
        content = load(path, _compact)
        if not isinstance(content, list):
            raise FormatError(
                f"{path}: results should be a list; a file with `images` of its own is opened as the truth is"
            )
        self.path = Path(path)
        self.warnings: Counter[str] = Counter()
        self._annotations = _Annotations(self.path, truth.index, truth.images, self.warnings)
        for position, row in enumerate(content):
            self._annotations.add(row, f"[{position}]", scored=True)

    def __getitem__(self, key: Key) -> Instances:
        """Raises FormatError, KeyError."""
        return self._annotations.read(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._annotations.pictures)

    def __len__(self) -> int:
        return len(self._annotations.pictures)


class InstancesWriter:
    """Writes one file of the instances of many pictures, with scores, boxes and areas; may be called from many threads.

    The file is there, whole, after `close`, and not before. Pictures lie in the order of their keys.
    """

    def __init__(self, path: Path | str, vocabulary: Vocabulary) -> None:
        self.path = Path(path)
        self.vocabulary = vocabulary
        self._pictures: dict[Key, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def add(self, key: Key, file_name: str, found: Segments | Instances) -> None:
        """The instances of the picture that the file is to call `key`."""
        found = Instances.of(found) if isinstance(found, Segments) else found
        self.add_records(key, file_name, found.size, records(found, self.vocabulary))

    def add_records(self, key: Key, file_name: str, size: Size, told: Sequence[Mapping[str, Any]]) -> None:
        """As `add`, of a picture of `size` (height, width) px whose `records` are there already."""
        picture = {"id": key, "file_name": file_name, "height": size[0], "width": size[1]}
        with self._lock:
            if key in self._pictures:
                raise ValueError(f"picture {key!r} is added twice")
            self._pictures[key] = (picture, [{"image_id": key, **record} for record in told])

    def close(self) -> None:
        """Raises DiskError."""
        ordered = [self._pictures[key] for key in sorted(self._pictures, key=lambda key: (isinstance(key, str), key))]
        annotations = [annotation for _, each in ordered for annotation in each]
        write(
            self.path,
            {
                "images": [picture for picture, _ in ordered],
                "annotations": [{"id": number} | each for number, each in enumerate(annotations, 1)],
                "categories": as_categories(self.vocabulary),
            },
        )


def records(found: Instances, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """What a file says of each instance, but for its picture."""
    values = zip(
        found.rles,
        found.classes.tolist(),
        found.scores.tolist(),
        found.crowd.tolist(),
        found.areas.tolist(),
        rle.boxes(found.rles).tolist(),
        strict=True,
    )
    return [
        {
            "category_id": vocabulary.ids[index],
            "segmentation": mask,
            "area": area,
            "bbox": box,
            "iscrowd": int(crowd),
            "score": score if found.scores.dtype == torch.float64 else shortest(score),
        }
        for mask, index, score, crowd, area, box in values
    ]


class _Row(NamedTuple):
    """What is kept of an annotation."""

    picture: Any
    category: Any
    mask: Any
    area: Any
    crowd: Any
    score: Any
    class_scores: Any


def _compact(found: dict[str, Any]) -> Any:
    """Annotations without what is not used, their polygons a quarter as large as lists of numbers are."""
    if "image_id" not in found or not ("category_id" in found or "segmentation" in found):
        return found
    mask = found.get("segmentation")
    if isinstance(mask, list):
        # What is wrong with one that this does not take is told when the picture is read.
        with contextlib.suppress(TypeError, OverflowError):
            mask = [array("d", polygon) for polygon in mask]
    return _Row(
        found["image_id"],
        found.get("category_id"),
        mask,
        found.get("area"),
        found.get("iscrowd", 0),
        found.get("score"),
        found.get("class_scores"),
    )


def _check(row: _Row, pictures: Collection[Key], where: str) -> None:
    """Raises FormatError that begins with `where`."""
    if type(row.picture) not in (int, str) or row.picture not in pictures:
        raise FormatError(f"{where}: image_id {row.picture!r} is none of the {len(pictures)} pictures")
    if row.crowd not in (0, 1):
        raise FormatError(f"{where}: iscrowd should be 0 or 1, got {row.crowd!r}")
    for name, number in (("area", row.area), ("score", row.score)):
        if number is not None and (type(number) not in (int, float) or not math.isfinite(number)):
            raise FormatError(f"{where}: {name} should be a number, got {number!r}")


class _Annotations:
    """The annotations of a file by picture, masks as the file has them until they are read."""

    def __init__(
        self, path: Path, index: Mapping[int, int], pictures: Mapping[Key, Image], warnings: Counter[str]
    ) -> None:
        self.path, self.index, self.pictures, self.warnings = path, index, pictures, warnings
        self.rows: dict[Key, list[tuple[str, int, _Row]]] = {key: [] for key in pictures}

    def add(self, row: Any, place: str, scored: bool) -> None:
        where = f"{self.path}: {place}"
        if not isinstance(row, _Row) or row.category is None:
            raise FormatError(f"{where}: should be an object with an `image_id` and a `category_id`")
        _check(row, self.rows, where)
        if scored and row.score is None:
            raise FormatError(f"{where}: no score; predictions need one each")
        self.rows[row.picture].append((place, class_of(row.category, self.index, where), row))

    def read(self, key: Key) -> Instances:
        picture = self.pictures[key]
        size = (picture.height, picture.width)
        found = self.rows[key]
        masks = rle.read([row.mask for _, _, row in found], size, lambda i: f"{self.path}: {found[i][0]}")
        for _, _, row in found:
            if isinstance(row.mask, list) and any(_leaves(polygon, size) for polygon in row.mask):
                self.warnings["polygons that reach outside of their picture, cut off there"] += 1
        covered = rle.area(masks).tolist()
        if 0 in covered:
            self.warnings["annotations without a pixel"] += covered.count(0)
        areas = [
            area if row.area is None else float(row.area) for area, (_, _, row) in zip(covered, found, strict=True)
        ]
        return Instances(
            masks,
            torch.tensor([index for _, index, _ in found], dtype=torch.int64),
            # 64 bits, as the order of almost equal scores decides over precision.
            torch.tensor([1.0 if row.score is None else row.score for _, _, row in found], dtype=torch.float64),
            torch.tensor([bool(row.crowd) for _, _, row in found], dtype=torch.bool),
            size,
            torch.tensor(areas, dtype=torch.float64),
        )


def _leaves(polygon: Any, size: tuple[int, int]) -> bool:
    """Whether it reaches more than one px beyond the picture; less is rounding."""
    points = np.asarray(polygon).reshape(-1, 2)
    return bool((points < -1).any() or (points[:, 0] > size[1] + 1).any() or (points[:, 1] > size[0] + 1).any())
