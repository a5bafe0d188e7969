"""COCO's panoptic files: a JSON that describes segments, and a folder of PNGs in which they are painted by number.

Kirillov et al., "Panoptic Segmentation", 2019, https://arxiv.org/abs/1801.00868; https://cocodataset.org/#format-data
A pixel's number is red + 256 green + 65536 blue; 0 is no segment.
"""

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from maskfirst.data.images import ImageError, read_label_map
from maskfirst.files import write_aside
from maskfirst.formats import FormatError
from maskfirst.formats.coco import Key, as_categories, categories, class_of, images, load, named, rows, shortest, write
from maskfirst.frames import Size
from maskfirst.types import VOID, SegmentMap, Vocabulary


class CocoPanoptic:
    """A file of truth or of predictions: the JSON is read once, PNGs picture by picture.

    `vocabulary`: the names, by default the file's own. `images`: the pictures that the file lists; predictions may list none.
    `warnings` counts, as pictures are read, what is odd but can mean one thing only.
    """

    def __init__(
        self, path: Path | str, folder: Path | str | None = None, vocabulary: Vocabulary | None = None
    ) -> None:
        """`folder`: where the PNGs lie, by default what the JSON is called without its ending.

        With `vocabulary`, classes are its indices, found as `coco.categories` says. Raises FormatError.
        """
        content = load(path, _compact)
        self.path = Path(path)
        self.folder = self.path.with_suffix("") if folder is None else Path(folder)
        self.vocabulary, self.index = categories(content, path, vocabulary)
        self.images = images(content, path) if "images" in content else {}
        self.warnings: Counter[str] = Counter()
        self._annotations: dict[Key, _Picture] = {}
        for position, row in enumerate(rows(content, "annotations", path)):
            self._add(row, f"{path}: annotations[{position}]")

    def keys(self) -> Sequence[Key]:
        """What the file calls its pictures: those that it lists, and those that it has segments of."""
        return list(self.images | self._annotations)

    @property
    def file_names(self) -> Mapping[Key, str]:
        """What pictures are called, or their PNGs where they are not listed."""
        listed = {key: image.file_name for key, image in self.images.items()}
        return {key: annotation.file_name for key, annotation in self._annotations.items()} | listed

    def read(self, key: Key) -> SegmentMap:
        """The segments of a picture in the file's order; one that its PNG does not show stays, without a pixel, and is counted.

        A picture that is listed without an annotation has no segments. Raises FormatError, KeyError.
        """
        listed = self.images.get(key)
        if key not in self._annotations and listed is not None:
            nothing = torch.zeros(0)
            void = torch.full((listed.height, listed.width), VOID, dtype=torch.int32)
            return SegmentMap(void, nothing.long(), nothing, nothing.bool())
        picture = self._annotations[key]
        png = self.folder / picture.file_name
        try:
            packed = read_label_map(png, colors=True)
        except ImageError as error:
            raise FormatError(f"{self.path}: picture {key!r}: {error}") from error
        if listed is not None and packed.shape != (listed.height, listed.width):
            raise FormatError(
                f"{png}: {list(packed.shape)} px (height, width); {self.path.name} says {[listed.height, listed.width]}"
            )
        return SegmentMap(
            torch.from_numpy(self._ids(packed, picture, png)),
            torch.tensor([segment.kind for segment in picture.segments], dtype=torch.int64),
            torch.tensor([segment.score for segment in picture.segments], dtype=torch.float),
            torch.tensor([segment.crowd for segment in picture.segments], dtype=torch.bool),
        )

    def shown(self, key: Key) -> frozenset[int]:
        """The classes of the segments that the JSON describes for a picture."""
        picture = self._annotations.get(key)
        return frozenset() if picture is None else frozenset(segment.kind for segment in picture.segments)

    def _add(self, row: Any, place: str) -> None:
        row = row if isinstance(row, dict) else {}
        key, name = named(row, "image_id", place)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FormatError(f"{place}: file_name {name!r} leads out of the folder of PNGs")
        if self.images and key not in self.images:
            raise FormatError(f"{place}: image_id {key!r} is none of the {len(self.images)} pictures")
        if key in self._annotations:
            raise FormatError(f"{place}: picture {key!r} has an annotation already, {self._annotations[key].file_name}")
        segments: dict[int, _Segment] = {}
        told = row.get("segments_info")
        if not isinstance(told, list):
            raise FormatError(f"{place}: no list of `segments_info`")
        for position, segment in enumerate(told):
            where = f"{place}: segments_info[{position}]"
            if not isinstance(segment, _Told):
                raise FormatError(f"{where}: should be an object with an `id` and a `category_id`")
            if type(segment.number) is not int or not 0 < segment.number < 2**24:
                raise FormatError(f"{where}: id {segment.number!r}; a PNG can hold 1..{2**24 - 1}, 0 is no segment")
            if segment.number in segments:
                raise FormatError(f"{where}: id {segment.number} occurs twice in picture {key!r}")
            if segment.crowd not in (0, 1):
                raise FormatError(f"{where}: iscrowd should be 0 or 1, got {segment.crowd!r}")
            if type(segment.score) not in (int, float) or not math.isfinite(segment.score):
                raise FormatError(f"{where}: score should be a number, got {segment.score!r}")
            kind = class_of(segment.category, self.index, where)
            segments[segment.number] = _Segment(kind, bool(segment.crowd), float(segment.score))
        self._annotations[key] = _Picture(name, np.array(list(segments), np.int32), tuple(segments.values()))

    def _ids(self, packed: Int32[np.ndarray, "H W"], picture: "_Picture", png: Path) -> Int32[np.ndarray, "H W"]:
        """The index of every pixel's segment."""
        flat = packed.ravel()
        # Run by run, as there are far fewer runs than pixels.
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        lengths = np.diff(starts, append=flat.size)
        values = flat[starts]
        values = (values >> 16) + (values & 0xFF00) + ((values & 0xFF) << 16)
        order = np.argsort(picture.numbers)
        known = np.concatenate([[0], picture.numbers[order]])
        indices = np.concatenate([[VOID], order]).astype(np.int32)
        places = np.searchsorted(known, values)
        strange = known[np.minimum(places, len(known) - 1)] != values
        if strange.any():
            number = values[strange.argmax()]
            raise FormatError(
                f"{png}: {lengths[values == number].sum()} px of a segment {number} that {self.path.name} does not describe"
            )
        missing = len(known) - len({0, *places.tolist()})
        if missing:
            self.warnings["segments without a pixel in their PNG"] += missing
        return np.repeat(indices[places], lengths).reshape(packed.shape)


class PanopticWriter:
    """Writes a JSON and a folder of PNGs, picture by picture; may be called from many threads.

    The JSON is there, whole, after `close`, and not before. Pictures lie in the order of their keys. Segments without a
    pixel are left out, since COCO's own tools refuse them.
    """

    def __init__(self, path: Path | str, vocabulary: Vocabulary, folder: Path | str | None = None) -> None:
        """`folder`: where PNGs go, by default what the JSON is called without its ending."""
        self.path = Path(path)
        self.folder = self.path.with_suffix("") if folder is None else Path(folder)
        self.vocabulary = vocabulary
        self._pictures: dict[Key, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def add(self, key: Key, file_name: str, found: SegmentMap, notes: Mapping[str, str] | None = None) -> None:
        """Writes the PNG of the picture that the file is to call `key`, named as its `file_name`. Raises DiskError.

        `notes`: text kept in the PNG.
        """
        _write_png(self.folder / _png(file_name), found, self.vocabulary, notes or {})
        self.add_records(key, file_name, (found.ids.shape[0], found.ids.shape[1]), records(found, self.vocabulary))

    def add_records(self, key: Key, file_name: str, size: Size, told: Sequence[Mapping[str, Any]]) -> None:
        """As `add`, of a picture of `size` (height, width) px whose PNG and `records` are there already."""
        picture = {"id": key, "file_name": file_name, "height": size[0], "width": size[1]}
        with self._lock:
            if key in self._pictures:
                raise ValueError(f"picture {key!r} is added twice")
            self._pictures[key] = (picture, {"image_id": key, "file_name": _png(file_name), "segments_info": [*told]})

    def close(self) -> None:
        """Raises DiskError."""
        ordered = [self._pictures[key] for key in sorted(self._pictures, key=lambda key: (isinstance(key, str), key))]
        write(
            self.path,
            {
                "images": [picture for picture, _ in ordered],
                "annotations": [annotation for _, annotation in ordered],
                "categories": as_categories(self.vocabulary),
            },
        )


def records(found: SegmentMap, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """A picture's `segments_info`: of every segment with a pixel its number, category, area, box, crowd mark and score.

    Numbers show as the colour of the class, or one beside it that is still free.
    """
    values = zip(
        numbers(found, vocabulary),
        found.classes.tolist(),
        found.scores.tolist(),
        found.crowd.tolist(),
        found.areas.tolist(),
        found.boxes.tolist(),
        strict=True,
    )
    return [
        {
            "id": number,
            "category_id": vocabulary.ids[index],
            "area": area,
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": int(crowd),
            "score": shortest(score),
        }
        for number, index, score, crowd, area, (left, top, right, bottom) in values
        if area
    ]


def numbers(found: SegmentMap, vocabulary: Vocabulary) -> list[int]:
    """What the PNG calls each segment."""
    taken, tries = {0}, Counter[int]()
    chosen = []
    for index in found.classes.tolist():
        number = 0
        while number in taken:
            turned = _turned(tries[index])
            red, green, blue = (value ^ bits for value, bits in zip(vocabulary.colors[index], turned, strict=True))
            number = red + 256 * green + 65536 * blue
            tries[index] += 1
        taken.add(number)
        chosen.append(number)
    return chosen


def painted(found: SegmentMap, vocabulary: Vocabulary) -> UInt8[np.ndarray, "H W 3"]:
    """What the PNG holds: the number of every pixel's segment as red + 256 green + 65536 blue, 0 for none."""
    # Void, index -1, is the last.
    colors = np.array([*numbers(found, vocabulary), 0], "<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    return colors.take(found.ids.numpy(), axis=0, mode="wrap")


def _png(file_name: str) -> str:
    return PurePosixPath(file_name).with_suffix(".png").as_posix()


def _turned(step: int) -> tuple[int, int, int]:
    """The bits of the `step`-th colour beside one that are turned in its channels; no two steps turn the same."""
    channels = [0, 0, 0]
    for place in range(step.bit_length()):
        # First the bits that can just be seen, the highest and the lowest last.
        channels[place % 3] |= (step >> place & 1) << (4, 5, 3, 6, 2, 1, 7, 0)[place // 3]
    return channels[0], channels[1], channels[2]


def _write_png(path: Path, found: SegmentMap, vocabulary: Vocabulary, notes: Mapping[str, str]) -> None:
    info = PngInfo()
    for name, note in notes.items():
        info.add_itxt(name, note)
    with write_aside(path) as aside:
        picture = Pillow.fromarray(painted(found, vocabulary))
        # Run-length matches, as in label maps: smaller and faster than the default search.
        picture.save(aside, format="PNG", pnginfo=info, compress_level=6, compress_type=3)


class _Told(NamedTuple):
    """What is kept of a segment in the JSON."""

    number: Any
    category: Any
    crowd: Any
    score: Any


class _Segment(NamedTuple):
    kind: int
    crowd: bool
    score: float


class _Picture(NamedTuple):
    file_name: str
    numbers: Int32[np.ndarray, " N"]
    segments: tuple[_Segment, ...]


def _compact(found: dict[str, Any]) -> Any:
    """Segments without what is not used."""
    if "category_id" not in found or "id" not in found:
        return found
    return _Told(found["id"], found["category_id"], found.get("iscrowd", 0), found.get("score", 1.0))
