"""Files that are whole or absent: written aside in the same folder, flushed to disk, then renamed."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskfirst.errors import UserError

# Read once: it can only be read by setting it, which must not happen while other threads make files.
_UMASK = os.umask(0)
os.umask(_UMASK)


class DiskError(UserError):
    """A file that could not be written; what lay there before is untouched."""


@contextlib.contextmanager
def write_aside(path: Path | str) -> Iterator[Path]:
    """Yields a path to write to; renamed to `path` when the block ends well, removed when it does not.

    Raises DiskError, naming the file, where the disk refuses (full, read-only, no such folder).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise DiskError(f"{path}: cannot write here: {error.strerror}") from error
    aside = Path(name)
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; the finished file gets what an ordinary `open` would have given it.
        aside.chmod(0o666 & ~_UMASK)
        os.replace(aside, path)
    except OSError as error:
        raise DiskError(f"{path}: not saved: {error.strerror or error}; what was there before is untouched") from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path | str, content: Any) -> None:
    """`content` as indented JSON, written aside."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
