"""Pictures on disk: files, folders and globs become a list of files with names, which is read in parts."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath

from maskfirst.data.images import IMAGE_ENDINGS
from maskfirst.errors import UserError, nearest
from maskfirst.sources import Item, Part, Source, runs, stamp

FRAME = ".png"
"""The ending by which COCO's files call a frame, which is no file of its own."""


@dataclass(frozen=True)
class Found:
    """A picture to segment. `name` of what is written for it: a path below the output folder without an ending.

    `key`: what COCO's files call it. `frame`: its number, where the file is a video or a camera.
    """

    file: Path
    name: str
    key: int
    frame: int | None = None

    @property
    def file_name(self) -> str:
        return self.name + (self.file.suffix if self.frame is None else FRAME)

    def source(self, task: str) -> str:
        """What tells whether something was made of this very file, for this task."""
        size = f", {self.file.stat().st_size} bytes" if self.file.is_file() else ""
        return f"{self.file}{size}{'' if self.frame is None else f', frame {self.frame}'}, {task}"


def find_pictures(paths: Sequence[Path | str], without: Sequence[Path] = ()) -> list[Found]:
    """The pictures that files, folders and globs stand for, each once, with a name that no other has.

    Folders and globs give what ends like a picture and does not begin with a dot; what lies in the folders `without` is
    left out. Raises UserError for a path that gives none.
    """
    return _named([each for path in paths for each in _below(path, without)])


class Files(Source):
    """Pictures on disk; see `find_pictures`. Names stay apart among the pictures of all `paths`.

    A folder is listed once, so that what is written into it later is none of its pictures.
    """

    def __init__(self, paths: Sequence[Path | str], without: Sequence[Path] = ()) -> None:
        self.paths, self.without = [str(path) for path in paths], without

    def parts(self, size: int) -> list[Part]:
        """Runs of files of one path, in the order found; a part's source is that path. What two paths have is the first's."""
        parts: list[Part] = []
        seen: set[str] = set()
        for path, files in self._files.items():
            new = [index for index, file in enumerate(files) if os.path.realpath(file) not in seen]
            seen |= {os.path.realpath(file) for file in files}
            # Numbers that follow each other are as far from their places in the list.
            for _, run in groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
                indices = [index for _, index in run]
                parts += runs(path, len(indices), size, indices[0])
        return parts

    def read(self, part: Part) -> Iterator[Item]:
        stop = None if part.count is None else part.first + part.count
        for file in self._files[part.source][part.first : stop]:
            yield Item(self._names[os.path.realpath(file)], file)

    def fingerprint(self, part: Part) -> str:
        files = [item.picture for item in self.read(part)]
        told = "".join(f"{file}\0{stamp(file)}\0" for file in files if isinstance(file, Path))
        return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()

    @cached_property
    def _listed(self) -> dict[str, list[tuple[Path, str]]]:
        return {path: _below(path, self.without) for path in self.paths}

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The pictures of each path, each once."""
        return {path: [found.file for found in _named(files)] for path, files in self._listed.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        """By the file that a path ends at."""
        named = _named([each for files in self._listed.values() for each in files])
        return {os.path.realpath(found.file): found.name for found in named}


def _named(files: Sequence[tuple[Path, str]]) -> list[Found]:
    """Files, each once, their names made to stay apart."""
    names: dict[str, tuple[Path, str]] = {}
    for file, name in files:
        names.setdefault(os.path.realpath(file), (file, name))
    found = list(names.values())
    unique = _unique(found)
    return [Found(file, name, key) for (file, _), name, key in zip(found, unique, _keys(unique), strict=True)]


def _below(path: Path | str, without: Sequence[Path]) -> list[tuple[Path, str]]:
    """The pictures of one path, each with its name below that path."""
    place = Path(path)
    if place.is_file():
        return [(place, place.stem)]
    if place.is_dir():
        root, files = place, [Path(folder, file) for folder, _, files in os.walk(place) for file in files]
    elif glob.has_magic(str(path)):
        parts = list(place.parts)
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)]
    else:
        beside = [other.name for other in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder.{nearest(place.name, beside)}")
    without = [Path(os.path.realpath(folder)) for folder in without]
    files = [
        file
        for file in sorted(files)
        if file.suffix.lower() in IMAGE_ENDINGS
        and not file.name.startswith(".")
        and not any(Path(os.path.realpath(file)).is_relative_to(folder) for folder in without)
    ]
    if not files:
        raise UserError(f"{path}: no picture found here; looked for names that end in {', '.join(IMAGE_ENDINGS)}")
    return [(file, file.relative_to(root).with_suffix("").as_posix()) for file in files]


def _unique(found: Sequence[tuple[Path, str]]) -> list[str]:
    """Names that stay apart on any file system: those that clash get their folder, then their ending, then a number."""
    names = [name for _, name in found]

    def clashing() -> list[int]:
        counts = Counter(name.casefold() for name in names)
        return [index for index, name in enumerate(names) if counts[name.casefold()] > 1]

    files = {index: Path(os.path.abspath(found[index][0])) for index in clashing()}
    root = os.path.commonpath([file.parent for file in files.values()]) if files else ""
    for index, file in files.items():
        names[index] = file.relative_to(root).with_suffix("").as_posix()
    for index in clashing():
        names[index] += found[index][0].suffix
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 1
        while names[index].casefold() in taken:
            number += 1
            names[index] = f"{name}-{number}"
        taken.add(names[index].casefold())
    return names


def _keys(names: Sequence[str]) -> list[int]:
    """What COCO's files call the pictures: by the number that each file is named, as COCO's are, or else 1, 2, ..."""
    stems = [PurePosixPath(name).name for name in names]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdecimal()]
    return numbers if len(set(numbers)) == len(names) else list(range(1, len(names) + 1))
