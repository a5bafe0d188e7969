"""Tar shards, as WebDataset writes them: files of one name make a sample, and the one that ends like a picture is it.

Python's own `tarfile` is not used: it reads headers of whatever length they declare, keeps every member in memory, and takes a
shard that is cut or damaged within a header for one that ends there.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maskfirst.data.images import IMAGE_ENDINGS, ImageError
from maskfirst.errors import UserError
from maskfirst.sources import Item, Part, Source, check_file
from maskfirst.sources.names import Apart, harmless

ENDINGS = (".tar", ".tar.gz", ".tgz")
LARGEST = 2**29
"""Bytes of a member that is read."""
LONGEST_HEADER = 2**20
"""Bytes of a header that tells a name."""
BLOCK = 512
"""Bytes; of these a tar is made: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html#tag_20_92_13_06"""
Unpacked = gzip.GzipFile | io.BufferedReader
GZIP = b"\x1f\x8b"
FILES = (b"0", b"\0", b"7")
LONG_NAME, EXTENDED = b"L", b"x"
EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices and folders, which no content follows, whatever size they tell."""


class TarShard(Source):
    """The pictures of a tar in their order, packed by gzip or not, one of them in memory at a time.

    `dir/000123.jpg` is called `dir/000123`: the name ends at its first dot, and what follows is the ending. A second picture of
    a name is `NAME-1`. Where the tar is cut short or damaged, the last Item says at which member.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def parts(self, size: int) -> list[Part]:
        """One part: a tar has no list of what is in it. Raises UserError for what is none."""
        with _opened(self.path) as file:
            try:
                next(_members(file), None)
            except _BrokenError as error:
                raise UserError(f"{self.path}: no tar: {error}") from error
        return [Part(str(self.path), 0, None)]

    def read(self, part: Part) -> Iterator[Item]:
        """All pictures; where there is none, an Item that says so."""
        apart = Apart()
        count = 0
        with _opened(self.path) as file:
            try:
                for member in _members(file):
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if stem and f".{ending.lower()}" in IMAGE_ENDINGS:
                        # Read before anything is handed on, as what is cut short is no picture.
                        picture = self._picture(member)
                        yield Item(apart(harmless(f"{folder}/{stem}")), picture)
                        count += 1
            except _BrokenError as error:
                yield Item(apart(harmless(self.path.name)), ImageError(f"{self.path}: {error}"))
                return
        if not count:
            looked = f"looked for members that end in {', '.join(IMAGE_ENDINGS)}"
            yield Item(apart(harmless(self.path.name)), ImageError(f"{self.path}: no picture in it; {looked}"))

    def _picture(self, member: "_Member") -> bytes | ImageError:
        if member.size > LARGEST:
            return ImageError(
                f"{self.path}: member {member.name!r}: {member.size} bytes, more than the limit of {LARGEST}; not read"
            )
        return member.content()


class _BrokenError(Exception):
    """Where a tar ends too early or is damaged."""


@dataclass
class _Member:
    """A file in a tar of which `left` bytes are not read yet, or what fills its last block."""

    name: str
    size: int
    file: Unpacked
    left: int

    def content(self) -> bytes:
        found = self._read(self.size)
        if len(found) < self.size:
            raise _BrokenError(f"ends within member {self.name!r}, after {len(found)} of its {self.size} bytes")
        return found

    def skip(self) -> None:
        while self.left:
            # At most so much in memory.
            if not self._read(min(self.left, 2**20)):
                raise _BrokenError(f"ends within member {self.name!r} of {self.size} bytes")

    def _read(self, count: int) -> bytes:
        found = _read(self.file, count, f"within member {self.name!r}")
        self.left -= len(found)
        return found


def _opened(path: Path) -> Unpacked:
    """The tar unpacked. Raises UserError."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(len(GZIP)) == GZIP
        return gzip.GzipFile(path) if packed else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _members(file: Unpacked) -> Iterator[_Member]:
    """The files in a tar; what is not read of one by when the next is asked for is skipped. Raises _BrokenError."""
    told: dict[str, str] = {}
    place = "at its beginning"
    while True:
        block = _read(file, BLOCK, place)
        if len(block) < BLOCK:
            raise _BrokenError(f"ends {place}, without the empty blocks that a tar ends with; cut short?")
        if not any(block):
            return
        kind, name, size = _header(block, place)
        if kind in (LONG_NAME, EXTENDED):
            if size > LONGEST_HEADER:
                raise _BrokenError(f"a header of {size} bytes {place}, where {LONGEST_HEADER} are the limit")
            header = _Member("a header", size, file, _padded(size))
            content = header.content()
            header.skip()
            told |= {"path": _text(content)} if kind == LONG_NAME else _records(content, place)
            continue
        name, size, told = told.get("path", name), int(told.get("size", size)), {}
        member = _Member(name, size, file, 0 if kind in EMPTY else _padded(size))
        if kind in FILES:
            yield member
        member.skip()
        place = f"after member {name!r}"


def _read(file: Unpacked, count: int, place: str) -> bytes:
    """At most `count` bytes, fewer only at the end."""
    try:
        return file.read(count)
    except EOFError:
        raise _BrokenError(f"ends {place}, within what gzip has packed") from None
    except (OSError, zlib.error) as error:
        raise _BrokenError(f"cannot be read {place}: {error}") from error


def _header(block: bytes, place: str) -> tuple[bytes, str, int]:
    """Kind, name and size in bytes."""
    told = _number(block[148:156])
    # The sum's own eight bytes count as spaces. Some old tars add up signed bytes.
    rest = block[:148] + b" " * 8 + block[156:]
    if told is None or told not in (sum(rest), sum(byte - 256 * (byte > 127) for byte in rest)):
        raise _BrokenError(f"no header {place}: what is there does not add up")
    size = _number(block[124:136])
    if size is None:
        raise _BrokenError(f"a header without a size {place}")
    name = _text(block[:100])
    # Only POSIX' own form has a folder here.
    folder = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return block[156:157], f"{folder}/{name}" if folder else name, size


def _number(field: bytes) -> int | None:
    """In octal digits; GNU's form for what is too large for them begins with a bit of its own."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _records(content: bytes, place: str) -> dict[str, str]:
    """Of an extended header, `LENGTH key=value` and a new line each: `path` and `size`."""
    found = {}
    start = 0
    while start < len(content):
        length = re.compile(rb"[0-9]{1,8}(?= )").match(content, start)
        stop = start + int(length[0]) if length else 0
        if length is None or not length.end() < stop <= len(content):
            raise _BrokenError(f"a damaged header {place}")
        key, _, value = content[length.end() + 1 : stop - 1].partition(b"=")
        if key == b"path":
            found["path"] = _text(value)
        elif key == b"size":
            if not re.fullmatch(rb"[0-9]{1,20}", value):
                raise _BrokenError(f"a header without a size {place}")
            found["size"] = value.decode()
        start = stop
    return found


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _padded(size: int) -> int:
    """Bytes of the blocks that hold so many."""
    return -(-size // BLOCK) * BLOCK
