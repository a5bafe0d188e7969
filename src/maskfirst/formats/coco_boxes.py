"""COCO's files of annotations, of which the boxes alone are read: those for detection have no masks at all.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014; https://cocodataset.org/#format-data
"""

from pathlib import Path
from typing import Any

from maskfirst.formats import FormatError
from maskfirst.formats.boxes import BoxTable, Row, compact
from maskfirst.formats.coco import categories, class_of, images, load, rows
from maskfirst.types import Vocabulary


def read(path: Path | str, vocabulary: Vocabulary | None = None) -> BoxTable:
    """The boxes of a file; `vocabulary`: by default the file's own, see `coco.categories`. Raises FormatError."""
    return from_content(load(path, compact), path, vocabulary)


def from_content(content: Any, path: Path | str, vocabulary: Vocabulary | None = None) -> BoxTable:
    """As `read`, of what `compact` has left of the file."""
    words, index = categories(content, path, vocabulary)
    listed = images(content, path)
    names = {key: image.file_name for key, image in listed.items()}
    table = BoxTable(path, words, names, {key: (image.height, image.width) for key, image in listed.items()})
    for position, row in enumerate(rows(content, "annotations", path)):
        where = f"{path}: annotations[{position}]"
        if not isinstance(row, Row):
            raise FormatError(f"{where}: should be an object with `image_id`, `category_id` and `bbox`")
        if type(row.picture) not in (int, str) or row.picture not in names:
            raise FormatError(f"{where}: image_id {row.picture!r} is none of the {len(names)} pictures")
        table.add(row.picture, row, class_of(row.category, index, where), where)
    return table
