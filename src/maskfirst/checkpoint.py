"""The run folder: what a training leaves behind, whole at every instant, and all that it resumes from in one file."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskfirst import draw, tasks, weights
from maskfirst.contracts import Dataset
from maskfirst.data.images import ImageError
from maskfirst.errors import UserError
from maskfirst.files import DiskError, write_aside, write_json
from maskfirst.optim import Average
from maskfirst.segmenter import Segmenter
from maskfirst.stream import Load

STATE = "last.state.safetensors"
RECIPE = "recipe.yaml"
LOG = "log.jsonl"
HARMLESS = frozenset(
    f"train.{key}" for key in ("micro", "workers", "save_steps", "save_seconds", "log_steps", "pictures")
)
"""Keys of a recipe that may differ when a run is resumed: they decide no weight, but for rounding."""


@dataclass
class State:
    """Where a run stands, besides tensors.

    `step`: steps taken. `micro`: pictures at once, settled at the start. `curve`: (step, score 0..1) of every evaluation.
    `scores`: all that the last evaluation found. `seconds`: time spent, over all resumptions.
    `unreadable`: the pictures passed over so far, a sentence each.
    """

    step: int = 0
    micro: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The best score of all evaluations; 0 before the first."""
        return max((score for _, score in self.curve), default=0.0)

    def record(self, scores: dict[str, Any], headline: float) -> None:
        """Takes an evaluation in. `headline`: the score that stands for all, 0 in the curve where it is NaN."""
        self.scores = scores
        self.curve.append((self.step, 0.0 if math.isnan(headline) else headline))

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation is better than all before."""
        return all(score < self.curve[-1][1] for _, score in self.curve[:-1])

    @property
    def evaluated(self) -> int | None:
        """The step of the last evaluation."""
        return self.curve[-1][0] if self.curve else None


class RunFolder:
    """One run's files. Nothing in it is ever half written: files are made aside and renamed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def open(self, recipe: Mapping[str, Any], resume: bool) -> State:
        """Makes the folder this run's own, and returns where the run stands: at step 0 unless it resumes a saved one.

        Raises UserError where another run lies here, or where the recipe is not the one that the run was started with.
        """
        recipe = _plain(recipe)
        started = [name for name in (STATE, RECIPE, LOG) if (self.path / name).exists()]
        if started and not resume:
            raise UserError(
                f"{self.path}: holds a run already ({', '.join(started)}); continue it with --resume, or give another --out"
            )
        state = State()
        if (self.path / STATE).exists():
            saved = json.loads(self._metadata())
            _compare(self.path, saved["recipe"], recipe)
            curve = [(step, score) for step, score in saved["state"]["curve"]]
            state = State(**{**saved["state"], "curve": curve})
        elif (self.path / RECIPE).exists():
            _compare(self.path, yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8")), recipe)
        for unfinished in self.path.glob(".*.part"):
            unfinished.unlink()
        with write_aside(self.path / RECIPE) as aside:
            aside.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return state

    def save(self, state: State, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
        """One file with all that a resumption needs; the one before is replaced when this one is whole.

        Raises DiskError where the disk is full, the one before being left as it is.
        """
        _write(self.path / STATE, tensors, json.dumps({"state": asdict(state), "recipe": _plain(recipe)}))

    def keep(self, state: State, segmenter: Segmenter, recipe: Mapping[str, Any]) -> None:
        """The weights after an evaluation: as the last, and as the best if they are."""
        for name in ("last", "best") if state.is_best else ("last",):
            weights.save(self.path / f"{name}.safetensors", segmenter, recipe, segmenter.vocabulary, state.scores)

    def draw(self, state: State, segmenter: Segmenter, dataset: Dataset, task: str, count: int) -> list[Path]:
        """One JPEG of `count` pictures, spread over the data set, with truth and prediction; none if `count` is 0."""
        rows = []
        for index in range(0, len(dataset), max(1, len(dataset) // max(1, count)))[:count]:
            with contextlib.suppress(ImageError):
                sample = dataset[index]
                seen = sample.truth if segmenter.uses_truth else None
                answer = segmenter.segment(sample.image, task, truth=seen, key=sample.key)
                words = segmenter.vocabulary
                truth = tasks.targets(sample.truth, words, task)
                rows.append(draw.side_by_side(sample.image, truth, answer, words, sample.key, task))
        path = self.path / "pictures" / f"step_{state.step:06d}.jpg"
        if rows:
            draw.write_overlay(path, draw.below(*rows))
        return [path] if rows else []

    def finish(self, state: State, score: str, hardware: str) -> None:
        """`scores.json`: the scores, the validation curve and whether it is flat, the time and the hardware.

        `score`: what the best was chosen by.
        """
        step, best = max(state.curve, key=lambda point: point[1])
        write_json(
            self.path / "scores.json",
            {
                "scores": state.scores,
                "best": {"step": step, score: best},
                "curve": [{"step": step, score: value} for step, value in state.curve],
                "trend": trend(state.curve),
                "steps": state.step,
                "minutes": round(state.seconds / 60, 2),
                "hardware": hardware,
                "unreadable": state.unreadable,
            },
        )

    def save_batch(self, loads: Sequence[Load], step: int, rank: int) -> Path:
        """Keeps the samples of a step, for replay: `Load`'s tensors by number, what else it holds in the metadata."""
        path = self.path / f"nonfinite_step_{step}_rank_{rank}.safetensors"
        tensors, told = {}, []
        for number, load in enumerate(loads):
            held = load._asdict()
            tensors |= {f"{number}.{name}": held.pop(name) for name in ("images", "ids", "classes", "crowd")}
            told.append(held)
        _write(path, tensors, json.dumps(told))
        return path

    @staticmethod
    def read_batch(path: Path | str) -> list[Load]:
        """What `save_batch` has kept."""
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["maskfirst"])
            names = ("images", "ids", "classes", "crowd")
            return [
                Load(*(file.get_tensor(f"{number}.{name}") for name in names), **{k: tuple(v) for k, v in held.items()})
                for number, held in enumerate(told)
            ]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the saved state, on the CPU."""
        with safe_open(self.path / STATE, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)

    def _metadata(self) -> str:
        try:
            with safe_open(self.path / STATE, "pt") as file:
                return file.metadata()["maskfirst"]
        except (SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / STATE}: is not the state of a run ({error}); give another --out") from error


def collect(
    module: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], average: Average | None
) -> dict[str, Tensor]:
    """All tensors of a training by name: parameters, buffers, the optimizers' moments, the running average."""
    tensors = {f"model.{name}": value.detach() for name, value in _held(module).items()}
    for turn, optimizer in optimizers.items():
        for name, parameter in _named(optimizer):
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{turn}.{name}.{key}": value for key, value in moments.items() if value is not None}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.tensors.items()}
    return tensors


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    average: Average | None,
) -> None:
    """Puts back what `collect` has taken. Raises UserError where the model is no longer the one that was saved."""
    targets = {f"model.{name}": value for name, value in _held(module).items()}
    if average is not None:
        targets |= {f"average.{name}": value for name, value in average.tensors.items()}
    saved = {name for name in tensors if not name.startswith("optimizer.")}
    unlike = sorted(saved ^ set(targets)) or sorted(n for n in targets if targets[n].shape != tensors[n].shape)
    if unlike:
        raise UserError(
            f"the saved state does not fit this model ({len(unlike)} tensors differ, such as '{unlike[0]}'): the program "
            "or its libraries have changed since; resume with those that started the run"
        )
    for name, value in targets.items():
        value.copy_(tensors[name])
    for turn, optimizer in optimizers.items():
        for name, parameter in _named(optimizer):
            start = f"optimizer.{turn}.{name}."
            keys = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
            moments = {key: tensors[start + key].to(parameter.device) for key in keys if start + key in tensors}
            if moments:
                optimizer.state[parameter] = moments


def trend(curve: list[tuple[int, float]]) -> str:
    """Whether a validation curve has gone flat: the mean score of its last fifth against that of the fifth before."""
    count = max(1, len(curve) // 5)
    if len(curve) < 2 * count or len(curve) < 3:
        return "too few evaluations to say whether the curve is flat"
    scores = [100 * score for _, score in curve]
    gain = sum(scores[-count:]) / count - sum(scores[-2 * count : -count]) / count
    if gain > 0.5:
        return f"the curve is still rising, {gain:+.1f} points in the last fifth: a longer training is likely better"
    if gain < -0.5:
        return f"the curve is falling, {gain:+.1f} points in the last fifth: the best weights are earlier ones"
    return f"the curve is flat, {gain:+.1f} points in the last fifth"


def _write(path: Path, tensors: Mapping[str, Tensor], told: str) -> None:
    with write_aside(path) as aside:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, aside, {"maskfirst": told})
        except SafetensorError as error:
            raise DiskError(f"{path}: not saved: {error}; what was there before is untouched") from error


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as a file gives it back, tuples being lists."""
    return json.loads(json.dumps(recipe))


def _compare(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = _flat(there), _flat(now)
    keys = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent") and key not in HARMLESS]
    if keys:
        listed = ", ".join(f"{key} ({old.get(key, 'absent')} there, {new.get(key, 'absent')} now)" for key in keys)
        raise UserError(
            f"{path}: was started with another recipe: {listed}; resume with {path / RECIPE}, or give another --out"
        )


def _flat(tree: Any, start: str = "") -> dict[str, Any]:
    """The leaves by their dotted path; empty lists and sections are leaves."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    leaves = {}
    for key, value in items:
        leaves |= _flat(value, f"{start}.{key}" if start else str(key))
    return leaves or {start: tree}
