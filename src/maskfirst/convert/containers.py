"""Containers: the one checkpoint that a file is or that a zip archive holds, and what files are that hold none.

Nothing is written to disk: what an archive holds is read into memory, once its size and its packing have been looked at.
"""

import re
import shutil
import zipfile
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from maskfirst.errors import UserError, listed

LARGEST = 64 * 2**30
"""Bytes that an archive may unpack to; the largest released checkpoints of these methods have 5 GB."""
STRETCH = 20
"""Times its own size that an archive may unpack to, if that is above SPARE bytes; trained weights hardly shrink at all."""
SPARE = 2**26
ZIP = ".zip"
TORCH = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
"""Torch's own files, which are zip archives themselves but for the old ones."""
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that are unpacked a piece at a time, and no further than they say."""
_SHOWN = 5
_PAGES = (b"<!doctype html", b"<html", b"<?xml")


class CheckpointError(UserError):
    """A checkpoint that cannot be opened, or that is refused."""


@dataclass(frozen=True)
class Content:
    """One checkpoint, as a file or as what an archive held. `name`: its own, without folders; `place`: what errors call it."""

    data: Path | BytesIO
    name: str
    place: str

    @property
    def weight(self) -> int:
        """Bytes."""
        return self.data.stat().st_size if isinstance(self.data, Path) else self.data.getbuffer().nbytes

    def open(self) -> AbstractContextManager[BinaryIO]:
        """For reading from its beginning."""
        if isinstance(self.data, Path):
            return open(self.data, "rb")
        self.data.seek(0)
        return nullcontext(self.data)


def suffix(name: str, known: Collection[str]) -> str:
    """The longest of `known` that a file's name ends with, such as `.pth.tar`; else what follows its last dot."""
    lower = name.lower()
    return max((each for each in known if lower.endswith(each)), key=len, default=Path(lower).suffix)


def damaged(place: str, error: BaseException) -> CheckpointError:
    """What is said of a file that its reader cannot read."""
    told = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"{place}: damaged, or not what its suffix says ({told[:160]}); fetch it again")


def find(path: Path, known: Collection[str]) -> Content:
    """The checkpoint that a file is, or the only one that it holds; `known`: the suffixes of checkpoints.

    Raises CheckpointError for archives with none or several, encrypted, within one another or far larger inside, for broken
    downloads, and for what a download brought instead of the file.
    """
    whole = Content(path, path.name, str(path))
    _check_beginning(whole)
    if suffix(path.name, known) not in (ZIP, *TORCH) or not zipfile.is_zipfile(path):
        return whole
    try:
        with zipfile.ZipFile(path) as archive:
            if _is_torchs(archive):
                return whole
            member = _only(archive, [each for each in known if each != ZIP], whole.place)
            name = _printable(member.filename)
            content = Content(_unpacked(archive, member, whole), name.split("/")[-1], f"{whole.place}: {name}")
    except CheckpointError:
        raise
    except Exception as error:
        # A torn or made-up archive raises anything from EOFError to zlib's own.
        raise damaged(whole.place, error) from error
    _check_beginning(content)
    if suffix(name, known) in TORCH and zipfile.is_zipfile(content.data):
        with content.open() as file, zipfile.ZipFile(file) as archive:
            if not _is_torchs(archive):
                raise _nested(content.place)
    return content


def check_archive(content: Content) -> None:
    """Refuses a zip archive that would unpack to far more than it weighs. Raises what zipfile does for one that is torn."""
    with content.open() as file, zipfile.ZipFile(file) as archive:
        _check_size(content.place, sum(member.file_size for member in archive.infolist()), content.weight)


def _check_beginning(content: Content) -> None:
    """Tells what came in a checkpoint's place: pages, pointers, other archives, and the first part of one."""
    with content.open() as file:
        start = file.read(512)
        # Only an archive's end says where its members are.
        cut = start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file)
    what = None if start else "the file is empty; fetch it again"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        what = "a web page, as links bring that want a login or lead nowhere; fetch the file itself"
    elif start.startswith(b"version https://git-lfs"):
        what = "a pointer of Git LFS in place of the file; fetch the file itself, as with 'git lfs pull'"
    elif start[257:262] == b"ustar":
        what = "a tar archive; unpack it and give the checkpoint that it holds"
    elif cut:
        what = "cut off, since the archive has no end, as where a download broke; fetch it again"
    if what is not None:
        raise CheckpointError(f"{content.place}: {what}")


def _is_torchs(archive: zipfile.ZipFile) -> bool:
    """Whether it is a file of torch's: one folder with the pickle in it, of whatever name."""
    return any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in archive.namelist())


def _only(archive: zipfile.ZipFile, known: Sequence[str], place: str) -> zipfile.ZipInfo:
    # Archives of macOS hold a file ._x beside every x.
    members = [
        each for each in archive.infolist() if not each.is_dir() and not each.filename.split("/")[-1].startswith(".")
    ]
    found = [each for each in members if suffix(each.filename, known) in known]
    if len(found) == 1:
        return found[0]
    names = [_printable(each.filename) for each in found or members]
    if found:
        raise CheckpointError(
            f"{place}: holds {len(found)} checkpoints ({listed(names, _SHOWN)}); unpack it and give the one you want"
        )
    inner = [name for name in names if name.lower().endswith(ZIP)]
    if inner:
        raise _nested(f"{place}: {listed(inner, _SHOWN)}")
    holds = f"no checkpoint, only {listed(names, _SHOWN)}" if names else "no file at all"
    raise CheckpointError(f"{place}: holds {holds}; a checkpoint ends in {', '.join(known)}")


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, whole: Content) -> BytesIO:
    place = f"{whole.place}: {_printable(member.filename)}"
    if member.flag_bits & 1:
        raise CheckpointError(f"{place}: encrypted; unpack it with its password and give what it holds")
    if member.compress_type not in _PACKINGS:
        raise CheckpointError(f"{place}: packed in a way that is not read here; unpack it and give what it holds")
    _check_size(place, member.file_size, whole.weight)
    data = BytesIO()
    with archive.open(member) as file:
        # No further than the size that it declares, behind which zipfile does not read.
        shutil.copyfileobj(file, data, 2**20)
    if data.tell() != member.file_size:
        raise zipfile.BadZipFile(f"{data.tell()} bytes of {member.file_size}")
    return data


def _check_size(place: str, size: int, weight: int) -> None:
    limit = min(LARGEST, max(SPARE, STRETCH * weight))
    if size > limit:
        raise CheckpointError(
            f"{place}: would unpack to {size:,} bytes; of an archive of {weight:,} at most {limit:,} are read"
        )


def _nested(place: str) -> CheckpointError:
    return CheckpointError(f"{place}: an archive within an archive; unpack it and give the checkpoint that it holds")


def _printable(name: str) -> str:
    """A name from a file, which must not break a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
