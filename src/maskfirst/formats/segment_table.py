"""Segments of many pictures as one Parquet file: a row a picture, its masks as COCO's packed run lengths."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from maskfirst.data.images import ImageError
from maskfirst.errors import UserError, nearest
from maskfirst.files import write_aside
from maskfirst.formats import FormatError, rle
from maskfirst.formats.instances import Instances
from maskfirst.formats.rle import Rle

NOTES = b"maskfirst"
"""What the file's metadata calls the notes, which are JSON."""
ROWS = 256
"""Pictures of a row group, which are in memory at a time."""


@dataclass(frozen=True)
class Notes:
    """What all rows of a file are of. `names`: by class index. `model`: what made them, by its own word."""

    task: str
    names: tuple[str, ...]
    model: str


@dataclass(frozen=True, eq=False)
class Row:
    """One picture. `key`: what it is called; `source`: where it is from; `found`: its segments, or why there are none."""

    key: str
    source: str
    found: Instances | ImageError


def write(path: Path | str, rows: Iterable[Row], notes: Notes) -> None:
    """Writes the rows as they come, aside: the file is there, whole, once all are.

    Crowd marks and areas told by a file are not kept. Raises DiskError, and UserError where pyarrow is missing.
    """
    _require_pyarrow(path)
    from pyarrow import Table, parquet

    schema = _schema().with_metadata({NOTES: json.dumps(asdict(notes), ensure_ascii=False).encode()})
    rows = iter(rows)
    with write_aside(path) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as file:
        while records := [_record(row, notes.names) for row in islice(rows, ROWS)]:
            file.write_table(Table.from_pylist(records, schema))


def read_notes(path: Path | str) -> Notes:
    """Raises FormatError for a file that `write` has not made, UserError where pyarrow is missing."""
    with _opened(path) as (_, notes):
        return notes


def read(path: Path | str) -> Iterator[Row]:
    """The rows in the file's order, some at a time in memory. Untrusted.

    Scores are 32-bit floats; no segment is a crowd. Raises FormatError, UserError where pyarrow is missing.
    """
    with _opened(path) as (file, notes):
        index = {name: number for number, name in enumerate(notes.names)}
        columns = _schema().names
        number = 0
        batches = file.iter_batches(ROWS // 8, columns=columns)
        while True:
            try:
                records = [] if (batch := next(batches, None)) is None else batch.to_pylist()
            except (*_broken(), UnicodeDecodeError) as error:
                raise FormatError(f"{path}: row {number}: damaged: {_reason(error)}") from error
            if not records:
                return
            for record in records:
                yield _row(record, index, f"{path}: row {number}")
                number += 1


def _record(row: Row, names: Sequence[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"key": _text(row.key), "source": _text(row.source)}
    found = row.found
    if isinstance(found, ImageError):
        return told | {"error": _text(str(found)), "segments": []}
    values = zip(
        found.classes.tolist(),
        found.scores.tolist(),
        rle.boxes(found.rles).int().tolist(),
        rle.area(found.rles).tolist(),
        found.rles,
        strict=True,
    )
    segments = [
        {
            "class": names[index],
            "score": score,
            **dict(zip(("left", "top", "width", "height"), box, strict=True)),
            "area": area,
            "counts": mask["counts"],
        }
        for index, score, box, area, mask in values
    ]
    return told | {"height": found.size[0], "width": found.size[1], "segments": segments}


def _row(record: Mapping[str, Any], index: Mapping[str, int], place: str) -> Row:
    """Raises FormatError that begins with `place`."""
    key, source, error = record["key"], record["source"], record["error"]
    segments: list[dict[str, Any]] | None = record["segments"]
    if key is None or source is None:
        raise FormatError(f"{place}: no {'key' if key is None else 'source'}")
    if error is not None:
        return Row(key, source, ImageError(error))
    size = rle.check_size(record["height"], record["width"], place)
    if segments is None:
        raise FormatError(f"{place}: neither segments nor an error")
    for number, each in enumerate(segments):
        empty = [name for name in ("class", "score", "counts") if (each or {}).get(name) is None]
        if empty:
            raise FormatError(f"{place}: segments[{number}]: no {empty[0]}")
        if each["class"] not in index:
            known = f"is none of the {len(index)} names of the file's notes.{nearest(each['class'], index)}"
            raise FormatError(f"{place}: segments[{number}]: class '{each['class']}' {known}")
    masks: list[Rle] = [{"size": list(size), "counts": each["counts"]} for each in segments]
    scores = torch.tensor([each["score"] for each in segments], dtype=torch.float32)
    for number in (~scores.isfinite()).nonzero()[:, 0].tolist():
        raise FormatError(f"{place}: segments[{number}]: score should be a number, got {scores[number].item()}")
    found = Instances(
        rle.read(masks, size, lambda number: f"{place}: segments[{number}]"),
        torch.tensor([index[each["class"]] for each in segments], dtype=torch.int64),
        scores,
        torch.zeros(len(segments), dtype=torch.bool),
        size,
    )
    return Row(key, source, found)


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[Any, Notes]]:
    """A pyarrow ParquetFile and its notes. Raises FormatError, UserError."""
    _require_pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        # Not by its name, which pyarrow may take for an address.
        raw = pyarrow.OSFile(str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {_reason(error)}") from error
    with raw:
        try:
            file = parquet.ParquetFile(raw, pre_buffer=False)
        except _broken() as error:
            raise FormatError(f"{path}: no Parquet file, or damaged: {_reason(error)}") from error
        yield file, _checked_notes(file.schema_arrow, path)


def _checked_notes(schema: Any, path: Path | str) -> Notes:
    told = (schema.metadata or {}).get(NOTES)
    if told is None:
        raise FormatError(f"{path}: no table of segments: its metadata has no '{NOTES.decode()}'")
    for field in _schema():
        kinds = [each.type for each in schema if each.name == field.name]
        if kinds != [field.type]:
            got = kinds[0] if kinds else "none"
            raise FormatError(f"{path}: column '{field.name}' should hold {field.type}, got {got}")
    try:
        content = json.loads(told)
        task, names, model = content["task"], content["names"], content["model"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path}: damaged notes: {_reason(error)}") from error
    texts = isinstance(names, list) and all(isinstance(each, str) for each in (task, model, *names))
    if not texts or len(set(names)) < len(names):
        raise FormatError(f"{path}: damaged notes: `task` and `model` should be text, `names` a list of names")
    return Notes(task, tuple(names), model)


def _schema() -> Any:
    import pyarrow as pa

    segment = pa.struct(
        [
            ("class", pa.string()),
            ("score", pa.float32()),
            # px; the mask's box.
            ("left", pa.int32()),
            ("top", pa.int32()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            # px of the mask.
            ("area", pa.int64()),
            ("counts", pa.string()),
        ]
    )
    return pa.schema(
        [
            ("key", pa.string()),
            ("source", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("error", pa.string()),
            ("segments", pa.list_(segment)),
        ]
    )


def _require_pyarrow(path: Path | str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'maskfirst[scale]'") from error


def _broken() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a file that is damaged; those that it has no words for are built-in."""
    from pyarrow import ArrowException

    return (ArrowException, OSError)


def _text(text: str) -> str:
    """Names of files may have bytes that are no text."""
    return text.encode("utf-8", "replace").decode()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
