"""OpenDataLab's samples files of boxes (DSDL): a list of pictures, each with its annotations, and no names of classes.

https://opendatalab.github.io/dsdl-docs/
"""

from pathlib import Path
from typing import Any

from maskfirst.formats import FormatError
from maskfirst.formats.boxes import BoxTable, Row
from maskfirst.formats.coco import class_of, rows
from maskfirst.types import Vocabulary


def from_content(content: Any, path: Path | str, vocabulary: Vocabulary) -> BoxTable:
    """The boxes of a file of which `boxes.compact` has left `content`. Categories are numbered from 1, by `vocabulary`'s order.

    Pictures without annotations are left out. Raises FormatError.
    """
    index = {number: number - 1 for number in range(1, len(vocabulary) + 1)}
    names, found = {}, {}
    for position, sample in enumerate(rows(content, "samples", path)):
        where = f"{path}: samples[{position}]"
        sample = sample if isinstance(sample, dict) else {}
        media = sample.get("media")
        name = media.get("media_path") if isinstance(media, dict) else None
        if not isinstance(name, str) or not name:
            raise FormatError(f"{where}: should have the picture's place as `media.media_path`, got {name!r}")
        annotations = rows(sample, "annotations", where)
        if annotations:
            names[position], found[position] = name, annotations
    table = BoxTable(path, vocabulary, names, {})
    for position, annotations in found.items():
        for number, row in enumerate(annotations):
            where = f"{path}: samples[{position}].annotations[{number}]"
            if not isinstance(row, Row):
                raise FormatError(f"{where}: should be an object with `category_id` and `bbox`")
            table.add(position, row, class_of(row.category, index, where), where)
    return table
