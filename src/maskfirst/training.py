"""Training: the section `train` of a recipe, all that decides what a training does to the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from maskfirst.errors import UserError
from maskfirst.optim import Group, Optimizer, Schedule


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    `batch`: pictures a step, over all processes. `micro`: pictures a process puts through the network at once; fewer than
    its share of the batch are accumulated, "auto" takes as many as fit, None its whole share. `clip`: the largest L2 norm of
    all gradients. `average`: decay of the running average of the weights, which is then what is evaluated and saved.
    `evaluate_every`: fraction of the training. `best`: the mean of an evaluation, such as mIoU_harmonic, by which weights are
    the best ones; None: the task's own. `save_steps`, `save_seconds`: whichever comes first. `log_steps`: steps
    between lines of the log. `workers`: processes that load data; they change nothing in the result. `pictures`: predictions
    drawn at each evaluation. `compile`: the proposer, by torch.compile.
    """

    steps: int
    batch: int
    micro: int | Literal["auto"] | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    groups: Sequence[Group] = ()
    schedule: Schedule = field(default_factory=Schedule)
    clip: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    average: float | None = None
    evaluate_every: float = 0.1
    best: str | None = None
    save_steps: int | None = None
    save_seconds: float = 600.0
    log_steps: int = 10
    seed: int = 0
    workers: int = 2
    pictures: int = 4
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1")
        if isinstance(self.micro, int) and not 1 <= self.micro <= self.batch:
            raise UserError(f"micro: {self.micro} must lie in 1..batch ({self.batch})")
        if self.average is not None and not 0 < self.average < 1:
            raise UserError(f"average: {self.average} must lie between 0 and 1, 0.999 being usual; null for none")
        if not 0 < self.evaluate_every <= 1:
            raise UserError(f"evaluate_every: {self.evaluate_every} must lie in 0..1, as a fraction of the training")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"clip: {self.clip} must be above 0; null for no clipping")
        if self.save_steps is not None and self.save_steps < 1:
            raise UserError(f"save_steps: {self.save_steps} must be at least 1; null to save by time alone")
        if self.workers < 0 or self.pictures < 0:
            raise UserError(f"workers ({self.workers}) and pictures ({self.pictures}) must not be negative")

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the model is evaluated; the last step is always one."""
        count = math.ceil(1 / self.evaluate_every)
        return sorted({max(1, round(i * self.evaluate_every * self.steps)) for i in range(1, count)} | {self.steps})

    def share(self, world: int) -> int:
        """Pictures a step for each of `world` processes."""
        if self.batch % world:
            below, above = self.batch // world * world, -(-self.batch // world) * world
            fitting = " or ".join(str(batch) for batch in (below, above) if batch)
            raise UserError(f"train.batch: {self.batch} cannot be shared out to {world} processes; make it {fitting}")
        return self.batch // world
