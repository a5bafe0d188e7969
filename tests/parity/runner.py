"""The runner: every file of a folder, each compared by what knows its kind, and none passed over."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .rows import Row, failed
from .tables import FILES
from .variant import variant

PROSE = {".md", ".txt"}


def run(folder: Path) -> list[Row]:
    """A row for every comparison, and a failed one for every file that is not covered or cannot be compared."""
    if not folder.is_dir():
        return [failed(str(folder), "", "no such folder")]
    rows: list[Row] = []
    covered: set[str] = set()
    files = sorted(path for path in folder.iterdir() if path.suffix not in PROSE)
    for path in files:
        compared_by = _kind(path)
        if compared_by is None:
            continue
        covered |= _belonging(path)
        rows += _guarded(path.name, lambda known=compared_by, path=path: known(folder, path))
    for path in files:
        if path.name not in covered:
            rows.append(failed(path.name, "", "not covered"))
    return rows or [failed(str(folder), "", "holds no fixtures")]


def _kind(path: Path) -> Callable[[Path, Path], Iterator[Row]] | None:
    for pattern, known in FILES.items():
        if re.fullmatch(pattern, path.name):
            return known
    if path.suffix == ".json" and _describes_variant(path):
        return lambda folder, path: variant(folder, path.stem)
    return None


def _describes_variant(path: Path) -> bool:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(told, dict) and {"config", "arrays"} <= told.keys()


def _belonging(path: Path) -> set[str]:
    """The file itself and those that are read with it."""
    weights = (
        re.search(r'"backbone_weights":\s*"([^"]+)"', path.read_text(encoding="utf-8"))
        if path.suffix == ".json"
        else None
    )
    return {path.name, f"{path.stem}.npz", *([weights[1]] if weights else [])}


def _guarded(name: str, compared: Callable[[], Iterator[Row]]) -> list[Row]:
    """What comes, and where that breaks off, a failed row that says why: a fixture may lack or hold anything."""
    rows: list[Row] = []
    try:
        for row in compared():
            rows.append(row)
    except Exception as error:
        rows.append(failed(name, "", f"{type(error).__name__}: {error}"))
    return rows
