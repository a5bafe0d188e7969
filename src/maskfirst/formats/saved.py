"""Saved: the masks that any tool has left in files, of one picture at a time, by the picture's name.

The forms, told apart by looking: COCO's instance JSON, its panoptic JSON with PNGs, and folders of `.npz` or of PNGs.
"""

import functools
import math
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from maskfirst.data.folder import files
from maskfirst.data.images import IMAGE_ENDINGS, PIXELS, read_label_map
from maskfirst.errors import UserError, listed, nearest
from maskfirst.formats import FormatError, rle
from maskfirst.formats.coco import load
from maskfirst.formats.coco_instances import CocoMasks, ToldMask
from maskfirst.formats.coco_panoptic import CocoPanoptic
from maskfirst.frames import Size
from maskfirst.types import Vocabulary

VALUES = 2**30
"""The most pixels that the masks of one picture may have together; opened as logits they take four bytes each."""
DEFLATED = 1032
"""The most bytes that one byte of a deflated file can stand for."""
ARRAYS = ("masks", "scores", "classes", "class_scores")
LOOK = 20
"""PNGs that are looked into to tell whether each holds one mask or all of a picture."""
ALONE = "its masks can be taken without their names (`names: false`)"


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of one picture. `names`: probabilities 0..1 of every name and, last, of no object (K1 = K + 1).

    None where the file does not say what the masks are, or was not asked.
    """

    masks: Bool[Tensor, "N H W"]
    names: Float64[Tensor, "N K1"] | None


Opener = Callable[[Size], Masks]
"""The masks of a picture of (height, width) px. Raises FormatError."""


@dataclass(frozen=True, eq=False)
class Saved:
    """All masks in `path`: what opens those of a picture, by what the file calls it, with or without an ending."""

    path: Path
    pictures: Mapping[str, Opener]
    _taken: dict[str, str] = field(default_factory=dict, init=False)

    def read(self, key: str, size: Size) -> Masks:
        """The masks of the picture `key`, which has `size` (height, width) px.

        A key is a picture's path without its ending, as a `Sample` has it. Where folders differ, the name alone is enough if
        no other picture has it. Raises UserError where there is no such picture, or its masks are of another size.
        """
        name = self._name(key)
        if self._taken.setdefault(name, key) != key:
            raise UserError(
                f"{self.path}: '{self._taken[name]}' and '{key}' would both have the masks of '{name}'; "
                "name the masks as the pictures, with their folders"
            )
        found = self.pictures[name](size)
        told = (found.masks.shape[-2], found.masks.shape[-1])
        if told != size:
            raise FormatError(
                f"{self.path}: the masks of '{name}' have {told[1]} x {told[0]} px, but the picture has "
                f"{size[1]} x {size[0]} px; masks must be of their picture's size"
            )
        return found

    def _name(self, key: str) -> str:
        """What the file calls the picture `key`: that, or that and an ending, or a path that ends alike."""
        last = PurePosixPath(key).name
        for called, known in ((key, self._wholes), (key, self._stems), (last, self._lasts)):
            names = known.get(called, [])
            if len(names) > 1:
                names = [name for name in names if _ends_alike(_stem(name), key)] or names
            if len(names) > 1:
                raise UserError(f"{self.path}: masks of {listed(names, 3)} could all be those of picture '{key}'")
            if names:
                return names[0]
        if not key:
            raise UserError(f"{self.path}: the picture has no name by which its masks are found; pass its `key`")
        there = listed(self._stems, 3) or "none"
        raise UserError(f"{self.path}: no masks of picture '{key}'.{nearest(key, self._stems)} It has: {there}.")

    @functools.cached_property
    def _wholes(self) -> Mapping[str, list[str]]:
        return {name: [name] for name in self.pictures}

    @functools.cached_property
    def _stems(self) -> Mapping[str, list[str]]:
        return _grouped(self.pictures, _stem)

    @functools.cached_property
    def _lasts(self) -> Mapping[str, list[str]]:
        return _grouped(self.pictures, lambda name: PurePosixPath(_stem(name)).name)


def open_saved(path: Path | str, vocabulary: Vocabulary | None) -> Saved:
    """The masks in `path`, a file or a folder; JSON is read at once, all else when its picture is asked for.

    `vocabulary`: what the names that a file tells must be among; None: masks alone, whatever they are called. A category of
    COCO's counts by its name, or by its number, as one of `vocabulary.ids`, where the file has no categories. A score is the
    probability that a mask is an object, 1 where none is told; class scores share that out over the names, and are themselves
    that probability, as their sum and at most 1, where there is no score. Crowds are left out.
    Raises UserError, also when names are wanted that the vocabulary does not have.
    """
    path = Path(path)
    if path.is_dir():
        return Saved(path, _folder(path, vocabulary))
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder of masks.{nearest(path.name, beside)}")
    if path.suffix.lower() != ".json":
        raise UserError(f"{path}: masks should be a JSON file of COCO's, or a folder of .npz files or PNGs")
    try:
        panoptic = b'"segments_info"' in path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    return Saved(path, _panoptic(path, vocabulary) if panoptic else _instances(path, vocabulary))


def _instances(path: Path, vocabulary: Vocabulary | None) -> dict[str, Opener]:
    file = CocoMasks(path)
    own = file.categories
    classes: Mapping[int, int] = {}
    if vocabulary is not None:
        if file.nameless is not None:
            raise FormatError(f"{file.nameless}: no category_id and no class_scores, which others have; {ALONE}")
        told = None if own is None else dict(zip(own.ids, own.names, strict=True))
        classes = _classes(told, file.numbers, vocabulary, path)

    def names(told: ToldMask, words: Vocabulary) -> np.ndarray | None:
        if told.class_scores is not None:
            order = words.names if own is None else own.names
            return _row(_shares(told.class_scores, order, words, told.place), told.score, told.place)
        return None if told.category is None else _row(_only(classes[told.category], words), told.score, told.place)

    def opener(key: Any, size: Size) -> Opener:
        def opened(_: Size) -> Masks:
            found = file.read(key)
            rows = [] if vocabulary is None else [names(each, vocabulary) for each in found]
            return Masks(rle.decode([each.rle for each in found], size), _stacked(rows, vocabulary))

        return opened

    return _unique(
        ((image.file_name, opener(key, (image.height, image.width))) for key, image in file.images.items()), path
    )


def _panoptic(path: Path, vocabulary: Vocabulary | None) -> dict[str, Opener]:
    categories, numbers = _look(path)
    classes = {} if vocabulary is None else _classes(categories, numbers, vocabulary, path)
    # Without categories numbers stand for themselves.
    own = None
    if categories is None:
        numbers = numbers or [0]
        own = Vocabulary(tuple(map(str, numbers)), frozenset(), ((0, 0, 0),) * len(numbers), tuple(numbers))
    file = CocoPanoptic(path, vocabulary=own)
    number_of = {index: number for number, index in file.index.items()}

    def opener(key: Any) -> Opener:
        def opened(_: Size) -> Masks:
            segments = file.read(key).segments
            segments = segments[~segments.crowd]
            rows = []
            for index, score in zip(segments.classes.tolist(), segments.scores.tolist(), strict=True):
                if vocabulary is not None:
                    rows.append(_row(_only(classes[number_of[index]], vocabulary), score, f"{path}: picture {key!r}"))
            return Masks(segments.masks, _stacked(rows, vocabulary))

        return opened

    return _unique(((name, opener(key)) for key, name in file.file_names.items()), path)


def _look(path: Path) -> tuple[dict[int, str] | None, list[int]]:
    """A panoptic file's categories, None where it has none, and the numbers of those that its segments are of."""
    numbers: set[int] = set()

    def look(found: dict[str, Any]) -> Any:
        if "category_id" in found:
            numbers.update({found["category_id"]} if type(found["category_id"]) is int else ())
            return None
        if "categories" in found:
            return found["categories"]
        return (found.get("id"), found.get("name")) if "segments_info" not in found else None

    told = load(path, look)
    pairs = told if isinstance(told, list) else []
    # What is wrong with those that this leaves out is told when the file is opened.
    categories = {
        each[0]: each[1]
        for each in pairs
        if isinstance(each, tuple) and type(each[0]) is int and isinstance(each[1], str)
    }
    return categories or None, sorted(numbers)


def _folder(path: Path, vocabulary: Vocabulary | None) -> dict[str, Opener]:
    arrays, maps = files(path, (".npz",)), files(path, (".png",))
    if arrays and maps:
        raise UserError(f"{path}: has .npz files as well as PNGs; keep the masks of one form in a folder of their own")
    if arrays:
        return {name: functools.partial(_npz, file, vocabulary) for name, file in arrays.items()}
    # A folder without a file is a picture without a mask.
    empty = [each for each in path.rglob("*") if each.is_dir() and not any(each.iterdir())]
    if not maps and not empty:
        raise UserError(f"{path}: no masks here; looked for .npz files and PNGs")
    if any("/" not in name for name in maps) or not all(_is_one(file) for file in list(maps.values())[:LOOK]):
        return {name: functools.partial(_numbered, file) for name, file in maps.items()}
    pictures: dict[str, list[Path]] = {each.relative_to(path).as_posix(): [] for each in sorted(empty)}
    for file in maps.values():
        pictures.setdefault(file.parent.relative_to(path).as_posix(), []).append(file)
    return {name: functools.partial(_apiece, some) for name, some in pictures.items()}


def _is_one(file: Path) -> bool:
    """Whether a PNG holds one mask at most."""
    return len(np.unique(np.append(read_label_map(file), 0))) <= 2


def _numbered(file: Path, size: Size) -> Masks:
    """The masks of a PNG in which each has a number, and 0 is none."""
    values = read_label_map(file)
    numbers = np.unique(values[values != 0])
    _check_count(len(numbers), values.shape, file)
    return Masks(torch.from_numpy(values[None] == numbers[:, None, None]), None)


def _apiece(some: Sequence[Path], size: Size) -> Masks:
    """The masks of PNGs in which each is alone, 0 outside and one number inside."""
    _check_count(len(some), size, some[0].parent if some else Path())
    masks = np.zeros((len(some), *size), bool)
    for mask, file in zip(masks, some, strict=True):
        values = read_label_map(file)
        if values.shape != size:
            raise FormatError(
                f"{file}: a mask of {values.shape[1]} x {values.shape[0]} px, but the picture '{file.parent.name}' has "
                f"{size[1]} x {size[0]} px; masks must be of their picture's size"
            )
        if len(numbers := np.unique(values[values != 0])) > 1:
            raise FormatError(
                f"{file}: holds the numbers {listed(map(str, numbers), 3)}; a mask has 0 outside and one number inside"
            )
        mask[:] = values != 0
    return Masks(torch.from_numpy(masks), None)


def _npz(file: Path, vocabulary: Vocabulary | None, size: Size) -> Masks:
    """The masks in an `.npz` file; sizes are checked before anything is read, and pickled objects are never read."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = {name: _array(archive, name, file) for name in _arrays(archive, file)}
    except FormatError:
        raise
    except MemoryError as error:
        raise FormatError(f"{file}: not enough memory to read it") from error
    except Exception as error:
        # Only zipfile and numpy ran, on bytes that anyone may have written: whatever they raise speaks of the file.
        raise FormatError(f"{file}: broken or cut short: {error or type(error).__name__}") from error
    masks = found["masks"]
    if masks.dtype.kind == "f":
        if masks.size and not (masks.min() >= 0 and masks.max() <= 1):
            raise FormatError(f"{file}: masks: floats should lie in 0..1; of logits save `masks > 0`")
        masks = masks > 0.5
    masks = torch.from_numpy(np.ascontiguousarray(masks != 0))
    N = len(masks)
    for name in ARRAYS[1:]:
        if name in found and (len(found[name].shape) != 1 + (name == "class_scores") or len(found[name]) != N):
            wanted = f"({N}, {len(vocabulary) if vocabulary else 'K'})" if name == "class_scores" else f"({N},)"
            raise FormatError(f"{file}: {name} of shape {found[name].shape}; {N} masks need {wanted}")
    if vocabulary is None or (N and "classes" not in found and "class_scores" not in found):
        return Masks(masks, None)
    scores = found["scores"].astype(np.float64).tolist() if "scores" in found else [None] * N
    if "class_scores" in found:
        told = found["class_scores"].tolist()
        shares = [_shares(one, vocabulary.names, vocabulary, f"{file}: mask {i}") for i, one in enumerate(told)]
    else:
        indices = _indices(found["classes"].tolist() if N else [], vocabulary, file)
        shares = [_only(index, vocabulary) for index in indices]
    rows = [_row(*one, f"{file}: mask {i}") for i, one in enumerate(zip(shares, scores, strict=True))]
    return Masks(masks, _stacked(rows, vocabulary))


def _arrays(archive: zipfile.ZipFile, file: Path) -> list[str]:
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in archive.infolist()):
        raise FormatError(f"{file}: compressed in a way that numpy does not; save it by `numpy.savez_compressed`")
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    for name in names:
        if name not in ARRAYS:
            raise FormatError(f"{file}: unknown array '{name}'.{nearest(name, ARRAYS)} Known: {', '.join(ARRAYS)}.")
    if "masks" not in names:
        raise FormatError(f"{file}: no array 'masks', (N, height, width)")
    return names


def _array(archive: zipfile.ZipFile, name: str, file: Path) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise FormatError(f"{file}: {name}: an array of a version of numpy's format that is not known, {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise FormatError(f"{file}: {name}: holds pickled objects, which are not read; save plain numbers or text")
    kinds = {"masks": "biuf", "classes": "iuU"}.get(name, "iuf")
    if dtype.kind not in kinds:
        raise FormatError(f"{file}: {name}: an array of {dtype}; it should hold {_KINDS[kinds]}")
    if name == "masks":
        if len(shape) != 3:
            raise FormatError(f"{file}: masks of shape {shape}; it should be (N, height, width)")
        _check_count(shape[0], shape[1:], file)
    # By Python's own integers, which do not overflow. What an archive says of itself need not be true, but its size is.
    claimed = math.prod(shape, start=dtype.itemsize)
    there = min(archive.getinfo(f"{name}.npy").file_size, DEFLATED * file.stat().st_size)
    if claimed > there:
        raise FormatError(f"{file}: {name}: claims {claimed} bytes, and {there} are there; not read")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


_KINDS = {"biuf": "true and false, or numbers", "iuU": "indices or names", "iuf": "numbers"}


def _check_count(count: int, size: Sequence[int], file: Path) -> None:
    """Raises FormatError for more than can be opened."""
    height, width = size
    if height * width > PIXELS or count * height * width > VALUES:
        raise FormatError(
            f"{file}: {count} masks of {width} x {height} px; the limits are {PIXELS / 1e6:.4g} million px, and "
            f"{VALUES / 1e6:.4g} million in all masks together"
        )


def _classes(
    told: Mapping[int, str] | None, numbers: Sequence[int], vocabulary: Vocabulary, path: Path
) -> dict[int, int]:
    """The class of each number that a file uses: by the name that it tells, or else as one of the vocabulary's ids."""
    known = {number: index for index, number in enumerate(vocabulary.ids)}
    strange = [number for number in numbers if number not in (known if told is None else told)]
    if strange:
        raise FormatError(
            f"{path}: category_id {listed(map(str, strange), 5)} is not among the categories"
            f"{' of the vocabulary, and the file has none of its own' if told is None else ''}; {ALONE}"
        )
    if told is None:
        return {number: known[number] for number in numbers}
    indices = _indices([told[number] for number in numbers], vocabulary, path)
    return dict(zip(numbers, indices, strict=True))


def _indices(told: Sequence[int | str], vocabulary: Vocabulary, place: Path | str) -> list[int]:
    """The classes of names, or of indices. Raises FormatError that lists those that are none."""
    places: dict[int | str, int] = {name: index for index, name in enumerate(vocabulary.names)}
    places |= {index: index for index in range(len(vocabulary))}
    strange = list(dict.fromkeys(each for each in told if each not in places))
    if strange:
        near = [
            f"'{each}'{nearest(each, vocabulary.names)}" if isinstance(each, str) else str(each) for each in strange
        ]
        raise FormatError(f"{place}: classes that the vocabulary does not have: {listed(near, 5)}; {ALONE}")
    return [places[each] for each in told]


def _only(index: int, vocabulary: Vocabulary) -> Float64[np.ndarray, " K"]:
    """Class scores that are all of one name."""
    return np.eye(len(vocabulary))[index]


def _shares(told: Any, order: Sequence[str], vocabulary: Vocabulary, place: str) -> Float64[np.ndarray, " K"]:
    """Class scores by the vocabulary, from numbers in the `order` of these names, or by name. Untrusted."""
    if isinstance(told, list) and len(told) == len(order):
        told = dict(zip(order, told, strict=True))
    if not isinstance(told, dict):
        got = f"{len(told)} of them" if isinstance(told, list) else repr(told)
        raise FormatError(f"{place}: class_scores should be {len(order)} numbers, or numbers by name, got {got}")
    values = list(told.values())
    if any(type(value) not in (int, float) or not 0 <= value <= 1 for value in values):
        raise FormatError(f"{place}: class_scores should be numbers in 0..1")
    shares = np.zeros(len(vocabulary))
    shares[_indices(list(told), vocabulary, f"{place}: class_scores")] = values
    return shares


def _row(shares: Float64[np.ndarray, " K"], score: float | None, place: str) -> Float64[np.ndarray, " K1"]:
    """Probabilities of the names and of no object."""
    if score is not None and not 0 <= score <= 1 + 1e-6:
        raise FormatError(f"{place}: score {score} should lie in 0..1, the probability of an object; {ALONE}")
    total = shares.sum()
    if not total or (score is None and total <= 1):
        return np.append(shares, 1 - total)
    sure = 1.0 if score is None else min(score, 1.0)
    return np.append(shares / total * sure, 1 - sure)


def _stacked(rows: Sequence[np.ndarray | None], vocabulary: Vocabulary | None) -> Float64[Tensor, "N K1"] | None:
    if vocabulary is None or any(row is None for row in rows):
        return None
    told = [row for row in rows if row is not None]
    return torch.from_numpy(np.stack(told) if told else np.zeros((0, len(vocabulary) + 1)))


def _stem(name: str) -> str:
    """Without the ending of a picture."""
    ending = PurePosixPath(name).suffix
    return name[: -len(ending)] if ending.lower() in IMAGE_ENDINGS else name


def _ends_alike(one: str, other: str) -> bool:
    """Whether a path is the end of another."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _grouped(names: Iterable[str], called: Callable[[str], str]) -> Mapping[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found[called(name)].append(name)
    return dict(found)


def _unique(pictures: Iterable[tuple[str, Opener]], path: Path) -> dict[str, Opener]:
    """Pictures by their file names, with `/` between folders. Raises FormatError where two have one."""
    found: dict[str, Opener] = {}
    for name, opener in pictures:
        name = name.replace("\\", "/").removeprefix("./")
        if name in found:
            raise FormatError(f"{path}: two pictures are called '{name}'")
        found[name] = opener
    return found
