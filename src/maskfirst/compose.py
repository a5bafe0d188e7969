"""Composed models: the masks of one source under the names of another, and every pairing that a model allows, side by side."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from maskfirst.contracts import Namer, NoNamesError, PointNamer, Proposer, Scores
from maskfirst.errors import UserError
from maskfirst.namers.among import Among
from maskfirst.namers.blend import Blend
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.segmenter import Segmenter

WEIGHT = 0.4
"""The share that the second namer of a blend has by default."""


def with_masks(model: Segmenter, proposer: Proposer, weight: float | None = None) -> Segmenter:
    """The masks of `proposer`, named by the points of `model`; with `weight`, blended with the names that they arrive with.

    Raises UserError where the model has no namer of points, since no other can name masks that are not its proposer's own.
    """
    points = required_points(model)
    return _model(model, proposer, points if weight is None else Blend(Given(), points, weight))


def with_names(model: Segmenter, names: Segmenter, weight: float = WEIGHT) -> Segmenter:
    """The masks of `model`, their names blended with those that the points of the model `names` get.

    Raises UserError where `names` has no namer of points.
    """
    return _model(model, model.proposer, Blend(_first(model.namer), required_points(names), weight))


def with_true_names(model: Segmenter) -> Segmenter:
    """The masks of `model` under their true names; which of them are objects stays with its own namer, unless all are true."""
    true = OracleNamer(model.vocabulary)
    return _model(model, model.proposer, true if model.proposer.uses_truth else Blend(_first(model.namer), true, 1.0))


def among(model: Segmenter, names: Sequence[str]) -> Segmenter:
    """The model, giving these names alone. Raises UserError for names that it does not know."""
    return _model(model, model.proposer, Among(model.namer, model.vocabulary, [*names]))


def required_points(model: Segmenter) -> PointNamer:
    """The namer of points of a model. Raises UserError where it has none."""
    if model.point_namer is None:
        raise UserError(
            f"namer {model.namer.example['kind']} names its own proposer's masks alone; to name others, or points, take "
            "weights with a namer of points, such as those of a vit-p recipe"
        )
    return model.point_namer


@dataclass(frozen=True)
class Matrix:
    """Scores 0..1 by masks (rows) and names (columns); None where such names cannot be given to such masks."""

    headline: str
    cells: Mapping[str, Mapping[str, float | None]]

    def as_json(self) -> dict[str, Any]:
        return {"headline": self.headline, "cells": {row: dict(told) for row, told in self.cells.items()}}

    def as_table(self) -> Table:
        """In percent."""
        table = Table(caption=f"{self.headline}; rows are masks, columns names; oracle: the truth")
        table.add_column("masks")
        for column in next(iter(self.cells.values())):
            table.add_column(column, justify="right")
        for row, told in self.cells.items():
            table.add_row(row, *("–" if value is None else f"{100 * value:.2f} %" for value in told.values()))
        return table


def matrix(
    model: Segmenter, score: Callable[[Segmenter], Scores], weight: float | None = None, saved: Proposer | None = None
) -> Matrix:
    """What `score` says of the model's own masks, the `saved` ones and the true ones, under every names at hand.

    Those are the first ones (the model's own, or those that saved masks arrive with), those of the model's points, both
    blended, and the true ones. `weight`: the points' in the blend; None: as the model has it.
    """
    headline, cells = "", dict[str, dict[str, float | None]]()
    for row, column, tries in _pairings(model, weight, saved):
        found = _first_answer(tries, score)
        if found is not None:
            headline = found.headline
        value = None if found is None or math.isnan(found.value) else found.value
        cells.setdefault(row, {})[column] = value
    return Matrix(headline, cells)


def _pairings(
    model: Segmenter, weight: float | None, saved: Proposer | None
) -> Iterator[tuple[str, str, list[Segmenter]]]:
    """Row, column, and the models to try there, of which the first that can answer counts."""
    points, own = model.point_namer, _first(model.namer)
    if weight is None:
        weight = model.namer.weight if isinstance(model.namer, Blend) else WEIGHT
    sources: dict[str, tuple[Proposer, Namer]] = {}
    if not model.proposer.uses_truth:
        sources[model.proposer.example["kind"]] = model.proposer, own
    if saved is not None:
        sources["saved"] = saved, Given()
    truth = OracleProposer(model.vocabulary)
    for row, (proposer, first) in sources.items():
        yield row, "own", [_model(model, proposer, first)]
        if points is not None:
            name = points.example["kind"]
            yield row, f"{weight:g} {name}", [_model(model, proposer, Blend(first, points, weight))]
            # Whether a mask is an object stays with the first, where that knows.
            alone = [_model(model, proposer, namer) for namer in (Blend(first, points, 1.0), points)]
            yield row, name, alone
        true = OracleNamer(model.vocabulary)
        yield row, "oracle", [_model(model, proposer, namer) for namer in (Blend(first, true, 1.0), true)]
    yield "oracle", "own", []
    if points is not None:
        yield "oracle", f"{weight:g} {points.example['kind']}", []
        yield "oracle", points.example["kind"], [_model(model, truth, points)]
    yield "oracle", "oracle", [_model(model, truth, OracleNamer(model.vocabulary))]


def _first_answer(tries: list[Segmenter], score: Callable[[Segmenter], Scores]) -> Scores | None:
    for model in tries:
        try:
            return score(model)
        except NoNamesError:
            continue
    return None


def _first(namer: Namer) -> Namer:
    """The names before any blending."""
    return namer.first if isinstance(namer, Blend) else namer


def _model(model: Segmenter, proposer: Proposer, namer: Namer) -> Segmenter:
    return Segmenter(proposer, namer, None, model.vocabulary, model.inference, model.task).eval()
