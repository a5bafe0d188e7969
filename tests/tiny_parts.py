"""Parts so small that a training of them takes a moment: what the tests of training build their recipes of."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.build import Experiment
from maskfirst.contracts import Augmentation, Dataset, PointNamer, Proposer
from maskfirst.data.images import ImageError
from maskfirst.proposers.dense import one_name_each
from maskfirst.recipe import Recipe
from maskfirst.types import Batch, Proposals, Sample, Vocabulary

VOCABULARY = Vocabulary(("dark", "light"), frozenset(), ((0, 0, 0), (255, 255, 255)), (0, 1))


class TinyProposer(Proposer):
    """One mask a class from two convolutions, with dropout and a buffer that counts; `explode`: NaN from that progress on.

    `norm`: a batch norm between them also where there is no dropout.
    """

    example: ClassVar[Mapping[str, Any]] = {"kind": "tiny_parts:TinyProposer"}

    def __init__(self, dropout: float = 0.0, silent: bool = False, explode: float = 2.0, norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1)])
        self.norm = nn.BatchNorm2d(4) if dropout or norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(4, 2, 1)
        if silent:
            self.token = nn.Parameter(torch.ones(3))
        self.explode, self.progress = explode, 0.0
        self.width, self.tasks, self.mean, self.multiple = None, frozenset({"semantic"}), (0.0, 0.0, 0.0), 1

    def at(self, progress: float) -> None:
        self.progress = progress

    def forward(self, batch: Batch) -> Proposals:
        hidden = self.dropout(self.norm(self.blocks[0](batch.pixels / 255 - 0.5)).relu())
        masks = self.head(hidden)
        if self.training and self.progress >= self.explode:
            masks = masks * float("nan")
        return Proposals(masks, competing=True, names=one_name_each(masks))


class TinyPointNamer(PointNamer):
    """A point is the sum of its place and of what a convolution sees there; a mask is its highest pixel."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "tiny_parts:TinyPointNamer", "size": [8, 8]}

    def __init__(self, vocabulary: Vocabulary, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.trunk = nn.Conv2d(3, 4, 1)
        self.point_proj = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, len(vocabulary))

    def classify(self, pixels: Tensor, points: Tensor) -> Tensor:
        here = points.flip(-1)[:, None] + 1 / torch.tensor(self.size[::-1])
        seen = F.grid_sample(self.trunk(pixels / 255 - 0.5), here.to(pixels), align_corners=False)
        return self.head(seen[:, :, 0].mT + self.point_proj(points))

    def looks(self, proposals: Proposals, batch: Batch) -> tuple[Tensor, Tensor]:
        highest = proposals.masks.flatten(2).argmax(-1)
        height, width = proposals.masks.shape[-2:]
        points = torch.stack([highest // width * 2 / height - 1, highest % width * 2 / width - 1], -1)
        return F.interpolate(batch.pixels, self.size, mode="bilinear", align_corners=False), points


class Noise(Dataset):
    """Pictures of 8 x 8 px, dark on one side and light on the other; those in `broken` cannot be read."""

    def __init__(self, length: int = 8, broken: tuple[int, ...] = (), seed: int = 0) -> None:
        self.length, self.broken, self.seed = length, broken, seed
        self.vocabulary = VOCABULARY

    def __len__(self) -> int:
        return self.length

    def keys(self) -> Sequence[str]:
        return [f"noise-{index}" for index in range(self.length)]

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise ImageError(f"noise-{index}.png: truncated")
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        ids = torch.zeros(1, 8, 8, dtype=torch.int32)
        ids[..., int(torch.randint(2, 7, (), generator=generator)) :] = 1
        image = (ids[0] * 120 + torch.randint(0, 100, (3, 8, 8), generator=generator)).to(torch.uint8)
        return Sample(image, ids, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), f"noise-{index}")


class Dim(Augmentation):
    """A darker picture, by chance."""

    def __call__(self, sample: Sample) -> Sample:
        image = (sample.image * torch.empty(()).uniform_(0.5, 1.0)).to(torch.uint8)
        return Sample(image, sample.ids, sample.classes, sample.crowd, sample.key)


def recipe(**train: Any) -> dict[str, Any]:
    """A whole recipe; `train` is laid over its section of that name."""
    settings = {
        "steps": 6, "batch": 4, "workers": 0, "pictures": 0, "evaluate_every": 0.5, "log_steps": 1, "save_seconds": 1e9,
        "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return {
        "proposer": {"kind": "tiny_parts:TinyProposer"},
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel"},
        "data": {"train": {"kind": "tiny_parts:Noise"}, "val": {"kind": "tiny_parts:Noise", "length": 3, "seed": 1}},
        "augment": [{"kind": "tiny_parts:Dim"}],
        "train": settings | train,
    }


def experiment(tree: dict[str, Any]) -> Experiment:
    return Experiment(Recipe(tree, "tiny.yaml"))
