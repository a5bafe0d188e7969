"""The phase of points: a namer that names points learns to name pixels of the truth, with no masks and nothing proposed.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (ViT-P).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from maskfirst.contracts import Phase, PointNamer, Turns
from maskfirst.data.points import draw
from maskfirst.errors import UserError, listed
from maskfirst.frames import Frame
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.optim import parameter_groups
from maskfirst.phase import Trained
from maskfirst.segmenter import Segmenter
from maskfirst.training import Training
from maskfirst.types import VOID, Batch, Sample


class PointPhase(Phase):
    """One turn: cross-entropy of the namer alone, on points of which every class of a picture has the same share."""

    def __init__(self, segmenter: Segmenter, settings: Training, count: int = 250) -> None:
        """`count`: points a picture. Raises UserError where something else than a namer of points would be trained."""
        if count < 1:
            raise UserError(f"count: {count} must be at least 1, as points a picture")
        if not isinstance(segmenter.namer, PointNamer):
            raise UserError(
                f"phase points trains a namer of points, and {type(segmenter.namer).__name__} is none; take namer vit_p"
            )
        if segmenter.criterion is not None:
            raise UserError("phase points has a loss of its own; take 'criterion' out of the recipe")
        learning = [name for name, value in segmenter.proposer.named_parameters() if value.requires_grad]
        if learning:
            raise UserError(
                f"phase points trains the namer alone, and the proposer has {len(learning)} trainable parameters "
                f"({listed(learning, 3)}); set proposer.freeze to true"
            )
        self.namer, self.count = segmenter.namer, count
        groups = parameter_groups(
            dict(self.namer.named_parameters(prefix="namer")), settings.optimizer, settings.groups
        )
        self.modules = {"points": Trained(self.namer)}
        self.optimizers = {"points": settings.optimizer.build(groups)}

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        """The pictures that have a class somewhere, with points of theirs; without any, the first with points of no class.

        Raises UserError where their size is not the namer's.
        """
        size = (self.namer.size[0], self.namer.size[1])
        for height, width in (sample.image.shape[-2:] for sample in samples):
            if (height, width) != size:
                raise UserError(
                    f"augment: samples have {height} x {width} px, and the namer takes {size[0]} x {size[1]}; "
                    "end the list with {kind: resize}"
                )
        drawn = [(sample, *draw(sample, self.count)) for sample in samples]
        kept = [each for each in drawn if len(each[1])]
        if not kept:
            nothing = torch.zeros(self.count, 2), torch.full((self.count,), VOID)
            kept = [(samples[0], *nothing)]
        pixels = torch.stack([sample.image for sample, _, _ in kept]).float()
        return Batch(
            pixels,
            (task,) * len(kept),
            (Frame(size, size, size),) * len(kept),
            tuple(sample.key for sample, _, _ in kept),
            points=torch.stack([places for _, places, _ in kept]).to(pixels),
            point_classes=torch.stack([classes for _, _, classes in kept]).to(pixels.device),
        )

    def turns(self, batch: Batch) -> Turns:
        yield self.modules["points"](lambda: {"points": self._loss(batch)})

    def _loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean over the points that have a class, 0 where none has one."""
        if batch.points is None or batch.point_classes is None:
            raise ValueError("phase points needs a batch with points and their classes")
        sides = torch.tensor(self.namer.size, device=batch.points.device)
        with fast_on_cpu():
            logits = self.namer.classify(batch.pixels, 2 * batch.points / sides - 1)
        classes = batch.point_classes.flatten()
        # A sum over those left, and not torch's mean, which is NaN where none is.
        total = F.cross_entropy(logits.flatten(0, 1), classes, ignore_index=VOID, reduction="sum")
        return total / (classes != VOID).sum().clamp(min=1)
