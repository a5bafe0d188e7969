"""What COCO's two formats share: JSON files of pictures and categories."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskfirst.data.vocabulary import contrasting
from maskfirst.files import write_aside
from maskfirst.formats import FormatError
from maskfirst.formats.rle import check_size
from maskfirst.types import Vocabulary

Key = int | str
"""What a file calls a picture; most call it by a number."""


@dataclass(frozen=True)
class Image:
    """A picture as a file lists it; `height` and `width` in px."""

    file_name: str
    height: int
    width: int


def load(path: Path | str, compact: Callable[[dict[str, Any]], Any]) -> Any:
    """A JSON file; every object in it is handed to `compact` as soon as it is read. Raises FormatError."""
    try:
        # One expression, so that the text is gone before the content is used.
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_hook=compact)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise FormatError(f"{path}: not JSON of this format: nested without end") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error


def rows(content: Any, name: str, path: Path | str) -> list[Any]:
    """The list under `name` in the file's outermost object."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise FormatError(f"{path}: no list of `{name}`; it should be a JSON object that has one")
    return found


def images(content: Any, path: Path | str) -> dict[Key, Image]:
    """The pictures that a file lists, by their id."""
    found: dict[Key, Image] = {}
    for index, row in enumerate(rows(content, "images", path)):
        place = f"{path}: images[{index}]"
        row = row if isinstance(row, dict) else {}
        key, name = named(row, "id", place)
        if key in found:
            raise FormatError(f"{place}: id {key!r} is that of {found[key].file_name} already")
        found[key] = Image(name, *check_size(row.get("height"), row.get("width"), f"{place} ({name})"))
    return found


def named(row: Mapping[str, Any], key: str, place: str) -> tuple[Key, str]:
    """What an entry of a file calls a picture under `key`, and its `file_name`. Raises FormatError."""
    found, name = row.get(key), row.get("file_name")
    if (type(found) is int or isinstance(found, str)) and isinstance(name, str) and name:
        return found, name
    raise FormatError(f"{place}: should have `{key}` and `file_name`, got {found!r} and {name!r}")


def categories(content: Any, path: Path | str, vocabulary: Vocabulary | None) -> tuple[Vocabulary, dict[int, int]]:
    """The vocabulary, and the class of each number that the file uses for one.

    Without `vocabulary` it is the file's, in the file's order, in which all is a thing that does not say `isthing: 0`. With
    it, its `ids` are the file's numbers, unless the file has one of its names under another number: then names count.
    """
    own = own_categories(content, path)
    vocabulary = vocabulary or own
    if vocabulary is None:
        raise FormatError(f"{path}: has no `categories`; say which vocabulary its numbers are of")
    numbered = {number: index for index, number in enumerate(vocabulary.ids)}
    if own is None:
        return vocabulary, numbered
    places = {name: index for index, name in enumerate(vocabulary.names)}
    by_name = {number: places[name] for number, name in zip(own.ids, own.names, strict=True) if name in places}
    contradicted = any(numbered.get(number) != index for number, index in by_name.items())
    return vocabulary, by_name if contradicted else numbered


def own_categories(content: Any, path: Path | str) -> Vocabulary | None:
    """What the file's categories are, by its own word; None where it has none. Raises FormatError."""
    if not isinstance(content, dict) or "categories" not in content:
        return None
    return _vocabulary(rows(content, "categories", path), path)


def class_of(number: Any, index: Mapping[int, int], place: str) -> int:
    """The class of a file's number. Raises FormatError that begins with `place`."""
    if type(number) is not int or number not in index:
        raise FormatError(f"{place}: category_id {number!r} is not among the categories ({_some(index)})")
    return index[number]


def as_categories(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The vocabulary as a file's `categories`."""
    return [
        {
            "id": number,
            "name": name,
            "supercategory": "thing" if index in vocabulary.things else "stuff",
            "isthing": int(index in vocabulary.things),
            "color": list(color),
        }
        for index, (number, name, color) in enumerate(
            zip(vocabulary.ids, vocabulary.names, vocabulary.colors, strict=True)
        )
    ]


def write(path: Path | str, content: Mapping[str, list[Any]]) -> None:
    """A JSON file, one picture, annotation or category a line. Raises DiskError."""
    with write_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for number, (name, entries) in enumerate(content.items()):
            file.write(f"{',' if number else '{'}\n{json.dumps(name)}: [")
            for place, entry in enumerate(entries):
                file.write((",\n" if place else "\n") + json.dumps(entry, ensure_ascii=False, allow_nan=False))
            file.write("\n]")
        file.write("\n}\n")


def shortest(score: float) -> float:
    """A float32 as the shortest number that reads back as the same."""
    return float(str(np.float32(score)))


def _vocabulary(told: list[Any], path: Path | str) -> Vocabulary:
    names, things, colors, ids = [], set(), [], []
    for index, row in enumerate(told):
        place = f"{path}: categories[{index}]"
        row = row if isinstance(row, dict) else {}
        number, name = row.get("id"), row.get("name")
        if type(number) is not int or not isinstance(name, str) or not name:
            raise FormatError(f"{place}: should have a number as `id` and a `name`, got {number!r} and {name!r}")
        if number in ids:
            raise FormatError(f"{place} ({name}): id {number} is that of {names[ids.index(number)]} already")
        if row.get("isthing", 1):
            things.add(index)
        names.append(name)
        ids.append(number)
        colors.append(_color(row.get("color")))
    spare = contrasting(len(told)) if None in colors else ()
    colors = [color or spare[index] for index, color in enumerate(colors)]
    try:
        return Vocabulary(tuple(names), frozenset(things), tuple(colors), tuple(ids))
    except ValueError as error:
        raise FormatError(f"{path}: categories: {error}") from error


def _color(told: Any) -> tuple[int, int, int] | None:
    match told:
        case [int(red), int(green), int(blue)] if all(0 <= part < 256 for part in told):
            return red, green, blue
    return None


def _some(index: Mapping[int, int]) -> str:
    first = sorted(index)[:5]
    return ", ".join(map(str, first)) + (", ..." if len(index) > len(first) else "")
