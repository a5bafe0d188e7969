"""Where pictures come from, any number of them: files, tar shards, Parquet and videos, in parts that are read anew alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from maskfirst.data.images import ImageError, Readable, as_rgb
from maskfirst.errors import UserError, nearest


@dataclass(frozen=True)
class Item:
    """A picture, or why there is none. `name`: as in its source, without an ending, for what is made of it."""

    name: str
    picture: Readable | ImageError


@dataclass(frozen=True)
class Part:
    """Pictures `first`, ..., `first + count - 1` of a source, which are done or missing together.

    `source`: the path by which it is opened. `count`: None where only reading tells it. Plain, so that it can be sent and kept
    as JSON.
    """

    source: str
    first: int
    count: int | None


class Source(ABC):
    """A place with pictures, opened anew in every process that reads some of it."""

    @abstractmethod
    def parts(self, size: int) -> list[Part]:
        """All of it in runs of about `size` pictures, without decoding any. Raises UserError for what cannot be read at all."""

    @abstractmethod
    def read(self, part: Part) -> Iterator[Item]:
        """The pictures of a part, in order. What is broken is an Item with an ImageError, and the rest goes on."""

    def fingerprint(self, part: Part) -> str:
        """What tells whether the pictures of a part are still those that they were."""
        return f"{part.count} of {stamp(Path(part.source))}"


def decoded(picture: Readable | ImageError) -> UInt8[Tensor, "3 H W"]:
    """A picture of an Item as RGB 0..255. Raises ImageError where there is none, or it cannot be read."""
    if isinstance(picture, ImageError):
        raise picture
    return as_rgb(picture)


def runs(source: str, count: int, size: int, first: int = 0) -> list[Part]:
    """The pictures `first`, ..., `first + count - 1` in parts of `size`, the last one of what is left."""
    return [Part(source, first + start, min(size, count - start)) for start in range(0, count, size)]


def stamp(file: Path) -> str:
    """A file's size and when it was written, in words."""
    told = file.stat()
    return f"{told.st_size} bytes of {told.st_mtime_ns}"


def check_file(path: Path) -> None:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}.{nearest(path.name, beside)}")
