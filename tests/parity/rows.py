"""Rows: what one comparison found, and how it is told."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One comparison. `error`: the largest absolute one. `used`: its share of what is allowed there, above 1 a failure."""

    file: str
    name: str
    passed: bool
    error: float | None = None
    used: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Tolerance:
    """Allows atol + rtol * |reference|."""

    atol: float = 0.0
    rtol: float = 0.0


EXACT = Tolerance()


def compare(file: str, name: str, ours: Any, theirs: Any, tolerance: Tolerance = EXACT) -> Row:
    """A row for two arrays, tensors or numbers of one shape."""
    ours, theirs = (_array(value) for value in (ours, theirs))
    if ours.shape != theirs.shape:
        return Row(file, name, False, note=f"shape {list(ours.shape)}, should be {list(theirs.shape)}")
    if ours.size == 0:
        return Row(file, name, True, 0.0, 0.0)
    error = np.abs(ours - theirs)
    allowed = tolerance.atol + tolerance.rtol * np.abs(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        used = np.where(error == 0, 0.0, error / allowed)
    worst = float(used.max())
    note = "" if math.isfinite(float(error.max())) else "not finite"
    return Row(file, name, worst <= 1, float(error.max()), worst, note)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def equal(file: str, name: str, ours: Any, theirs: Any) -> Row:
    """A row for two values that must be the same."""
    same = bool(ours == theirs)
    return Row(file, name, same, note="" if same else _short(f"{ours!r}, should be {theirs!r}"))


def same_tensors(file: str, name: str, ours: Tensor, theirs: Tensor) -> Row:
    """A row for two tensors that must be the same bit for bit."""
    same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return Row(file, name, same, note="" if same else "not the same bits")


def failed(file: str, name: str, note: str) -> Row:
    return Row(file, name, False, note=_short(note))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def table(rows: Sequence[Row]) -> str:
    """A line a row, aligned."""
    cells = [("", "file", "array", "largest error", "of allowed", "")] + [
        (
            "ok" if row.passed else "FAILED",
            row.file,
            row.name,
            "" if row.error is None else f"{row.error:.2g}",
            "" if row.used is None else f"{row.used:.1%}",
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(cell[column]) for cell in cells) for column in range(5)]
    lines = ["  ".join((*(c.ljust(w) for c, w in zip(cell, widths, strict=False)), cell[5])).rstrip() for cell in cells]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    bad = sum(not row.passed for row in rows)
    return f"{len(rows) - bad} of {len(rows)} comparisons hold" + (f", {bad} FAILED" if bad else "")


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain values; errors that are not finite as text, which JSON has no number for."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: plain(value) for key, value in asdict(row).items()} for row in rows]
