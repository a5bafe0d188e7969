"""The types that travel between the parts, and the letters for their axes.

B images, Q proposals, K names, N segments, D query width; H W pixels, h w mask grid. Coordinates are (y, x).
Classes are indices 0..K-1 into a Vocabulary; VOID marks a pixel without a class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, UInt8
from torch import Tensor

from maskfirst.frames import Frame

Part = TypeVar("Part")

VOID = -1
TASKS = ("semantic", "instance", "panoptic")


@dataclass(frozen=True)
class Vocabulary:
    """The names a model can give. The order of `names` is the class index, everywhere.

    `things`: indices of countable classes. `colors`: (r, g, b) 0..255, one a name. `ids`: the data set's own numbers.
    """

    names: tuple[str, ...]
    things: frozenset[int]
    colors: tuple[tuple[int, int, int], ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a vocabulary needs at least one name")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"names occur twice in the vocabulary: {', '.join(twice)}")
        if not len(self.names) == len(self.colors) == len(self.ids):
            raise ValueError(
                f"{len(self.names)} names, {len(self.colors)} colors and {len(self.ids)} ids; they must match"
            )
        if any(not 0 <= thing < len(self.names) for thing in self.things):
            raise ValueError(f"things {sorted(self.things)} must be indices of the {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one picture, truth and answer alike. Truth has score 1; only truth has crowds."""

    masks: Bool[Tensor, "N H W"]
    classes: Int64[Tensor, " N"]
    scores: Float[Tensor, " N"]
    crowd: Bool[Tensor, " N"]

    @classmethod
    def from_label_map(cls, labels: Int[Tensor, "H W"]) -> "Segments":
        """One segment a class that occurs in `labels` (values 0..K-1, VOID for none), in the order of the classes."""
        classes = torch.unique(labels)
        classes = classes[classes != VOID].long()
        masks = labels[None] == classes.to(labels.dtype)[:, None, None]
        return cls(
            masks, classes, torch.ones_like(classes, dtype=torch.float), torch.zeros_like(classes, dtype=torch.bool)
        )

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, keep: Tensor | slice) -> "Segments":
        return Segments(self.masks[keep], self.classes[keep], self.scores[keep], self.crowd[keep])

    @property
    def boxes(self) -> Float[Tensor, "N 4"]:
        """(x0, y0, x1, y1) px of each mask, x1 and y1 being the first beyond it; 0 for an empty mask."""
        masks = self.masks.cpu().numpy()
        # By numpy, which looks for pixels twenty times as fast as torch does.
        columns, rows = np.logical_or.reduce(masks, 1), np.logical_or.reduce(masks, 2)
        (x0, x1), (y0, y1) = (
            (inside.argmax(1), (inside.shape[1] - inside[:, ::-1].argmax(1)) * inside.max(1, initial=False))
            for inside in (columns, rows)
        )
        return torch.from_numpy(np.stack([x0, y0, x1, y1], 1)).to(self.masks.device, torch.float)

    def to(self, device: torch.device | str) -> "Segments":
        return Segments(*(t.to(device) for t in (self.masks, self.classes, self.scores, self.crowd)))

    def label_map(self) -> Int64[Tensor, "H W"]:
        """The class of every pixel, VOID where no segment lies; where segments overlap the later one wins."""
        labels = torch.full(self.masks.shape[-2:], VOID, dtype=torch.int64, device=self.masks.device)
        for mask, index in zip(self.masks, self.classes, strict=True):
            labels[mask] = index
        return labels


@dataclass(frozen=True, eq=False)
class SegmentMap:
    """Segments that do not overlap, as one map: `ids` index the N segments, VOID for none. What files and PQ speak of."""

    ids: Int32[Tensor, "H W"]
    classes: Int64[Tensor, " N"]
    scores: Float[Tensor, " N"]
    crowd: Bool[Tensor, " N"]

    @classmethod
    def of(cls, segments: Segments) -> "SegmentMap":
        """Where segments overlap the later one wins; one that is covered whole stays, without a pixel. On the CPU."""
        segments = segments.to("cpu")
        ids = np.full(segments.masks.shape[-2:], VOID, np.int32)
        for index, mask in enumerate(segments.masks.numpy()):
            np.copyto(ids, np.int32(index), where=mask)
        return cls(torch.from_numpy(ids), segments.classes, segments.scores, segments.crowd)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, keep: Bool[Tensor, " N"]) -> "SegmentMap":
        """Those where `keep` is true; pixels of the others have no segment."""
        return SegmentMap(renumbered(self.ids, keep), self.classes[keep], self.scores[keep], self.crowd[keep])

    @property
    def areas(self) -> Int64[Tensor, " N"]:
        """px of each segment. By numpy, as writers ask for it in threads."""
        return torch.from_numpy(np.bincount(self.ids.cpu().numpy().ravel() + 1, minlength=len(self) + 1)[1:])

    @property
    def boxes(self) -> Int64[Tensor, "N 4"]:
        """(x0, y0, x1, y1) px as `Segments.boxes`. By numpy, as writers ask for it in threads."""
        ids = self.ids.cpu().numpy()
        height, width = ids.shape
        # Run by run, as there are far fewer runs in rows than pixels.
        rows, firsts = np.nonzero(np.diff(ids, axis=1, prepend=ids.min(initial=0) - 1))
        behind = np.roll(firsts, -1)
        behind[behind == 0] = width
        owners = ids[rows, firsts]
        inside = owners != VOID
        owners, rows, firsts, behind = owners[inside], rows[inside], firsts[inside], behind[inside]
        boxes = np.tile(np.array([width, height, 0, 0], np.int64), (len(self), 1))
        np.minimum.at(boxes[:, 0], owners, firsts)
        np.minimum.at(boxes[:, 1], owners, rows)
        np.maximum.at(boxes[:, 2], owners, behind)
        np.maximum.at(boxes[:, 3], owners, rows + 1)
        boxes[boxes[:, 2] == 0] = 0
        return torch.from_numpy(boxes)

    @property
    def segments(self) -> Segments:
        """Opened into masks."""
        numbers = torch.arange(len(self.classes), dtype=torch.int32, device=self.ids.device)
        return Segments(self.ids[None] == numbers[:, None, None], self.classes, self.scores, self.crowd)


def renumbered(ids: Int32[Tensor, "*L H W"], keep: Bool[Tensor, " N"]) -> Int32[Tensor, "*L H W"]:
    """A map of the numbers of segments, VOID for none, when only those of them are left where `keep` is true."""
    # VOID, -1, is the last.
    numbers = torch.cat([torch.where(keep, keep.cumsum(0) - 1, VOID), keep.new_full((1,), VOID, dtype=torch.int64)])
    return numbers.int()[ids.long()]


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture with its truth as a data set yields it.

    `image` RGB 0..255. `ids` index the N segments, VOID for no segment; L layers, as segments of one layer cannot
    overlap (L = 1 for all but overlapping instances). `classes` and `crowd` describe the segments. `key` names the picture.
    """

    image: UInt8[Tensor, "3 H W"]
    ids: Int32[Tensor, "L H W"]
    classes: Int64[Tensor, " N"]
    crowd: Bool[Tensor, " N"]
    key: str

    def __getitem__(self, keep: Bool[Tensor, " N"]) -> "Sample":
        """With the segments where `keep` is true alone."""
        return replace(self, ids=renumbered(self.ids, keep), classes=self.classes[keep], crowd=self.crowd[keep])

    @property
    def truth(self) -> Segments:
        """The segments opened into masks; those without a pixel left are dropped."""
        # Those that are left are found first, so that a crop of a crowded picture never opens all of its masks.
        pixels = torch.bincount((self.ids + 1).flatten(), minlength=len(self.classes) + 1)[1:]
        left = pixels.nonzero()[:, 0]
        masks = torch.zeros(len(left), *self.ids.shape[-2:], dtype=torch.bool, device=self.ids.device)
        for layer in self.ids:
            masks |= layer == left[:, None, None].to(layer.dtype)
        classes = self.classes[left]
        return Segments(masks, classes, torch.ones_like(classes, dtype=torch.float), self.crowd[left])


@dataclass(frozen=True, eq=False)
class Names:
    """What the proposals are called: logits over K names and, last, no object (K1 = K + 1)."""

    logits: Float[Tensor, "B Q K1"]

    @property
    def joint(self) -> Float[Tensor, "B Q K"]:
        """P(an object, and this name)."""
        return self.logits.softmax(-1)[..., :-1]

    @property
    def given_object(self) -> Float[Tensor, "B Q K"]:
        """P(this name, if it is an object)."""
        return self.logits[..., :-1].softmax(-1)

    @property
    def void(self) -> Float[Tensor, "B Q"]:
        """P(no object)."""
        return self.logits.softmax(-1)[..., -1]

    @classmethod
    def compose(cls, given_object: Float[Tensor, "B Q K"], void: Float[Tensor, "B Q"]) -> "Names":
        """The names with these views: the exact inverse of `given_object` and `void`."""
        return cls(torch.cat([given_object.log() + torch.log1p(-void)[..., None], void.log()[..., None]], -1))


@dataclass(frozen=True, eq=False)
class Proposals:
    """Masks before they have names.

    `masks`: logits on the mask grid, over the whole canvas. `competing`: a softmax over Q shares every pixel out (a
    per-pixel classifier); otherwise each mask stands alone and is above 0 inside. `resolution`: size in px at which the
    masks are read out, None for the canvas's. `queries`: what a namer may read. `names`: set where masks arrive named.
    `earlier`: shallower guesses, made only when truth is at hand, each with its `weight` in the loss.
    `extras`: tensors for the method's own loss.
    """

    masks: Float[Tensor, "B Q h w"]
    competing: bool = False
    resolution: tuple[int, int] | None = None
    queries: Float[Tensor, "B Q D"] | None = None
    names: Names | None = None
    earlier: tuple["Proposals", ...] = ()
    weight: float = 1.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a network is given. `pixels`: RGB 0..255, not normalised; `tasks`, `frames`, `keys`: one a picture.

    `truth` lies on the canvas (H, W). `points`: (y, x) px on the canvas, the centre of its first pixel being (0, 0), where
    pixels and not masks are to be named; `point_classes`: what they are, in training. `task_numbers`: the tasks by their
    places in TASKS, where they are an input of a graph; they count before `tasks` then.
    """

    pixels: Float[Tensor, "B 3 H W"]
    tasks: tuple[str, ...]
    frames: tuple[Frame, ...]
    keys: tuple[str, ...]
    truth: tuple[Segments, ...] | None = None
    points: Float[Tensor, "B P 2"] | None = None
    point_classes: Int64[Tensor, "B P"] | None = None
    task_numbers: Int64[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, places: Sequence[int]) -> "Batch":
        """Some of its pictures, in that order."""

        def of(each: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(each[place] for place in places)

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[list(places)]

        return Batch(
            self.pixels[list(places)],
            of(self.tasks),
            of(self.frames),
            of(self.keys),
            None if self.truth is None else of(self.truth),
            rows(self.points),
            rows(self.point_classes),
            rows(self.task_numbers),
        )

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.pixels.to(device),
            self.tasks,
            self.frames,
            self.keys,
            None if self.truth is None else tuple(segments.to(device) for segments in self.truth),
            None if self.points is None else self.points.to(device),
            None if self.point_classes is None else self.point_classes.to(device),
            None if self.task_numbers is None else self.task_numbers.to(device),
        )


def collate(samples: Sequence[Sample], task: str) -> Batch:
    """Samples of one size as a batch with truth, every canvas being the sample itself."""
    sizes = {tuple(sample.image.shape[-2:]) for sample in samples}
    if len(sizes) != 1:
        raise ValueError(f"samples of one batch must have one size, got {sorted(sizes)}; let the augmentation crop")
    size = sizes.pop()
    frame = Frame((size[0], size[1]), (size[0], size[1]), (size[0], size[1]))
    return Batch(
        torch.stack([sample.image for sample in samples]).float(),
        (task,) * len(samples),
        (frame,) * len(samples),
        tuple(sample.key for sample in samples),
        tuple(sample.truth for sample in samples),
    )
