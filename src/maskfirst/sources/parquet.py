"""Parquet tables with a column of pictures: bytes, or Hugging Face `datasets`' struct of bytes and a path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskfirst.data.images import ImageError
from maskfirst.errors import UserError, listed, nearest
from maskfirst.sources import Item, Part, Source, check_file
from maskfirst.sources.names import Apart, harmless, without_ending

ENDINGS = (".parquet",)
PICTURES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "picture", "img")
"""What a column of pictures is called, where several could be it; the first that there is."""
NAMES = ("key", "__key__", "id", "image_id", "file_name", "name", "path")
"""What a column of names is called; the first that there is."""
LARGEST = 2**29
"""Bytes of a picture that is taken."""
ROWS = 8
"""Rows that are in memory at a time."""
BUFFER = 2**20
"""Bytes of a column that are read ahead; without, pyarrow reads all of a row group."""


class ParquetTable(Source):
    """The pictures of one column, `column` or the only one that can be it, in the order of the rows.

    A picture is called by the column of names, or else by the path beside its bytes, without its ending, or else by the number
    of its row in the file, from 0. Needs the extra `scale`.
    """

    def __init__(self, path: Path | str, column: str | None = None) -> None:
        """Raises UserError where pyarrow is missing."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: Parquet needs pyarrow: pip install 'maskfirst[scale]'") from error
        self.path, self.column = Path(path), column
        self._names: list[str] | None = None

    def parts(self, size: int) -> list[Part]:
        """Row groups gathered or cut to at most `size` rows, of the file's metadata alone."""
        with self._opened() as file:
            self._picture_column(file)
            lengths: list[int] = []
            for _, first, stop in _groups(file):
                # Pieces of one size, as each begins with going through the rows before it.
                pieces = -(-(stop - first) // size)
                cuts = [first + (stop - first) * piece // pieces for piece in range(pieces)] + [stop]
                for start, end in pairwise(cuts):
                    if lengths and lengths[-1] + end - start <= size:
                        lengths[-1] += end - start
                    else:
                        lengths.append(end - start)
        return [Part(str(self.path), sum(lengths[:index]), length) for index, length in enumerate(lengths)]

    def read(self, part: Part) -> Iterator[Item]:
        with self._opened() as file:
            column = self._picture_column(file)
            names = self._all_names(file, column)
            end = len(names) if part.count is None else part.first + part.count
            for group, first, stop in _groups(file):
                start, stop = max(first, part.first), min(stop, end)
                if start < stop:
                    pictures = self._pictures(file, column, group, start - first, stop - first)
                    for row, picture in enumerate(pictures, start):
                        yield Item(names[row], picture)

    def _pictures(self, file: Any, column: str, group: int, start: int, stop: int) -> Iterator[bytes | ImageError]:
        """Those of the rows `start`, ..., `stop - 1` of a row group; where it breaks off, errors for the rest."""
        reason = "fewer rows than the file tells"
        row = 0
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
                for cell in batch.column(0):
                    if start <= row < stop:
                        yield self._picture(cell, f"{self.path}: row group {group}: row {row}")
                    row += 1
                if row >= stop:
                    return
        except _broken() as error:
            reason = _reason(error)
        for lost in range(max(row, start), stop):
            yield ImageError(f"{self.path}: row group {group}: row {lost}: cannot be read: {reason}")

    def _picture(self, cell: Any, place: str) -> bytes | ImageError:
        path = None
        if cell.is_valid and _is_struct(cell.type):
            path = cell["path"].as_py() if "path" in cell else None
            cell = cell["bytes"]
        if not cell.is_valid:
            return ImageError(f"{place}: no picture" + (f" but a path, {path!r}, which is not opened" if path else ""))
        if cell.as_buffer().size > LARGEST:
            return ImageError(f"{place}: {cell.as_buffer().size} bytes, more than the limit of {LARGEST}")
        return cell.as_py()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A pyarrow ParquetFile. Raises UserError."""
        import pyarrow
        from pyarrow import parquet

        check_file(self.path)
        try:
            # Not by its name, which pyarrow may take for an address.
            raw = pyarrow.OSFile(str(self.path))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {_reason(error)}") from error
        with raw:
            try:
                file = parquet.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
            except _broken() as error:
                raise UserError(f"{self.path}: no Parquet file, or damaged: {_reason(error)}") from error
            rows = [stop - first for _, first, stop in _groups(file)]
            if min(rows, default=0) < 0 or sum(rows) > raw.size():
                raise UserError(f"{self.path}: damaged: tells {sum(rows)} rows in {raw.size()} bytes")
            yield file

    def _picture_column(self, file: Any) -> str:
        """Raises UserError with what could be meant."""
        types = {field.name: field.type for field in file.schema_arrow}
        able = [name for name, kind in types.items() if _holds_pictures(kind)]
        if self.column is not None:
            if self.column in able:
                return self.column
            told = f"holds {types[self.column]}" if self.column in types else "is none of its columns"
            raise UserError(
                f"{self.path}: '{self.column}' {told}; {_candidates(able, types)}.{nearest(self.column, able)}"
            )
        if len(able) != 1:
            able = [name for name in PICTURES if name in able] or able
        if not able or (len(able) > 1 and able[0] not in PICTURES):
            raise UserError(f"{self.path}: {_candidates(able, types)}" + ("; say which column" if able else ""))
        return able[0]

    def _all_names(self, file: Any, column: str) -> Sequence[str]:
        """One for each row of the file. Read once, and whole, as a name depends on those before it."""
        if self._names is None:
            apart = Apart()
            told = self._told_names(file, column)
            self._names = [apart(f"{row:06d}" if name is None else harmless(name)) for row, name in enumerate(told)]
        return self._names

    def _told_names(self, file: Any, column: str) -> Iterator[str | None]:
        types = {field.name: field.type for field in file.schema_arrow}
        source = next((name for name in NAMES if name in types and _holds_names(types[name])), None)
        beside = _is_struct(types[column]) and types[column].get_field_index("path") >= 0
        if source is None and beside and _holds_names(types[column].field("path").type):
            source = f"{column}.path"
        for group, first, stop in _groups(file):
            row = first
            try:
                # Of a column that there is not, nothing needs to be read.
                batches = [] if source is None else file.iter_batches(4096, row_groups=[group], columns=[source])
                for batch in batches:
                    for cell in batch.column(0).to_pylist()[: stop - row]:
                        name = cell["path"] if isinstance(cell, dict) else cell
                        yield None if name in (None, "") else without_ending(str(name))
                        row += 1
            # Bytes that are no text are no name either.
            except (*_broken(), UnicodeDecodeError):
                pass
            for _ in range(row, stop):
                yield None


def _groups(file: Any) -> Iterator[tuple[int, int, int]]:
    """Row groups: number, first row, and the row after the last."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        stop = first + file.metadata.row_group(group).num_rows
        yield group, first, stop
        first = stop


def _holds_pictures(kind: Any) -> bool:
    from pyarrow import types

    if _is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and not _is_struct(kind.field(place).type) and _holds_pictures(kind.field(place).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_names(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)


def _is_struct(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind)


def _candidates(able: Sequence[str], types: dict[str, Any]) -> str:
    if able:
        return f"pictures are in {listed(repr(name) for name in able)}"
    has = listed(f"'{name}' ({kind})" for name, kind in types.items()) or "no columns"
    return f"no column of pictures (binary, or a struct with binary `bytes`); it has {has}"


def _broken() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a file that is damaged; those that it has no words for are built-in."""
    from pyarrow import ArrowException

    return (ArrowException, OSError)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
