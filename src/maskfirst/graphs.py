"""Graphs: the networks of a segmenter as functions of tensors alone, and a segmenter around what runs them elsewhere.

A graph is a `Run`: an ONNX file in a runtime, or a program of torch.export. All else stays the Segmenter's: canvases, windows,
scales, flips, points and tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskfirst import answers, tasks
from maskfirst.contracts import Namer, PointNamer, Proposer
from maskfirst.errors import UserError
from maskfirst.frames import Frame, Size
from maskfirst.namers.blend import Blend
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.saved import Saved
from maskfirst.segmenter import Segmenter
from maskfirst.types import TASKS, Batch, Names, Proposals

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A graph: tensors by the names of its inputs to tensors by the names of its outputs, all on the CPU."""


class GraphError(UserError):
    """A graph that cannot be made, is damaged, or cannot be run."""


@dataclass(frozen=True)
class Facts:
    """What the tensors of a graph of masks do not tell.

    `named`: whether it gives names, too. `competing`, `resolution`: see Proposals. `multiple`: px that divide the sides of
    every canvas that it takes; `size`: (height, width) px of the only one, None for any.
    """

    named: bool
    competing: bool
    resolution: Size | None
    multiple: int
    size: Size | None = None


class MaskNetwork(nn.Module):
    """Pixels to masks and, where something but points names them, to names; with `answer`, to the answer of that task, too."""

    def __init__(self, segmenter: Segmenter, answer: str | None = None) -> None:
        super().__init__()
        self.proposer = segmenter.proposer
        self.namer = _plain_namer(segmenter.namer)
        if answer is not None and self.namer is not segmenter.namer:
            raise GraphError(
                "--answer: the names of this model come from points, which are found outside of the graph; leave it out"
            )
        self.task = answer
        self.vocabulary = segmenter.vocabulary
        self.order: tasks.Order = segmenter.inference.order
        self.thresholds = segmenter.inference.thresholds
        self.inputs: tuple[str, ...] = ("pixels", "task") if self.proposer.reads_task else ("pixels",)
        named = () if self.namer is None else ("names",)
        self.outputs = ("masks", *named, *(() if answer is None else answers.OUTPUTS[answer]))

    def facts(self, pixels: Float[Tensor, "B 3 H W"]) -> Facts:
        """Of what it makes of `pixels`."""
        with torch.inference_mode():
            proposals = self.proposer(_batch(pixels, None))
        return Facts(self.namer is not None, proposals.competing, proposals.resolution, self.proposer.multiple)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        batch = _batch(_whole(given[0], self.proposer.multiple), given[1] if self.proposer.reads_task else None)
        proposals = self.proposer(batch)
        if self.namer is None:
            return (proposals.masks,)
        names = self.namer(proposals, batch)
        if self.task is None:
            return proposals.masks, names.logits
        told = (self.task, proposals, names, batch.frames[0].outer, self.vocabulary, self.order, self.thresholds)
        return proposals.masks, names.logits, *answers.answer(*told)


class PointNetwork(nn.Module):
    """Pixels of the namer's size, and points as `PointNamer.classify` has them, to logits over the names."""

    inputs = ("pixels", "points")
    outputs = ("names",)

    def __init__(self, namer: PointNamer) -> None:
        super().__init__()
        self.namer = namer

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return (self.namer.classify(*given),)


Network = MaskNetwork | PointNetwork


def _batch(pixels: Float[Tensor, "B 3 H W"], task: Tensor | None) -> Batch:
    size = cast("Size", tuple(pixels.shape[-2:]))
    # Only namers of points, which run elsewhere, look at one frame a picture.
    return Batch(pixels, (TASKS[0],), (Frame(size, size, size),), ("",), task_numbers=task)


def _whole(pixels: Float[Tensor, "B 3 H W"], multiple: int) -> Float[Tensor, "B 3 H W"]:
    """The pixels, all of them, with sides that are seen to be so many multiples.

    All sizes that follow are simple terms then. With sides that are only promised to be, tracing takes ten times as long.
    """
    rows, columns = (side // multiple for side in pixels.shape[-2:])
    return pixels.narrow(-2, 0, rows * multiple).narrow(-1, 0, columns * multiple)


def _plain_namer(namer: Namer) -> Namer | None:
    """That which is no namer of points; None where there is none."""
    if isinstance(namer, Blend):
        plain = [each for each in map(_plain_namer, (namer.first, namer.second)) if each is not None]
        if len(plain) > 1:
            raise GraphError("two namers of a blend read the masks' queries, and a graph has one of them; blend points")
        return plain[0] if plain else None
    return None if isinstance(namer, PointNamer) else namer


def networks(segmenter: Segmenter, answer: str | None = None) -> tuple[MaskNetwork | None, PointNetwork | None]:
    """The network of masks and that of points, each where there is one. Raises GraphError where there is nothing to run."""
    points = segmenter.point_namer
    if any(isinstance(module, OracleNamer) for module in segmenter.modules()):
        raise GraphError("namer oracle is told the truth, which no graph is; take another namer")
    known = segmenter.proposer.uses_truth or isinstance(segmenter.proposer, Saved)
    if known and points is None:
        kind = segmenter.proposer.example["kind"]
        raise GraphError(f"proposer {kind} is told the masks, and nothing is left that a graph could do")
    return (
        None if known else MaskNetwork(segmenter, answer).eval(),
        None if points is None else PointNetwork(points).eval(),
    )


class GraphProposer(Proposer):
    """Masks, and names where there are some, of a graph that was made of the proposer `like`."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "graph"}
    width = None

    def __init__(self, run: Run, facts: Facts, like: Proposer) -> None:
        super().__init__()
        self.run, self.facts = run, facts
        self.tasks, self.mean, self.multiple = like.tasks, like.mean, like.multiple
        self.told = like.reads_task

    def forward(self, batch: Batch) -> Proposals:
        facts, canvas = self.facts, (batch.pixels.shape[-2], batch.pixels.shape[-1])
        if facts.size is not None and canvas != facts.size:
            raise GraphError(
                f"this graph is for canvases of {facts.size[0]} x {facts.size[1]} px, and one of {canvas[0]} x {canvas[1]} "
                f"came; export it with --size {canvas[0]}x{canvas[1]}, or give it pictures of its size"
            )
        given = {"pixels": batch.pixels.cpu()}
        if self.told:
            given["task"] = torch.tensor([TASKS.index(task) for task in batch.tasks])
        found = {name: tensor.to(batch.pixels.device) for name, tensor in self.run(given).items()}
        names = Names(found["names"]) if facts.named else None
        return Proposals(found["masks"], facts.competing, facts.resolution, names=names)


class GraphPoints(PointNamer):
    """A namer of points of a graph that was made of the namer `like`, which says where masks are looked at."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "graph"}

    def __init__(self, run: Run, like: PointNamer) -> None:
        super().__init__()
        self.run = run
        self.size = like.size
        # No part of this module: its parameters may have no numbers.
        self._looks = like.looks

    def looks(self, proposals: Proposals, batch: Batch) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B Q 2"]]:
        return self._looks(proposals, batch)

    def classify(self, pixels: Float[Tensor, "B 3 H W"], points: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N K"]:
        return self.run({"pixels": pixels.cpu(), "points": points.cpu()})["names"].to(pixels.device)


def driven(like: Segmenter, facts: Facts | None, masks: Run | None, points: Run | None) -> Segmenter:
    """`like`, on whatever device, with graphs in place of its networks. Its proposer stays where no graph has masks."""
    proposer = like.proposer if masks is None or facts is None else GraphProposer(masks, facts, like.proposer)
    namer = like.namer if points is None and masks is None else _driven(like.namer, points)
    return Segmenter(proposer, namer, None, like.vocabulary, settled(like).inference, like.task).eval()


def _driven(namer: Namer, points: Run | None) -> Namer:
    if isinstance(namer, Blend):
        return Blend(_driven(namer.first, points), _driven(namer.second, points), namer.weight, namer.normalise)
    if isinstance(namer, PointNamer) and points is not None:
        return GraphPoints(points, namer)
    return Given()


def settled(like: Segmenter) -> Segmenter:
    """`like` with canvases padded to what a graph of it takes, where its recipe leaves them as they come."""
    if like.inference.multiple is None:
        return like
    inference = replace(like.inference, multiple=None)
    return Segmenter(like.proposer, like.namer, None, like.vocabulary, inference, like.task).eval()


def example(network: Network, size: Size) -> tuple[Tensor, ...]:
    """Inputs to trace with: two pictures of `size` px of noise."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, *size), generator=random).float()
    if isinstance(network, PointNetwork):
        return pixels, 2 * torch.rand(2, 3, 2, generator=random) - 1
    return (pixels, torch.tensor([0, 1])) if network.proposer.reads_task else (pixels,)


def named(network: Network, found: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs by their names."""
    return dict(zip(network.outputs, found, strict=True))
