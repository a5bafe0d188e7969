"""Class vectors: a vector for every name, by which classes that no label shows are told from each other.

Read from safetensors, `.npy`, tables of attributes (`.csv`) and the text of word2vec tables; written as safetensors.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskfirst.data.vocabulary import load
from maskfirst.errors import closest, listed, nearest
from maskfirst.files import write_aside
from maskfirst.formats import FormatError

ENDINGS = (".safetensors", ".npy", ".csv", ".txt")
NAMES = ".names.txt"
"""What follows the stem of a file without names in that of the file beside it that has them, one a line."""
BACKGROUND = "background"
"""What the first column of the published word2vec tables is of."""
PUBLISHED = {66: "coco_48_17", 81: "coco_65_15"}
"""Columns of these tables -> the vocabulary whose order they have, after the background."""
PUBLISHED_WIDTH = 300
_MOST = 2**28
"""Bytes of a file; vectors of 4096 numbers for ten thousand names have 160 million."""
_Found = tuple[tuple[str, ...], Tensor, Mapping[str, str]]
"""Names, vectors and notes, before they are checked."""
_BUNDLED = resources.files("maskfirst.data") / "vectors"


@dataclass(frozen=True, eq=False)
class ClassVectors:
    """Names and a vector for each. `source`: where they are from, for messages. `notes`: what made them, by their word."""

    names: tuple[str, ...]
    vectors: Float[Tensor, "K D"]
    source: str = "class vectors"
    notes: Mapping[str, str] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> Float[Tensor, "K2 D"]:
        """The vectors of `names`, in their order. Raises FormatError for those that have none, each with the nearest known."""
        places = {name: index for index, name in enumerate(self.names)}
        missing = [name for name in names if name not in places]
        if missing:
            told = listed(f"'{name}'{_near(name, self.names)}" for name in missing)
            raise FormatError(
                f"{self.source}: no vector for {told}; it has {len(self.names)} names: add theirs, or leave the classes out"
            )
        return self.vectors[[places[name] for name in names]]


def read(source: str | Path, names: Sequence[str]) -> Float[Tensor, "K D"]:
    """The vectors of `names`, in their order, as 32-bit floats. See `read_all`. Raises FormatError."""
    return read_all(source).of(names)


def read_all(source: str | Path) -> ClassVectors:
    """All vectors of a file, or of a bundled table by its name.

    `.safetensors`: a tensor `vectors` (K, D), and in the metadata `names`, a JSON list. `.npy`: an array (K, D), with
    STEM.names.txt beside it, one name a line. `.csv`: a first line of attributes, then lines of a name and its numbers.
    `.txt`: numbers separated by commas, a column a name and a line a dimension, with STEM.names.txt beside it unless it is one
    of the published word2vec tables. Raises FormatError where it is none of these, where a name has no vector, two, or one of
    another width, and where a number is not finite.
    """
    if isinstance(source, str) and source in bundled():
        with resources.as_file(_BUNDLED / f"{source}.csv") as path:
            return _checked(*_table(path, source), source)
    path = Path(source)
    if path.suffix not in ENDINGS:
        raise FormatError(
            f"{path}: class vectors should end in {', '.join(ENDINGS)}, or be one of the bundled: "
            f"{', '.join(bundled())}.{nearest(str(source), bundled())}"
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FormatError(f"{path}: cannot be read: {error.strerror}.{nearest(path.name, beside)}") from error
    if size > _MOST:
        raise FormatError(f"{path}: {size} bytes; class vectors have at most {_MOST}")
    readers = {".safetensors": _safetensors, ".npy": _npy, ".csv": _table, ".txt": _columns}
    return _checked(*readers[path.suffix](path, str(path)), str(path))


def write(path: Path | str, found: ClassVectors) -> None:
    """Writes the safetensors form, aside; the notes go to the metadata. Raises FormatError, DiskError."""
    found = _checked(found.names, found.vectors, found.notes, str(path))
    metadata = {**found.notes, "names": json.dumps([*found.names], ensure_ascii=False)}
    with write_aside(path) as aside:
        save_file({"vectors": found.vectors.detach().cpu().contiguous()}, aside, metadata)


def bundled() -> tuple[str, ...]:
    """The names of the tables in the package."""
    return tuple(sorted(entry.name.removesuffix(".csv") for entry in _BUNDLED.iterdir() if entry.name.endswith(".csv")))


def _safetensors(path: Path, shown: str) -> _Found:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "vectors" not in file.keys() or "names" not in metadata:  # noqa: SIM118 (it is no mapping)
                raise FormatError(
                    f"{shown}: should have a tensor `vectors` (K, D) and, in its metadata, `names`, a JSON list of K; "
                    f"`maskfirst vectors` writes such files"
                )
            vectors = file.get_tensor("vectors")
        names = json.loads(metadata.pop("names"))
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{shown}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{shown}: metadata: `names` should be a JSON list of text")
    return tuple(names), vectors, metadata


def _npy(path: Path, shown: str) -> _Found:
    try:
        # Mapped, so that no memory is made for what is not there.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{shown}: no array of numbers in numpy's format: {error}") from error
    if array.dtype.kind not in "fiu":
        raise FormatError(f"{shown}: an array of {array.dtype}; it should hold numbers")
    return _names_beside(path), torch.from_numpy(np.array(array, np.float32)), {}


def _table(path: Path, shown: str) -> _Found:
    lines = _lines(path, shown)
    attributes = lines[0][1][1:]
    twice = [each for each in attributes if attributes.count(each) > 1]
    if not attributes or twice:
        what = f"attribute '{twice[0]}' occurs twice" if twice else "no attributes; it should name the columns"
        raise FormatError(f"{shown}: line 1: {what}")
    rows = [_numbers(cells[1:], len(attributes), f"{shown}: line {line}") for line, cells in lines[1:]]
    return tuple(cells[0].strip() for _, cells in lines[1:]), _stacked(rows, shown), {}


def _columns(path: Path, shown: str) -> _Found:
    lines = _lines(path, shown)
    count = len(lines[0][1])
    rows = [_numbers(cells, count, f"{shown}: line {line}") for line, cells in lines]
    vectors = _stacked(rows, shown).T.contiguous()
    beside = path.with_name(f"{path.stem}{NAMES}")
    if not beside.is_file() and len(rows) == PUBLISHED_WIDTH and count in PUBLISHED:
        return (BACKGROUND, *load(PUBLISHED[count]).names), vectors, {}
    return _names_beside(path), vectors, {}


def _lines(path: Path, shown: str) -> list[tuple[int, list[str]]]:
    """The cells of every line that has some, and its number counted from 1."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{shown}: cannot be read as text with commas: {error}") from error
    if not lines:
        raise FormatError(f"{shown}: nothing in it")
    return lines


def _numbers(cells: Sequence[str], count: int, place: str) -> list[float]:
    if len(cells) != count:
        raise FormatError(f"{place}: {len(cells)} numbers, where the first line has {count}; all should have as many")
    found = []
    for position, cell in enumerate(cells, 1):
        try:
            found.append(float(cell))
        except ValueError:
            raise FormatError(f"{place}: number {position} is {cell!r}") from None
        if not math.isfinite(found[-1]):
            raise FormatError(f"{place}: number {position} is {cell.strip()}; all should be finite")
    return found


def _stacked(rows: Sequence[Sequence[float]], shown: str) -> Float[Tensor, "N M"]:
    if not rows:
        raise FormatError(f"{shown}: no line of numbers")
    return torch.tensor(rows, dtype=torch.float32)


def _names_beside(path: Path) -> tuple[str, ...]:
    beside = path.with_name(f"{path.stem}{NAMES}")
    try:
        lines = beside.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: its names should be in {beside.name} beside it, one a line, which cannot be read: {error}"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _checked(names: tuple[str, ...], vectors: Tensor, notes: Mapping[str, str], shown: str) -> ClassVectors:
    if vectors.ndim != 2 or not vectors.numel() or not (vectors.is_floating_point() or vectors.dtype == torch.int64):
        raise FormatError(
            f"{shown}: vectors of shape {list(vectors.shape)}; they should be numbers (K, D), a row a name"
        )
    if len(names) != len(vectors):
        raise FormatError(f"{shown}: {len(names)} names for {len(vectors)} vectors of {vectors.shape[1]} numbers")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(names):
        raise FormatError(f"{shown}: {f'{twice[0]!r} occurs twice' if twice else 'a vector without a name'}")
    bad = (~vectors.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise FormatError(f"{shown}: vectors that are not finite: {listed(repr(names[index]) for index in bad)}")
    return ClassVectors(names, vectors.float(), shown, notes)


def _near(name: str, known: Iterable[str]) -> str:
    close = closest(name, known)
    return "" if close is None else f" ('{close}' is near)"
