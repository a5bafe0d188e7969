"""What steps the weights: parameter groups by rules, learning rates by schedule, and their running average."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskfirst.errors import UserError, nearest


@dataclass(frozen=True)
class Group:
    """A rule for the parameters whose whole name the regular expression `match` fits, of `dims` dimensions where that is said.

    `lr` multiplies the learning rate. `decay` is the weight decay itself. `layer_decay` makes early layers learn slower:
    the rate of layer i of a trunk of depth d is multiplied by layer_decay^(d + 1 - i), where the embeddings are layer 0,
    `blocks.<i>.` layer i + 1, and what follows the blocks layer d + 1 (BEiT; Bao et al., 2021). Blocks of several stages are
    counted through, and what lies between two stages is of the layer of the block after it. Names that the regular
    expression `first` fits are layer 0, wherever they lie.
    """

    match: str
    dims: int | None = None
    lr: float | None = None
    decay: float | None = None
    layer_decay: float | None = None
    first: str | None = None

    def __post_init__(self) -> None:
        for key, pattern in (("match", self.match), ("first", self.first or "")):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{key}: '{pattern}' is no regular expression: {error}") from error
        if self.first is not None and self.layer_decay is None:
            raise UserError("first: says which names are the first layer of a layer_decay, and there is none; give one")
        if self.lr is not None and self.lr < 0:
            raise UserError(f"lr: {self.lr} must not be negative; it multiplies the learning rate")
        if self.decay is not None and self.decay < 0:
            raise UserError(f"decay: {self.decay} must not be negative")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay: {self.layer_decay} must lie in 0..1, 0.75 being usual")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) or SGD with momentum. `betas` and `eps` are AdamW's, `momentum` is SGD's."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr: {self.lr} must be above 0")
        if self.decay < 0:
            raise UserError(f"decay: {self.decay} must not be negative")

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups made by `parameter_groups`."""
        if self.kind == "adamw":
            return torch.optim.AdamW(list(groups), lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return torch.optim.SGD(list(groups), lr=self.lr, momentum=self.momentum, fused=True)

    @property
    def moments(self) -> int:
        """Tensors of state that it keeps for each parameter."""
        return 2 if self.kind == "adamw" else 1


@dataclass(frozen=True)
class Schedule:
    """Decay after a linear warm-up, per step.

    `shape`: a polynomial of `power` over the whole training, which the warm-up multiplies; or half a cosine from the end of the
    warm-up on (Loshchilov & Hutter, "SGDR", 2017). `warmup` is a fraction of the training, `warmup_ratio` the factor that it
    starts from, `end` the factor it all ends at.
    `drops`: fractions at which the rate falls to a tenth besides; with `power` 0 that is all there is.
    """

    shape: Literal["poly", "cosine"] = "poly"
    power: float = 1.0
    warmup: float = 0.0
    warmup_ratio: float = 1e-6
    end: float = 0.0
    drops: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.shape == "cosine" and self.power != 1:
            raise UserError(f"power: {self.power} is of shape poly, and this is cosine; leave it out")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup: {self.warmup} must lie in 0..1, as a fraction of the training")
        if any(not 0 < drop < 1 for drop in self.drops):
            raise UserError(f"drops: {list(self.drops)} must lie between 0 and 1, as fractions of the training")

    def factor(self, step: int, steps: int) -> float:
        """What multiplies the learning rate at step 0..steps-1."""
        rising = round(self.warmup * steps)
        decayed = self._left(step, steps, rising) * (1 - self.end) + self.end
        decayed *= 0.1 ** sum(step >= round(drop * steps) for drop in self.drops)
        if step >= rising:
            return decayed
        return decayed * (1 - (1 - step / rising) * (1 - self.warmup_ratio))

    def _left(self, step: int, steps: int, rising: int) -> float:
        """What the shape leaves of the rate, 1..0, after a warm-up of `rising` steps."""
        if self.shape == "poly":
            return (1 - step / steps) ** self.power
        return 1.0 if step < rising else (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    def apply(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
        """Sets the learning rates for `step`, and returns the first group's."""
        factor = self.factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        return optimizer.param_groups[0]["lr"]


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, rules: Sequence[Group]
) -> list[dict[str, Any]]:
    """Trainable parameters by their learning rate and decay; for each field the first matching rule that sets it wins.

    A group's `base` is the rate that a schedule multiplies, its `names` are those of its `params`. Raises UserError for a
    rule that no parameter matches, or whose `layer_decay` finds no `blocks.<i>.`.
    """
    matching = [_matching(rule, parameters, f"train.groups[{index}]") for index, rule in enumerate(rules)]
    scales = {
        index: _layer_scales(list(names), rule.layer_decay, rule.first, f"train.groups[{index}]")
        for index, (rule, names) in enumerate(zip(rules, matching, strict=True))
        if rule.layer_decay is not None
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        hits = [rule for rule, names in zip(rules, matching, strict=True) if name in names]
        multiplier = next((rule.lr for rule in hits if rule.lr is not None), 1.0)
        decay = next((rule.decay for rule in hits if rule.decay is not None), optimizer.decay)
        scale = next((factors[name] for index, factors in scales.items() if name in matching[index]), 1.0)
        lr = optimizer.lr * multiplier * scale
        group = groups.setdefault((lr, decay), {"params": [], "names": [], "lr": lr, "base": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UserError("nothing to train: every parameter is frozen; take a 'freeze' out of the recipe")
    return list(groups.values())


def _matching(rule: Group, parameters: Mapping[str, nn.Parameter], place: str) -> dict[str, None]:
    """The names that a rule is for, in order."""
    named = [name for name in parameters if re.fullmatch(rule.match, name)]
    if not named:
        hint = nearest(rule.match.replace("\\", ""), parameters)
        raise UserError(f"{place}: '{rule.match}' matches no parameter.{hint}")
    found = {name: None for name in named if rule.dims in (None, parameters[name].ndim)}
    if not found:
        there = sorted({parameters[name].ndim for name in named})
        raise UserError(f"{place}: dims: no parameter of '{rule.match}' has {rule.dims}, they have {there}")
    return found


def _layer_scales(names: Sequence[str], layer_decay: float, first: str | None, place: str) -> dict[str, float]:
    """The factor of each name, which come in the order of the network: before, inside and after the blocks."""
    slowest = {name for name in names if first is not None and re.fullmatch(first, name)}
    if first is not None and not slowest:
        raise UserError(f"{place}.first: '{first}' fits none of the {len(names)} names that `match` does")
    blocks = [re.search(r"(?:^|\.)blocks\.(\d+)\.", name) for name in names]
    stages: dict[str, int] = {}
    for found in blocks:
        if found:
            stage = found.string[: found.start()]
            stages[stage] = max(stages.get(stage, 0), int(found[1]) + 1)
    depth = sum(stages.values())
    if depth == 0:
        raise UserError(
            f"{place}.layer_decay: none of the {len(names)} parameters has 'blocks.<i>.' in its name; "
            "match those of a plain ViT"
        )
    before = dict(zip(stages, accumulate(stages.values(), initial=0), strict=False))
    start = next(i for i, found in enumerate(blocks) if found)
    layers = [0] * start
    following = depth + 1
    for found in reversed(blocks[start:]):
        if found:
            following = before[found.string[: found.start()]] + int(found[1]) + 1
        layers.insert(start, following)
    return {
        name: layer_decay ** (depth + 1 - (0 if name in slowest else layer))
        for name, layer in zip(names, layers, strict=True)
    }


class Average:
    """Exponential moving average of a module's parameters and buffers (Polyak & Juditsky, 1992).

    The decay rises with the steps taken, min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.sources = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
        self.tensors = {name: value.clone() for name, value in self.sources.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Takes the module's present state in, after `steps` steps."""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        pairs = [(self.tensors[name], value) for name, value in self.sources.items()]
        smooth = [pair for pair in pairs if pair[0].is_floating_point()]
        # Public by its documentation, in spite of the underscore.
        torch._foreach_lerp_([mean for mean, _ in smooth], [value for _, value in smooth], weight)  # pyright: ignore[reportPrivateImportUsage]
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside the block, and its own state again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.sources.items():
            held: Tensor = value.clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(held)
