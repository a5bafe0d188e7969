"""Names of pictures, as anyone has written them, made into paths that stay below the folder they are joined to."""

import re
from pathlib import PurePosixPath

from maskfirst.data.images import IMAGE_ENDINGS

LONGEST = 180
"""Bytes of the name of a file or folder. File systems take 255, of which endings and what is written aside take some."""
DEEPEST = 1000
"""Bytes of a whole path below the output folder."""
NAMELESS = "picture"


def harmless(name: str) -> str:
    """The name as a path below a folder: relative, `/` between its parts, no `..`, no drive, no control characters, not empty.

    Parts too long for file systems are cut, and paths too long lose their first folders.
    """
    text = name.encode("utf-8", "replace").decode().replace("\\", "/")
    # A colon ends a drive, and begins a stream of a file, where there are such.
    text = re.sub(r"[\x00-\x1f\x7f-\x9f:]", "_", text)
    # Windows takes `.. ` for `..`, too.
    parts = [part.encode()[:LONGEST].decode("utf-8", "ignore") for part in text.split("/") if part.strip(" .")]
    while len("/".join(parts).encode()) > DEEPEST:
        del parts[0]
    return "/".join(parts) or NAMELESS


def without_ending(name: str) -> str:
    """The name without the ending of a picture; other dots are the name's own."""
    ending = PurePosixPath(name).suffix
    return name[: -len(ending)] if ending.lower() in IMAGE_ENDINGS else name


class Apart:
    """Tells names apart, on any file system, in the order in which they come: the second `a` is `a-1`."""

    def __init__(self) -> None:
        # The number that was last tried for each.
        self._taken: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        found, number = name, self._taken.get(name.casefold(), 0)
        while found.casefold() in self._taken:
            number += 1
            found = f"{name}-{number}"
        self._taken[name.casefold()] = number
        self._taken.setdefault(found.casefold(), 0)
        return found
