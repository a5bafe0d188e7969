"""Points in a table: a CSV file whose lines name places of pictures, and perhaps what they are."""

import csv
import math
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from maskfirst.formats import FormatError

COLUMNS = ("image", "y", "x")
NAME = "class"


class Point(NamedTuple):
    """A place in px, the first pixel of a picture having its centre at (0, 0); `line` of the file, counted from 1.

    `name`: what it is called, nothing where the file does not say.
    """

    line: int
    y: float
    x: float
    name: str


def read(path: Path | str, named: bool) -> dict[PurePosixPath, list[Point]]:
    """The points of each picture, in the file's order. `named`: there must be a column with their classes.

    The first line names the columns. Raises FormatError with the line's number.
    """
    found: dict[PurePosixPath, list[Point]] = defaultdict(list)
    wanted = (*COLUMNS, NAME) if named else COLUMNS
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            told = reader.fieldnames or ()
            missing = [name for name in wanted if name not in told]
            if missing:
                raise FormatError(
                    f"{path}: line 1: no column '{missing[0]}'; it should name {', '.join(wanted)}, and has "
                    f"{', '.join(told) or 'nothing'}"
                )
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                image, y, x, name = (row.get(column) or "" for column in (*COLUMNS, NAME))
                picture = PurePosixPath(image.strip())
                if not image.strip() or picture.is_absolute() or ".." in picture.parts:
                    raise FormatError(f"{where}: image '{image}' should be a path in the folder of pictures")
                try:
                    place = float(y), float(x)
                except ValueError:
                    place = math.nan, math.nan
                if not all(map(math.isfinite, place)):
                    raise FormatError(f"{where}: y and x should be numbers of px, got '{y}' and '{x}'")
                found[picture].append(Point(reader.line_num, *place, name.strip()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FormatError(f"{path}: cannot be read as CSV: {reason}") from error
    return dict(found)
