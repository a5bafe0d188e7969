"""Points of pictures on disk to files of their names, as `predict` is for masks."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskfirst import draw
from maskfirst.ahead import ahead
from maskfirst.data.images import ImageError, read_image
from maskfirst.errors import UserError, nearest
from maskfirst.files import write_aside, write_json
from maskfirst.formats import points as tables
from maskfirst.formats.points import Point
from maskfirst.predict import Summary
from maskfirst.segmenter import Segmenter
from maskfirst.sources.files import Found, find_pictures
from maskfirst.types import Vocabulary

COLUMNS = (*tables.COLUMNS, tables.NAME, "score")


def predict_points(
    segmenter: Segmenter,
    paths: Sequence[Path | str],
    points: Path | str,
    out: Path | str,
    overlays: bool = True,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Names the places in the table `points` (see formats.points) and writes them, in its order, with names and scores.

    What is written into the folder `out`: `points.csv`, `overlays/NAME.jpg`, `summary.json`.

    The table calls a picture by its path below a folder of `paths`, with or without its ending. A picture that cannot be
    read, or that a point is none of, is listed in the summary's `failed`; the rest is done. `progress` is told (done, all).
    Raises UserError where the model names no points, or where the table has a picture that `paths` have not.
    """
    out, table = Path(out), tables.read(points, named=False)
    found = find_pictures(paths, [out / "overlays"])
    asked = _paired(table, found, points)
    summary, lines = Summary(), list[tuple[int, tuple[Any, ...]]]()
    for done, ((each, wanted), reading) in enumerate(
        ahead(lambda pair: read_image(pair[0].file), list(asked.items()), workers), 1
    ):
        places = torch.tensor([[point.y, point.x] for point in wanted], dtype=torch.float64)
        try:
            image = reading.result()
            _check_inside(wanted, image, points)
        except (ImageError, tables.FormatError) as error:
            summary.failed.append({"file": str(each.file), "error": str(error)})
        else:
            named = _Named.of(segmenter.name_points(image, places), segmenter.vocabulary)
            for point, name, score in zip(wanted, named.names, named.scores, strict=True):
                lines.append((point.line, (each.file_name, f"{point.y:g}", f"{point.x:g}", name, f"{score:.6f}")))
            if overlays:
                _write_overlay(out / f"overlays/{each.name}.jpg", image, wanted, named, segmenter.vocabulary)
            summary.images.append(
                {
                    "file": str(each.file),
                    "overlay": f"overlays/{each.name}.jpg" if overlays else None,
                    "height": image.shape[1],
                    "width": image.shape[2],
                    "points": len(wanted),
                    "classes": dict(Counter(named.names).most_common()),
                }
            )
        if progress is not None:
            progress(done, len(asked))
    with write_aside(out / "points.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(line for _, line in sorted(lines))
    write_json(out / "summary.json", summary.as_json())
    return summary


@dataclass(frozen=True)
class _Named:
    """The most likely name of each point, its P 0..1 and its index."""

    names: list[str]
    scores: list[float]
    classes: list[int]

    @classmethod
    def of(cls, chances: Float[Tensor, "P K"], vocabulary: Vocabulary) -> "_Named":
        scores, classes = chances.max(1)
        return cls([vocabulary.names[index] for index in classes.tolist()], scores.tolist(), classes.tolist())


def _paired(
    table: dict[PurePosixPath, list[Point]], found: Sequence[Found], points: Path | str
) -> dict[Found, list[Point]]:
    """The points by the picture that each is of."""
    known = {each.name: each for each in found} | {each.file_name: each for each in found}
    asked: dict[Found, list[Point]] = {}
    for name, wanted in table.items():
        if name.as_posix() not in known:
            raise UserError(
                f"{points}: line {wanted[0].line}: image '{name}' is none of the {len(found)} pictures given."
                f"{nearest(name.as_posix(), known)}"
            )
        asked.setdefault(known[name.as_posix()], []).extend(wanted)
    return asked


def _check_inside(wanted: Sequence[Point], image: UInt8[Tensor, "3 H W"], points: Path | str) -> None:
    height, width = image.shape[-2:]
    for point in wanted:
        if not (-0.5 < point.y < height - 0.5 and -0.5 < point.x < width - 0.5):
            raise tables.FormatError(
                f"{points}: line {point.line}: y {point.y:g}, x {point.x:g} is none of the picture, which has {height} rows "
                f"and {width} columns"
            )


def _write_overlay(
    path: Path, image: UInt8[Tensor, "3 H W"], wanted: Sequence[Point], named: _Named, vocabulary: Vocabulary
) -> None:
    colors = [vocabulary.colors[index] for index in named.classes]
    texts = [f"{name} {score:.0%}" for name, score in zip(named.names, named.scores, strict=True)]
    marked = draw.mark(draw.to_picture(image), [(point.y, point.x) for point in wanted], texts, colors)
    draw.write_overlay(path, marked)
