"""The contracts of the parts: what a trunk, backbone, proposer, namer, criterion, phase, data set and metric promise.

All are abstract; an implementation is final and is built from a recipe by its constructor's arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.errors import UserError
from maskfirst.frames import Size
from maskfirst.types import Batch, Names, Proposals, Sample, Segments, Vocabulary, collate


class Trunk(nn.Module, ABC):
    """A plain ViT, opened block by block. Given RGB 0..255, it normalises for itself."""

    width: int
    depth: int
    patch: int
    prefix: int
    """Tokens of its own, class and registers, that come before those of the patches."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """By which it divides RGB less `mean`."""
    class_position: Float[Tensor, " D"] | None = None
    """What the weights that it was given add to a class token that its blocks do not see; no parameter of it."""

    @abstractmethod
    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        """Tokens, the prefix and then row by row of the picture zero-padded to whole patches, and their grid (h, w)."""

    @abstractmethod
    def block(
        self,
        index: int,
        tokens: Float[Tensor, "B N D"],
        grid: Size,
        mask: Bool[Tensor, "B N N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Block `index` (0..depth-1) applied. More tokens may stand before those that `embed` gave.

        `mask` is true where the token of a row may look at the token of a column; None: everywhere, which is faster.
        """

    @abstractmethod
    def shrink_block(
        self, index: int, queries: Float[Tensor, "B M D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        """Block `index` applied to `queries`, which attend to all `tokens`; without new parameters."""

    @abstractmethod
    def norm(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """The norm after the last block."""


class Backbone(nn.Module, ABC):
    """Maps of a picture. Given RGB 0..255, it normalises for itself.

    `channels` and `strides` (px) describe the maps in the order they come; `mean` is the RGB that it normalises to 0.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    multiple: int
    """Sizes that this divides need no padding inside."""

    @abstractmethod
    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _c _h _w"]]:
        """One map a tap."""


class Proposer(nn.Module, ABC):
    """Finds masks."""

    example: ClassVar[Mapping[str, Any]]
    """The smallest recipe that builds one, its `kind` included; tests and docs use it."""
    width: int | None
    """D of its queries; None where it gives none."""
    tasks: frozenset[str]
    """Of this instance; asking it for another is a sentence, not a NaN."""
    uses_truth: ClassVar[bool] = False
    """Whether `batch.truth` must be set for it to work at all (the oracle)."""
    reads_task: ClassVar[bool] = False
    """Whether what it finds depends on the task, other than by what is made of it."""
    mean: tuple[float, float, float]
    """RGB 0..255 of padding that its network takes for nothing."""
    multiple: int

    @abstractmethod
    def forward(self, batch: Batch) -> Proposals:
        """The proposals; with `earlier` ones where the batch has truth."""

    def at(self, progress: float) -> None:
        """Told the share of training done, 0..1, before every step."""

    def extra_loss(self, proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        """Losses of the method's own, by name."""
        return {}


class NoNamesError(UserError):
    """A namer's: these proposals come without that by which it names, whatever the picture."""


class Namer(nn.Module, ABC):
    """Names the masks it is given, from their queries, the image, or both."""

    example: ClassVar[Mapping[str, Any]]
    uses_truth: bool = False
    """Whether `batch.truth` must be set for it to work at all (the oracle)."""
    knows_void: ClassVar[bool] = True
    """Whether it can say that a mask is no object."""

    @abstractmethod
    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        """One row of logits a proposal. Raises NoNamesError."""


class PointNamer(Namer, ABC):
    """Names pixels of a picture, and so any mask by a pixel of it."""

    knows_void: ClassVar[bool] = False
    size: Size
    """(height, width) px that a picture is stretched to before it is looked at."""

    def stretch(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H2 W2"]:
        """RGB 0..255 of any size as `classify` takes it."""
        size = (self.size[0], self.size[1])
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)

    def forward(self, proposals: Proposals, batch: Batch) -> Names:
        return Names(F.pad(self.classify(*self.looks(proposals, batch)), (0, 1), value=float("-inf")))

    @abstractmethod
    def looks(self, proposals: Proposals, batch: Batch) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B Q 2"]]:
        """What `classify` is given to name masks by; read from no parameter."""

    @abstractmethod
    def classify(self, pixels: Float[Tensor, "B 3 H W"], points: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N K"]:
        """Logits over the names. `pixels`: RGB 0..255 of `size`. `points`: (y, x) in [-1, 1), 2 * pixel / side - 1."""


class Criterion(nn.Module, ABC):
    """How truth meets proposals."""

    example: ClassVar[Mapping[str, Any]]
    trains_void: ClassVar[bool] = False
    """Whether it trains which proposals are no object."""

    @abstractmethod
    def forward(self, proposals: Proposals, names: Names, truth: Sequence[Segments]) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name; their plain sum is the loss. `earlier` proposals are the caller's to pass one by one."""


Turns = Generator[dict[str, Tensor]]


class Phase(ABC):
    """Several turns a step, each with its own losses, its own optimizer and the module that this one trains.

    The loop does zero, backward, clip and step for each turn before it asks for the next, so that a later turn sees what an
    earlier one has learnt. Of several micro-batches the first turns are accumulated and stepped before the second turn of
    any is asked for. The losses of a turn must reach every trainable parameter of its module, whatever the batch: that lets
    processes train together without a search for unused parameters at every step.
    """

    modules: dict[str, nn.Module]
    """By the turn's name, in the order of the turns. The loop puts wrapped ones in their place: a turn calls
    `self.modules[name](function)` with what is to be run."""
    optimizers: dict[str, torch.optim.Optimizer]
    """By the turn's name; their groups come from `optim.parameter_groups`."""
    unscheduled: frozenset[str] = frozenset()
    """Turns whose learning rate stays as it is through the training."""

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        """Samples of one size as the batch that `turns` is given."""
        return collate(samples, task)

    @abstractmethod
    def turns(self, batch: Batch) -> Turns:
        """The weighted losses of each turn, lazily; their plain sum is trained on."""


class Dataset(ABC):
    """Pictures with truth, by index. `len`, and samples that are the same at every call."""

    vocabulary: Vocabulary

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, whole and not augmented. Raises data.images.ImageError naming the file where it cannot be read."""

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """The keys of all samples in order, without reading them."""

    def shown(self, index: int) -> frozenset[int]:
        """The classes that sample `index` has segments of, crowds too. Raises as `__getitem__`.

        A kind that can tell without reading the picture does.
        """
        return frozenset(self[index].classes.tolist())


class Augmentation(ABC):
    """A random change of a sample, drawn from torch's global random state."""

    @abstractmethod
    def __call__(self, sample: Sample) -> Sample: ...


@dataclass(frozen=True)
class Scores:
    """What a metric says in the end: fractions 0..1, NaN where there was nothing to score.

    `headline`: the name of the one of `means` that stands for all. `content`: everything, as JSON has it. `columns`: what the
    numbers of `rows` (one a class, its name first) and `below` (of several classes together) are.
    """

    headline: str
    means: Mapping[str, float]
    content: Mapping[str, Any]
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, tuple[float, ...]]]
    below: Sequence[tuple[str, tuple[float, ...]]]

    @property
    def value(self) -> float:
        """The headline's."""
        return self.means[self.headline]


Seen = TypeVar("Seen")
"""The form in which a metric wants truth and prediction."""


class Metric(ABC, Generic[Seen]):
    """Compares predictions with truth, picture by picture. Keeps no masks, and can be pickled, so that processes can meet."""

    @abstractmethod
    def update(self, truth: Seen, prediction: Seen, picture: int = 0) -> float | None:
        """Adds a picture, and returns its own score 0..1, None where it has no truth to score.

        `picture`: its place in the data set, where the order in which pictures come makes a difference.
        """

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Adds the pictures of another one of the same kind and vocabulary."""

    @abstractmethod
    def scores(self) -> Scores:
        """Of all pictures so far; the same whatever was merged from what."""


class Resizable(ABC):
    """A module with parameters that can be carried over from another size."""

    @abstractmethod
    def resize_from(self, name: str, tensor: Tensor) -> Tensor | None:
        """`tensor` (found under this module's parameter `name`) in that parameter's shape, or None."""


class Receiver(ABC):
    """A module that makes more of weights than what of them has its parameters' names."""

    remark: str | None = None
    """What is to be said of the weights that it was given last, in a clause."""

    @abstractmethod
    def receive(self, tensors: Mapping[str, Tensor]) -> Collection[str]:
        """Given tensors by this module's names, as they were before any resizing, when all that fits has been copied.

        Returns the names of its parameters that it has filled with what it made of others. Modules inside it come first.
        """


class PerClass(ABC):
    """A module with parameters that hold one row a class."""

    class_rows: ClassVar[Mapping[str, bool]]
    """Parameter name -> True where one more row, for no object, follows the K rows."""
