"""The joint phase: one model learns several tasks at once, every picture being given one of them by chance.

Jain et al., "OneFormer: One Transformer to Rule Universal Image Segmentation", CVPR 2023.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from maskfirst.contracts import Phase, Turns
from maskfirst.errors import UserError
from maskfirst.phase import Ordinary
from maskfirst.segmenter import Segmenter
from maskfirst.tasks import check_task
from maskfirst.training import Training
from maskfirst.types import TASKS, Batch, Sample


class JointPhase(Phase):
    """The ordinary phase on pictures whose tasks differ. Each is a share of the pictures; the data must serve them all.

    Truth is what the picture's task wants of it, so panoptic data serves all three.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: Training,
        semantic: float = 0.33,
        instance: float = 0.33,
        panoptic: float = 0.34,
    ) -> None:
        """The shares need not sum to 1. Raises UserError where the model cannot do a task that has one."""
        self.shares = dict(zip(TASKS, (semantic, instance, panoptic), strict=True))
        for task, share in self.shares.items():
            if share < 0:
                raise UserError(
                    f"{task}: {share} must not be negative; it is the share of pictures that have this task"
                )
            if share:
                try:
                    check_task(task, segmenter.proposer.tasks, segmenter.vocabulary)
                except UserError as error:
                    raise UserError(f"{error}; or say `{task}: 0` in the phase") from error
        if not any(self.shares.values()):
            raise UserError("semantic, instance, panoptic: at least one share must be above 0")
        self.ordinary = Ordinary(segmenter, settings)
        # The same, so that it runs what the loop has put in their place.
        self.modules, self.optimizers = self.ordinary.modules, self.ordinary.optimizers

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        """The samples as a batch, each with a task of its own, from torch's global random state; `task` is not heeded."""
        drawn = torch.multinomial(torch.tensor([*self.shares.values()]), len(samples), replacement=True)
        return replace(self.ordinary.collate(samples, task), tasks=tuple(TASKS[index] for index in drawn.tolist()))

    def turns(self, batch: Batch) -> Turns:
        yield from self.ordinary.turns(batch)
