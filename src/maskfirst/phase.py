"""The ordinary phase, in which the segmenter's own losses train all of it; how the loop runs a step of any phase."""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from maskfirst import ranks
from maskfirst.contracts import Phase, Turns
from maskfirst.errors import UserError
from maskfirst.optim import parameter_groups
from maskfirst.segmenter import Segmenter
from maskfirst.stream import Load
from maskfirst.training import Training
from maskfirst.types import Batch


class Trained(nn.Module):
    """A module as the devices see it: what is to be run comes as a function, which runs inside `forward`.

    DistributedDataParallel averages the gradients of what ran in its forward, and mixed precision holds in it. A function
    passes through both untouched, where a frozen Batch would be refused and its pixels rounded to 16 bits.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return run()


class Ordinary(Phase):
    """One turn: the segmenter's own losses train all of it."""

    def __init__(self, segmenter: Segmenter, settings: Training) -> None:
        if segmenter.criterion is None:
            raise UserError("'criterion' is missing; only a `phase` with losses of its own goes without")
        groups = parameter_groups(dict(segmenter.named_parameters()), settings.optimizer, settings.groups)
        self.segmenter = segmenter
        self.modules = {"all": Trained(segmenter)}
        self.optimizers = {"all": settings.optimizer.build(groups)}

    def turns(self, batch: Batch) -> Turns:
        yield self.modules["all"](lambda: self.segmenter.losses(batch))


def rehearse(phase: Phase, segmenter: Segmenter, batch: Batch) -> list[str]:
    """Runs all turns of one batch without a step, and names the trainable parameters that no loss has reached.

    The segmenter is as before afterwards: no gradients, the same buffers.
    """
    buffers = [(buffer, buffer.clone()) for buffer in segmenter.buffers()]
    try:
        for losses in phase.turns(batch):
            reduce(torch.add, losses.values()).backward()
        return [name for name, value in segmenter.named_parameters() if value.requires_grad and value.grad is None]
    finally:
        segmenter.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


class NonFiniteError(UserError):
    """A loss or a gradient has become infinite or NaN; nothing that was saved before has been touched."""


def take_turns(fabric: Fabric, phase: Phase, loaded: Sequence[Load], task: str, clip: float | None) -> dict[str, float]:
    """One step: for each turn of the phase zero, backward over all micro-batches, clip, step.

    Returns the losses by name, averaged over the pictures of all processes, their sum `loss`, and `norm`, the largest L2 norm
    of a turn's gradients. Raises NonFiniteError before a step would be made of what is infinite or NaN.
    """
    pictures = sum(len(one.keys) for one in loaded)
    turns = [_turns(phase, one, fabric.device, task) for one in loaded]
    told = {"loss": 0.0, "norm": 0.0}
    for name, module in phase.modules.items():
        optimizer = phase.optimizers[name]
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for index, (turn, one) in enumerate(zip(turns, loaded, strict=True)):
            # The loop has wrapped it; Fabric keeps the wrapper's type to itself.
            with fabric.no_backward_sync(module, enabled=index < len(loaded) - 1):  # pyright: ignore[reportArgumentType]
                losses = {key: loss * (len(one.keys) / pictures) for key, loss in next(turn).items()}
                fabric.backward(reduce(torch.add, losses.values()))
            for key, loss in losses.items():
                sums[key] = sums.get(key, 0.0) + loss.detach()
            if name == list(phase.modules)[-1]:
                turn.close()  # lets its batch go
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip)
        values = dict(zip((*sums, "norm"), ranks.mean(torch.stack([*sums.values(), norm])).tolist(), strict=True))
        wrong = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise NonFiniteError(", ".join(wrong))
        optimizer.step()
        norm = max(told["norm"], values.pop("norm"))
        told |= {**values, "loss": told["loss"] + sum(values.values()), "norm": norm}
    return told


def _turns(phase: Phase, one: Load, device: torch.device, task: str) -> Turns:
    yield from phase.turns(phase.collate(one.unpack(device), task))
