"""Segmenter: a proposer, a namer, a criterion and a vocabulary, and the only way from a picture to its segments."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from maskfirst import tasks
from maskfirst.contracts import Criterion, Namer, Proposer
from maskfirst.frames import Fit, Frame, Size
from maskfirst.types import Batch, Names, Proposals, Segments, Vocabulary


@dataclass(frozen=True)
class Inference:
    """How pictures are laid before the network, and its answers read.

    `window` and `stride`, px: overlapping windows (semantic only); None: the whole picture. `multiple`: canvases are padded
    to it; None: the proposer's; 1: no padding, as the originals. `scales`, `flip`: what test-time augmentation averages,
    after a softmax over the classes where `average` is "softmax" (mmseg), or as they are. `order`: see tasks.Order.
    `batch`: windows a pass; None: 4, but 1 on the CPU, where more are no faster. `strip`: rows of the answer made at a time,
    which bounds the memory.
    """

    fit: Fit = field(default_factory=Fit)
    window: Size | None = None
    stride: Size | None = None
    multiple: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: Literal["softmax", "raw"] = "softmax"
    order: tasks.Order = "masks_first"
    batch: int | None = None
    strip: int = 32

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise ValueError("stride without window; give both or neither")
        if self.window is not None and self.stride is None:
            raise ValueError("window without stride; two thirds of the window is usual")
        if (
            self.window is not None
            and self.stride is not None
            and any(not 0 < step <= side for step, side in zip(self.stride, self.window, strict=True))
        ):
            raise ValueError(f"stride {self.stride} must lie in 1..window {self.window}, or pixels would be left out")

    def views(self, original: Size, multiple: int, augment: bool) -> list[Frame]:
        """The frames of a picture: one, or with `augment` every scale, plain and mirrored. `multiple`: the proposer's."""
        multiple = self.multiple or multiple
        if not augment:
            return [Frame.fit(original, self.fit, 1.0, multiple)]
        plain = [Frame.fit(original, self.fit, scale, multiple) for scale in self.scales]
        return [view for frame in plain for view in ((frame, frame.flip()) if self.flip else (frame,))]

    def windows(self, view: Frame, multiple: int) -> list[Frame]:
        """The canvases of a view: itself, or its windows row by row. `multiple`: the proposer's."""
        if self.window is None or self.stride is None:
            return [view]
        return list(chain.from_iterable(view.windows(self.window, self.stride, self.multiple or multiple)))


class Segmenter(nn.Module):
    """Any proposer with any namer. `predict` is what the command line, the evaluation and everything else call."""

    def __init__(
        self, proposer: Proposer, namer: Namer, criterion: Criterion, vocabulary: Vocabulary, inference: Inference
    ) -> None:
        super().__init__()
        self.proposer = proposer
        self.namer = namer
        self.criterion = criterion
        self.vocabulary = vocabulary
        self.inference = inference

    @property
    def device(self) -> torch.device:
        """Where the parameters lie; the CPU for parts without any."""
        first = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def uses_truth(self) -> bool:
        """Whether `predict` must be given the truth (oracles)."""
        return self.proposer.uses_truth or self.namer.uses_truth

    def forward(self, batch: Batch) -> tuple[Proposals, Names]:
        proposals = self.proposer(batch)
        return proposals, self.namer(proposals, batch)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name, those of earlier guesses with `_0`, `_1`, ...; their plain sum is trained on."""
        if batch.truth is None:
            raise ValueError("losses need a batch with truth")
        truth = [
            tasks.targets(segments, self.vocabulary, task)
            for segments, task in zip(batch.truth, batch.tasks, strict=True)
        ]
        proposals = self.proposer(batch)
        losses = dict(self.criterion(proposals, self.namer(proposals, batch), truth))
        for index, guess in enumerate(proposals.earlier):
            for name, value in self.criterion(guess, self.namer(guess, batch), truth).items():
                losses[f"{name}_{index}"] = value
        return losses | self.proposer.extra_loss(proposals, batch)

    @torch.inference_mode()
    def predict(
        self,
        image: UInt8[Tensor, "3 H W"],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Segments | None = None,
    ) -> Segments:
        """The segments of one RGB picture, on the CPU. `augment`: test-time augmentation. `truth`: for oracles only."""
        tasks.check_task(task, self.proposer.tasks)
        return tasks.semantic(self.scores(image, augment=augment, truth=truth), self.inference.strip).to("cpu")

    @torch.inference_mode()
    def scores(
        self,
        image: Float[Tensor, "3 H W"] | UInt8[Tensor, "3 H W"],
        *,
        augment: bool = False,
        truth: Segments | None = None,
    ) -> tasks.Rows:
        """The semantic scores (K, H, W) of one RGB picture 0..255, to be fetched by rows; the network has run."""
        original = (image.shape[-2], image.shape[-1])
        settings = self.inference
        views = [
            self.view_scores(image, view, truth) for view in settings.views(original, self.proposer.multiple, augment)
        ]
        return tasks.mean(
            [tasks.softmax(rows) if augment and settings.average == "softmax" else rows for rows in views]
        )

    @torch.inference_mode()
    def view_scores(
        self, image: Float[Tensor, "3 H W"] | UInt8[Tensor, "3 H W"], view: Frame, truth: Segments | None = None
    ) -> tasks.Rows:
        """The semantic scores of one RGB picture seen in one way, brought back to the size `view.original`."""
        parts = [
            (
                frame,
                tasks.crop(tasks.read_out(proposals, names, index, frame.outer, self.inference.order), frame.visible),
            )
            for frame, proposals, names, index in self._windows(image, view, truth)
        ]
        rows = tasks.enlarge(tasks.stitch(parts), view.original)
        return tasks.flip(rows) if view.flipped else rows

    def _windows(
        self, image: Tensor, view: Frame, truth: Segments | None
    ) -> Iterator[tuple[Frame, Proposals, Names, int]]:
        """Runs the network over the windows of one view, `batch` at a time, and yields each with its place in the pass."""
        picture = view.resized(image.to(self.device))
        frames = self.inference.windows(view, self.proposer.multiple)
        count = self.inference.batch or (1 if self.device.type == "cpu" else 4)
        for start in range(0, len(frames), count):
            some = frames[start : start + count]
            pixels = torch.stack([frame.cut(picture, self.proposer.mean) for frame in some])
            seen = None if truth is None else tuple(_cut_truth(truth, frame, self.device) for frame in some)
            batch = Batch(pixels, ("semantic",) * len(some), tuple(some), ("",) * len(some), seen)
            proposals, names = self(batch)
            for index, frame in enumerate(some):
                yield frame, proposals, names, index


def _cut_truth(truth: Segments, frame: Frame, device: torch.device) -> Segments:
    masks = frame.apply(truth.masks.to(device), fill=(0.0,) * len(truth)) > 0.5 if len(truth) else truth.masks
    return Segments(masks, truth.classes.to(device), truth.scores.to(device), truth.crowd.to(device))
