"""Vocabularies from bundled names, YAML or text files, or plain lists of names."""

import functools
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maskfirst.errors import UserError, nearest
from maskfirst.types import Vocabulary

CLASS_FILES = ("classes.yaml", "classes.yml", "classes.txt")
"""Where a data folder may keep its own vocabulary; the first that exists counts."""
_BUNDLED = resources.files("maskfirst.data") / "vocabularies"


class VocabularyError(UserError):
    """A vocabulary that is not there or cannot be understood."""


def bundled() -> tuple[str, ...]:
    """The names of the vocabularies in the package."""
    return tuple(
        sorted(entry.name.removesuffix(".yaml") for entry in _BUNDLED.iterdir() if entry.name.endswith(".yaml"))
    )


def load(source: str | Path, root: Path | None = None) -> Vocabulary:
    """The vocabulary of that bundled name, or in that file, relative to `root` (default: the working folder).

    A text file has one name a line. A YAML file has a list, or a mapping whose `classes` is one, of names or of mappings
    `{name, color: [r, g, b], thing: true, id}`; what is left out is a colour of high contrast, no thing, and the index.
    With `of`, a bundled name, `classes` are names of that one, which has all else of them. Raises VocabularyError.
    """
    name = str(source)
    if name in bundled():
        return _bundled(name)
    path = (root or Path()) / source
    if not path.is_file():
        known = f"Bundled: {', '.join(bundled())}."
        raise VocabularyError(
            f"vocabulary '{name}': no such name, and no file {path}.{nearest(name, bundled())} {known}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix.lower() == ".txt":
        return _made(_lines(text), str(path))
    return _parse(text, str(path))


@functools.cache
def _bundled(name: str) -> Vocabulary:
    return _parse((_BUNDLED / f"{name}.yaml").read_text(encoding="utf-8"), name)


def of_folder(root: Path) -> Vocabulary:
    """The vocabulary that a data folder keeps in one of CLASS_FILES. Raises VocabularyError where none is."""
    for name in CLASS_FILES:
        if (root / name).is_file():
            return load(root / name)
    raise VocabularyError(
        f"{root}: no {' or '.join(CLASS_FILES)} in this folder; add one, or set `vocabulary:` to a file, "
        f"a list of names or one of {', '.join(bundled())}"
    )


def from_names(names: Sequence[str], things: Iterable[str] = ()) -> Vocabulary:
    """A vocabulary of these names in this order, in colours of high contrast that depend on the position alone."""
    things = set(things)
    unknown = sorted(things.difference(names))
    if unknown:
        raise VocabularyError(f"thing '{unknown[0]}' is not among the names.{nearest(unknown[0], names)}")
    return _made([{"name": name, "thing": name in things} for name in names], "vocabulary")


def only_things(vocabulary: Vocabulary) -> Vocabulary:
    """The things of a vocabulary, in its order and with its colours and numbers: what instance files speak of."""
    return chosen(vocabulary, sorted(vocabulary.things))


def chosen(vocabulary: Vocabulary, kept: Sequence[int]) -> Vocabulary:
    """The classes `kept` of a vocabulary, in this order, with their colours and numbers."""
    return Vocabulary(
        tuple(vocabulary.names[index] for index in kept),
        frozenset(place for place, index in enumerate(kept) if index in vocabulary.things),
        tuple(vocabulary.colors[index] for index in kept),
        tuple(vocabulary.ids[index] for index in kept),
    )


@functools.cache
def contrasting(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` colours, each as far as can be from those before it and from black, grey and white."""
    # Far enough apart on a lattice; finer only where there are more colours to choose than it has.
    steps = max(9, int(np.ceil((2 * count) ** (1 / 3))))
    axis = np.linspace(0, 255, steps).round()
    lattice = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)

    def apart(color: np.ndarray) -> np.ndarray:
        return ((lattice - color) ** 2 * (2, 4, 3)).sum(-1)  # the eye weighs green most

    room = np.minimum.reduce([apart(np.full(3, grey)) for grey in (0, 128, 255)])
    chosen = []
    for _ in range(count):
        best = lattice[int(room.argmax())]
        chosen.append((int(best[0]), int(best[1]), int(best[2])))
        room = np.minimum(room, apart(best))
    return tuple(chosen)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _parse(text: str, place: str) -> Vocabulary:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise VocabularyError(f"{place}: not YAML: {' '.join(str(error).split())}") from error
    entries = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise VocabularyError(f"{place}: expected a list of classes, or a mapping with one under `classes`")
    if isinstance(content, dict) and "of" in content:
        return _chosen(entries, content["of"], place)
    return _made(entries, place)


def _chosen(names: Sequence[Any], of: Any, place: str) -> Vocabulary:
    """These names in this order, with the colours, things and numbers that the bundled vocabulary `of` has for them."""
    if of not in bundled():
        raise VocabularyError(f"{place}: of: no bundled vocabulary '{of}'.{nearest(str(of), bundled())}")
    whole = _bundled(of)
    strange = [name for name in names if name not in whole.names]
    if strange:
        raise VocabularyError(f"{place}: {of} has no class {strange[0]!r}.{nearest(str(strange[0]), whole.names)}")
    return chosen(whole, [whole.names.index(name) for name in names])


def _made(entries: Sequence[Any], place: str) -> Vocabulary:
    names, colors, things, ids = [], [], [], []
    spare = contrasting(len(entries))
    for index, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {"name": entry}
        where = f"{place}: class {index}"
        for key in fields:
            if key not in ("name", "color", "thing", "id"):
                raise VocabularyError(
                    f"{where}: unknown key '{key}'.{nearest(str(key), ('name', 'color', 'thing', 'id'))} "
                    "Known: name, color, thing, id."
                )
        name, color = fields.get("name"), fields.get("color", spare[index])
        if not isinstance(name, str) or not name:
            raise VocabularyError(
                f"{where}: the name must be text, got {name!r}; quote it if YAML reads it as something else"
            )
        if (
            not isinstance(color, list | tuple)
            or len(color) != 3
            or any(type(c) is not int or not 0 <= c < 256 for c in color)
        ):
            raise VocabularyError(f"{where} ({name}): color must be three numbers 0..255, got {color!r}")
        if type(fields.get("thing", False)) is not bool or type(fields.get("id", index)) is not int:
            raise VocabularyError(f"{where} ({name}): `thing` must be true or false and `id` a whole number")
        names.append(name)
        colors.append(tuple(color))
        ids.append(fields.get("id", index))
        if fields.get("thing", False):
            things.append(index)
    try:
        return Vocabulary(tuple(names), frozenset(things), tuple(colors), tuple(ids))
    except ValueError as error:
        raise VocabularyError(f"{place}: {error}") from error
