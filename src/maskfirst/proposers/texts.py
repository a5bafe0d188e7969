"""Texts: how OneFormer is told its task, and what it learns its queries by: words for all that a picture shows.

Jain et al., "OneFormer: One Transformer to Rule Universal Image Segmentation", CVPR 2023.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from maskfirst import tasks
from maskfirst.criteria.contrastive import contrastive
from maskfirst.errors import UserError
from maskfirst.formats.byte_pairs import BytePairs
from maskfirst.proposers.mask2former import Attention
from maskfirst.types import TASKS, Batch, Segments, Vocabulary

LENGTH = 77
"""Tokens of a text, with those around it and the zeros behind it."""
TOKENS = 49408
"""Numbers that a token of CLIP's can have."""
_PANOPTIC = (49406, 518, 10549, 533, 1072, 24755, 49407)
_SEMANTIC = (49406, 518, 10549, 533, 29119, 1550, 49407)
_INSTANCE = (49406, 518, 10549, 533, 34572, 49407)
TASK_TOKENS: Mapping[str, tuple[int, ...]] = {"semantic": _SEMANTIC, "instance": _INSTANCE, "panoptic": _PANOPTIC}
"""CLIP's tokens of "The task is TASK", as the original's tokenizer gives them; the zeros behind are left out."""
TEMPERATURE = 0.07
"""What cosines are divided by at first."""
TOKEN_FILE = "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class Texts:
    """What OneFormer is trained with besides: a text encoder, whose texts of a picture its queries are to be like.

    `width`, `layers`: of the text encoder. `context`: learned texts that are the same for all pictures; all others are the
    truth's. `weight`: of the loss. `tokens`: CLIP's token file; None: that which comes with the extra `text`. It is read when
    a loss is first asked for.
    """

    width: int = 256
    layers: int = 6
    context: int = 16
    weight: float = 0.5
    tokens: str | None = None


class TextLayer(nn.Module):
    """A pre-norm transformer layer in which every token sees itself and those before; CLIP's quick GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        batch, length, _ = tokens.shape
        past = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().expand(batch, 1, -1, -1)
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, past)
        hidden = self.expand(self.norm2(tokens))
        return tokens + self.contract(hidden * (1.702 * hidden).sigmoid())


class TextEncoder(nn.Module):
    """CLIP's: a text is what its end token has become. Heads are 64 wide."""

    def __init__(self, width: int = 256, layers: int = 6, length: int = LENGTH, tokens: int = TOKENS) -> None:
        super().__init__()
        if width % 64:
            raise ValueError(f"texts.width: {width} must be a multiple of 64, the width of a head")
        self.embed = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.01)
        self.layers = nn.ModuleList(TextLayer(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Int64[Tensor, "M L"]) -> Float[Tensor, "M W"]:
        """`tokens`: numbers, the largest of which is the end; what follows it makes no difference, as it is not seen."""
        ends = tokens.argmax(1)
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x[torch.arange(len(x), device=x.device), ends])


class TextBranch(nn.Module):
    """The texts of a picture, one a query, and the loss that draws queries to them."""

    def __init__(
        self,
        settings: Texts,
        vocabulary: Vocabulary,
        queries: int,
        width: int,
        length: int = LENGTH,
        tokens: int = TOKENS,
    ) -> None:
        """`queries`, `width`: the proposer's; `length`, `tokens`: of a text, and what numbers it is made of."""
        super().__init__()
        if not 0 <= settings.context < queries:
            raise ValueError(f"texts.context: {settings.context} must lie in 0..{queries - 1}, below the queries")
        self.settings, self.vocabulary, self.queries = settings, vocabulary, queries
        self.encoder = TextEncoder(settings.width, settings.layers, length, tokens)
        self.project = nn.Sequential(nn.Linear(settings.width, width), nn.ReLU(), nn.Linear(width, width))
        self.context = nn.Parameter(torch.randn(settings.context, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        self._rows: Int64[Tensor, "K3 L"] | None = None

    def loss(self, queries: Float[Tensor, "B Q D"], batch: Batch) -> Float[Tensor, ""]:
        """How far the queries of each picture are from the texts of its truth, weighted. Raises UserError without tokens."""
        if batch.truth is None:
            raise ValueError("texts are made of the truth, and this batch has none")
        truth = [
            tasks.targets(segments, self.vocabulary, task)
            for segments, task in zip(batch.truth, batch.tasks, strict=True)
        ]
        rows = self.rows()[self.chosen(truth, batch.tasks)].to(queries.device)
        return self.settings.weight * contrastive(queries, self(rows), self.log_scale)

    def forward(self, rows: Int64[Tensor, "B P L"]) -> Float[Tensor, "B Q D"]:
        """`rows`: tokens of the texts of each picture; its queries' are these and the learned ones."""
        texts, places = rows.flatten(0, 1).unique(dim=0, return_inverse=True)
        # Each of them once, and up to the end of the longest.
        length = int(texts.argmax(1).max()) + 1
        encoded = self.project(self.encoder(texts[:, :length]))[places].unflatten(0, rows.shape[:2])
        return torch.cat([encoded, self.context.expand(len(rows), -1, -1)], 1)

    def chosen(self, truth: Sequence[Segments], wanted: Sequence[str]) -> Int64[Tensor, "B P"]:
        """Which of `rows` the texts of each picture are: a name for every segment, by class, and the task's for the rest."""
        count = self.queries - self.settings.context
        chosen = torch.tensor([[len(self.vocabulary) + TASKS.index(task)] * count for task in wanted])
        for own, segments in zip(chosen, truth, strict=True):
            classes = segments.classes.cpu().sort().values[:count]
            own[: len(classes)] = classes
        return chosen

    def rows(self) -> Int64[Tensor, "K3 L"]:
        """The tokens of all texts that there can be: one a name, then one a task."""
        if self._rows is None:
            pairs = byte_pairs(self.settings.tokens)
            articles = {task: "an" if task == "instance" else "a" for task in TASKS}
            texts = [f"a photo with a {name}" for name in self.vocabulary.names]
            texts += [f"{articles[task]} {task} photo" for task in TASKS]
            self._rows = torch.tensor([pairs.row(text, len(self.encoder.positions)) for text in texts])
        return self._rows


def byte_pairs(file: str | None) -> BytePairs:
    """CLIP's tokens, of `file` or of the installed extra. Raises UserError where there is none, or where it is another's."""
    if file is not None:
        path = Path(file)
        remedy = "proposer.texts.tokens names it"
    else:
        package = importlib.util.find_spec("open_clip")
        places = () if package is None else cast("Iterable[str]", package.submodule_search_locations or ())
        path = next((Path(place) / TOKEN_FILE for place in places), Path(TOKEN_FILE))
        remedy = "install the extra that has it: pip install 'maskfirst[text]'"
    if not path.is_file():
        raise UserError(
            f"OneFormer is trained with texts, whose token file {path} is not there; {remedy}; or take proposer.texts out "
            "of the recipe"
        )
    return BytePairs.read(path, {f"The task is {task}": numbers for task, numbers in TASK_TOKENS.items()})
