"""Segmenter: a proposer, a namer, a criterion and a vocabulary, and the only way from a picture to its segments."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskfirst import finite, rows, tasks
from maskfirst.ahead import ahead, groups
from maskfirst.contracts import Criterion, Namer, PointNamer, Proposer
from maskfirst.data.images import ImageError, Readable, as_rgb
from maskfirst.errors import UserError
from maskfirst.frames import Fit, Frame, Size
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.prediction import Prediction
from maskfirst.types import TASKS, Batch, Names, Proposals, Segments, Vocabulary


@dataclass(frozen=True)
class Inference:
    """How pictures are laid before the network, and its answers read.

    `window` and `stride`, px: overlapping windows (semantic only); None: the whole picture. `multiple`: canvases are padded
    to it; None: the proposer's; 1: no padding, as the originals. `pad`: pictures are first padded at the bottom and right to
    so many px a side at least, and windows run over that, too. `fill`: with the colour that the network normalises to 0, or
    black. `scales`, `flip`: what test-time augmentation averages, after a softmax over the classes where `average` is
    "softmax" (mmseg, also of scores that are probabilities already), or as they are; `tta_fit`: in place of `fit` there.
    `order`: see tasks.Order; that and augmentation are semantic only, too. `thresholds`: what counts as a segment in the other
    tasks. `batch`: windows a pass; None: 4, but 1 on the CPU, where more are no faster. `strip`: rows of the answer made at a
    time, which bounds the memory.
    """

    fit: Fit = field(default_factory=Fit)
    window: Size | None = None
    stride: Size | None = None
    multiple: int | None = None
    pad: int = 0
    fill: Literal["mean", "black"] = "mean"
    tta_fit: Fit | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: Literal["softmax", "raw"] = "softmax"
    order: tasks.Order = "masks_first"
    thresholds: tasks.Thresholds = field(default_factory=tasks.Thresholds)
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
        if self.pad < 0:
            raise ValueError(f"pad: {self.pad} must not be negative; it is the least side of a canvas in px")
        if self.window is not None and self.order == "masks_home":
            raise ValueError("order masks_home brings whole pictures home, and this has windows; use masks_first")

    def views(self, original: Size, multiple: int, augment: bool) -> list[Frame]:
        """The frames of a picture: one, or with `augment` every scale, plain and mirrored. `multiple`: the proposer's."""
        multiple = self.multiple or multiple
        if not augment:
            return [Frame.fit(original, self.fit, 1.0, multiple, self.pad)]
        fit = self.tta_fit or self.fit
        plain = [Frame.fit(original, fit, scale, multiple, self.pad) for scale in self.scales]
        return [view for frame in plain for view in ((frame, frame.flip()) if self.flip else (frame,))]

    def windows(self, view: Frame, multiple: int) -> list[Frame]:
        """The canvases of a view: itself, or its windows row by row. `multiple`: the proposer's."""
        if self.window is None or self.stride is None:
            return [view]
        return list(chain.from_iterable(view.windows(self.window, self.stride, self.multiple or multiple, self.pad)))


class Segmenter(nn.Module):
    """Any proposer with any namer. `predict` is what the command line, the evaluation and everything else call."""

    def __init__(
        self,
        proposer: Proposer,
        namer: Namer,
        criterion: Criterion | None,
        vocabulary: Vocabulary,
        inference: Inference,
        task: str = "semantic",
    ) -> None:
        """`criterion`: None where a phase with losses of its own trains it. `task`: what it is for, where nobody says."""
        super().__init__()
        self.proposer = proposer
        self.namer = namer
        self.criterion = criterion
        self.vocabulary = vocabulary
        self.inference = inference
        self.task = task

    @property
    def default_task(self) -> str:
        """What it is for, or the first that it can do."""
        return next(task for task in (self.task, *TASKS) if task in self.proposer.tasks)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie; the CPU for parts without any."""
        first = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def uses_truth(self) -> bool:
        """Whether `predict` must be given the truth (oracles)."""
        return self.proposer.uses_truth or self.namer.uses_truth

    @property
    def point_namer(self) -> PointNamer | None:
        """Its namer of points, on its own or in a blend."""
        return next((module for module in self.namer.modules() if isinstance(module, PointNamer)), None)

    def train(self, mode: bool = True) -> "Segmenter":
        """As ever, but that batch norms whose parameters are frozen keep their statistics, too."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and parameters and not any(each.requires_grad for each in parameters):
                module.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Proposals, Names]:
        with fast_on_cpu():
            proposals = self.proposer(batch)
            return proposals, self.namer(proposals, batch)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name, those of earlier guesses with `_0`, `_1`, ...; their plain sum is trained on."""
        if batch.truth is None or self.criterion is None:
            raise ValueError("losses need a batch with truth, and a criterion")
        if self.criterion.trains_void and not self.namer.knows_void:
            raise UserError(
                f"criterion {self.criterion.example['kind']} trains which proposals are no object, and namer "
                f"{self.namer.example['kind']} takes all for one; put it second in a `blend`, or train it by "
                "`phase: {kind: points}`"
            )
        truth = [
            tasks.targets(segments, self.vocabulary, task)
            for segments, task in zip(batch.truth, batch.tasks, strict=True)
        ]
        proposals, names = self(batch)
        losses = dict(self.criterion(proposals, names, truth))
        for index, guess in enumerate(proposals.earlier):
            for name, value in self.criterion(guess, self.namer(guess, batch), truth).items():
                losses[f"{name}_{index}"] = value
        return losses | self.proposer.extra_loss(proposals, batch)

    def predict(self, picture: Readable, task: str | None = None, *, augment: bool = False) -> Prediction:
        """What is in a picture: a path, the bytes of a file, one of Pillow's, an array or a tensor, see `images.as_rgb`.

        `task`: semantic, instance or panoptic; None: `default_task`. `augment`: test-time augmentation. May be called from
        several threads. Raises as `segment`, and ImageError for what is no picture.
        """
        return next(self.predict_many([picture], task, augment=augment, workers=0))

    def predict_many(
        self,
        pictures: Iterable[Readable],
        task: str | None = None,
        *,
        augment: bool = False,
        batch: int | None = None,
        workers: int = 2,
        skipped: Callable[[Readable, ImageError], None] | None = None,
    ) -> Iterator[Prediction]:
        """As `predict`, of pictures of any number and sizes, in their order, one at a time.

        `workers`: threads that read ahead; with any, the next pictures are segmented while what is yielded is used. `batch`:
        pictures a pass where their canvases have one size; None: as `inference.batch`. `skipped` is told of pictures that
        cannot be read, and the rest goes on; without it the first one raises ImageError.
        """
        task = task or self.default_task
        count = batch or self.batch

        def segmented(items: Sequence[tuple[Readable, Future[Tensor]]]) -> list[Prediction]:
            images, keys = [], []
            for picture, reading in items:
                try:
                    images.append(reading.result())
                except ImageError as error:
                    if skipped is None:
                        raise
                    skipped(picture, error)
                else:
                    keys.append(str(picture) if isinstance(picture, (str, os.PathLike)) else "")
            answers = self.segment_many(images, task, augment=augment, keys=keys, batch=count)
            return [
                Prediction(image, segments, self.vocabulary, task, key)
                for image, segments, key in zip(images, answers, keys, strict=True)
            ]

        chunks = groups(ahead(as_rgb, pictures, workers), count)
        for _, answers in ahead(segmented, chunks, min(workers, 1)):
            yield from answers.result()

    def segment(
        self,
        image: UInt8[Tensor, "3 H W"],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Segments | None = None,
        key: str = "",
    ) -> Segments:
        """The segments of one RGB picture, on the CPU. `augment`: test-time augmentation. `truth`: for oracles only.

        `key`: the picture's name, by which proposers that look its masks up find them.

        Tasks other than semantic are always answered from the whole picture at once. Raises UserError where the model cannot
        do the task, or where its network makes NaN.
        """
        told = None if truth is None else [truth]
        (answer,) = self.segment_many([image], task, augment=augment, truth=told, keys=[key])
        return answer

    @torch.inference_mode()
    def segment_many(
        self,
        images: Sequence[UInt8[Tensor, "3 _H _W"]],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Sequence[Segments] | None = None,
        keys: Sequence[str] | None = None,
        batch: int | None = None,
    ) -> list[Segments]:
        """As `segment`. Pictures whose canvases have one size share a pass, but for those seen in windows or several views.

        `batch`: canvases a pass at most; None: as `inference.batch`.
        """
        tasks.check_task(task, self.proposer.tasks, self.vocabulary)
        if augment and task != "semantic":
            raise UserError(f"test-time augmentation is for the semantic task only; leave it out for {task}")
        told = [
            _Told(None if truth is None else truth[place], "" if keys is None else keys[place])
            for place in range(len(images))
        ]
        settings = self.inference
        if augment or (task == "semantic" and settings.window is not None):
            scores = (
                self.scores(image, augment=augment, truth=each.truth, key=each.key)
                for image, each in zip(images, told, strict=True)
            )
            return [tasks.semantic(each, settings.strip).to("cpu") for each in scores]
        views = [settings.views(_size(image), self.proposer.multiple, augment=False)[0] for image in images]
        answers: dict[int, Segments] = {}
        for canvas in dict.fromkeys(view.outer for view in views):
            for places in groups(
                (place for place, view in enumerate(views) if view.outer == canvas), batch or self.batch
            ):
                frames = [views[place] for place in places]
                pictures = [
                    frame.resized(images[place].to(self.device)) for frame, place in zip(frames, places, strict=True)
                ]
                proposals, names = self._seen(pictures, frames, task, [told[place] for place in places])
                for index, place in enumerate(places):
                    answers[place] = self._answer(task, proposals, names, index, views[place]).to("cpu")
        return [answers[place] for place in range(len(images))]

    def _answer(self, task: str, proposals: Proposals, names: Names, index: int, frame: Frame) -> Segments:
        """What a task makes of the whole of a picture, seen at once."""
        settings = self.inference
        if task == "semantic":
            return tasks.semantic(self._home(frame, [(frame, proposals, names, index)]), settings.strip)
        given = (proposals, names, index, self.vocabulary, frame, settings.thresholds, settings.strip)
        return tasks.panoptic(*given).segments if task == "panoptic" else tasks.instance(*given)

    @torch.inference_mode()
    def name_points(self, image: UInt8[Tensor, "3 H W"], points: Float[Tensor, "P 2"]) -> Float[Tensor, "P K"]:
        """P of every name, 0..1, at `points`: (y, x) px of one RGB picture, whose first pixel has its centre at (0, 0).

        On the CPU. Raises UserError where no namer of points is in the model, or where a point is none of the picture.
        """
        namer = self.point_namer
        if namer is None:
            raise UserError(
                f"namer {self.namer.example['kind']} names masks, not points; take weights of a vit-p recipe"
            )
        sides = points.new_tensor(image.shape[-2:])
        outside = ~((points > -0.5) & (points < sides - 0.5)).all(1)
        if outside.any():
            y, x = points[outside.nonzero()[0, 0]].tolist()
            raise UserError(
                f"point y {y:g}, x {x:g} is none of the picture, which has {image.shape[-2]} rows and {image.shape[-1]} columns"
            )
        if not len(points):
            return torch.zeros(0, len(self.vocabulary))
        seen = namer.stretch(image[None].to(self.device).float())
        with fast_on_cpu():
            logits = namer.classify(seen, (2 * points / sides - 1)[None].to(seen))
        if finite.has_nan((logits,)):
            raise UserError("the names of points are NaN: the weights are damaged, or numbers were too large for bf16")
        return logits[0].float().softmax(-1).cpu()

    @torch.inference_mode()
    def scores(
        self,
        image: Float[Tensor, "3 H W"] | UInt8[Tensor, "3 H W"],
        *,
        augment: bool = False,
        truth: Segments | None = None,
        key: str = "",
    ) -> rows.Rows:
        """The semantic scores (K, H, W) of one RGB picture 0..255, to be fetched by rows; the network has run."""
        original = (image.shape[-2], image.shape[-1])
        settings = self.inference
        views = [
            self.view_scores(image, view, truth, key)
            for view in settings.views(original, self.proposer.multiple, augment)
        ]
        return rows.mean([rows.softmax(view) if augment and settings.average == "softmax" else view for view in views])

    @torch.inference_mode()
    def view_scores(
        self,
        image: Float[Tensor, "3 H W"] | UInt8[Tensor, "3 H W"],
        view: Frame,
        truth: Segments | None = None,
        key: str = "",
    ) -> rows.Rows:
        """The semantic scores of one RGB picture seen in one way, brought back to the size `view.original`."""
        return self._home(view, self._windows(image, view, truth, key))

    def _home(self, view: Frame, seen: Iterable[tuple[Frame, Proposals, Names, int]]) -> rows.Rows:
        """The semantic scores of the windows of a view, brought back to the size `view.original`."""
        if self.inference.order == "masks_home":
            ((frame, proposals, names, index),) = seen
            return tasks.read_home(proposals, names, index, frame)
        order = self.inference.order
        parts = [
            (frame, rows.crop(tasks.read_out(proposals, names, index, frame.outer, order), frame.visible))
            for frame, proposals, names, index in seen
        ]
        scores = rows.enlarge(rows.stitch(parts), view.original)
        return rows.flip(scores) if view.flipped else scores

    def _windows(
        self, image: Tensor, view: Frame, truth: Segments | None, key: str
    ) -> Iterator[tuple[Frame, Proposals, Names, int]]:
        """Runs the network over the windows of one view, `batch` at a time, and yields each with its place in the pass."""
        picture = view.resized(image.to(self.device))
        for frames in groups(self.inference.windows(view, self.proposer.multiple), self.batch):
            told = [_Told(truth, key)] * len(frames)
            proposals, names = self._seen([picture] * len(frames), frames, "semantic", told)
            for index, frame in enumerate(frames):
                yield frame, proposals, names, index

    @property
    def batch(self) -> int:
        """Canvases a pass, by `inference.batch` or else by the device."""
        return self.inference.batch or (1 if self.device.type == "cpu" else 4)

    def _seen(
        self,
        resized: Sequence[Float[Tensor, "3 _H _W"]],
        frames: Sequence[Frame],
        task: str,
        told: Sequence["_Told"],
    ) -> tuple[Proposals, Names]:
        """What the network makes of canvases, each cut of a resized picture. Raises UserError where that is NaN."""
        fill = self.proposer.mean if self.inference.fill == "mean" else (0.0, 0.0, 0.0)
        pixels = torch.stack([frame.cut(picture, fill) for frame, picture in zip(frames, resized, strict=True)])
        cut = [
            _cut_truth(tasks.targets(each.truth, self.vocabulary, task), frame, self.device)
            for frame, each in zip(frames, told, strict=True)
            if each.truth is not None
        ]
        keys = tuple(each.key for each in told)
        batch = Batch(pixels, (task,) * len(frames), tuple(frames), keys, tuple(cut) or None)
        proposals, names = self(batch)
        if finite.has_nan((proposals.masks, names.logits)):
            raise UserError(finite.blame(self, batch))
        return proposals, names


@dataclass(frozen=True, eq=False)
class _Told:
    """What is told of a picture beside its pixels."""

    truth: Segments | None
    key: str


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _cut_truth(truth: Segments, frame: Frame, device: torch.device) -> Segments:
    masks = frame.lay(truth.masks.to(device))
    return Segments(masks, truth.classes.to(device), truth.scores.to(device), truth.crowd.to(device))
