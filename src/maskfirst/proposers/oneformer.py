"""OneFormer: one model for all tasks, told by a token which of them it is to do.

Jain et al., "OneFormer: One Transformer to Rule Universal Image Segmentation", CVPR 2023.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.contracts import Backbone, Proposer
from maskfirst.ops.sine_positions import sine_positions
from maskfirst.proposers.mask2former import (
    LEVELS,
    DecoderLayer,
    Memory,
    PostNormLayer,
    check_maps,
    decode,
    guesses,
    mask_embedding,
)
from maskfirst.proposers.pixel_decoder import PixelDecoder
from maskfirst.proposers.texts import LENGTH, TASK_TOKENS, TextBranch, Texts
from maskfirst.types import TASKS, Batch, Proposals, Vocabulary

START = "start"
"""Where in `extras` the queries are as they were before any layer, for the loss of texts."""


class TaskToken(nn.Module):
    """One vector a task, from the numbers of the tokens that name it, as they are: up to 49,407, and so in float32 always."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(LENGTH, width)
        self.contract = nn.Linear(width, width)
        rows = torch.zeros(len(TASKS), LENGTH)
        for row, task in zip(rows, TASKS, strict=True):
            row[: len(TASK_TOKENS[task])] = torch.tensor(TASK_TOKENS[task], dtype=rows.dtype)
        self.rows: Float[Tensor, "T L"]
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, tasks: Sequence[str] | Int64[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """`tasks`: by their names, or by their places in TASKS."""
        with torch.autocast(self.rows.device.type, enabled=False):
            rows = self.rows[tasks if isinstance(tasks, Tensor) else self.places(tasks)].float()
            hidden = F.linear(rows, self.expand.weight.float(), self.expand.bias.float()).relu()
            return F.linear(hidden, self.contract.weight.float(), self.contract.bias.float())

    def places(self, tasks: Sequence[str]) -> list[int]:
        """Which of `rows` they are."""
        return [TASKS.index(task) for task in tasks]


class ClassLayer(PostNormLayer):
    """Looks at the other queries first and at the map then (DETR's)."""

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        positions: Float[Tensor, "Q D"],
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
    ) -> Float[Tensor, "B Q D"]:
        placed = queries + positions
        queries = self.norm1(queries + self.dropout(self.self_attention(placed, placed, queries)))
        queries = self.norm2(queries + self.dropout(self.cross_attention(queries + positions, keys, values)))
        return self.fed(queries)


class OneFormer(Proposer):
    """Queries that begin as the task's token and have looked once at the whole map, and then are decoded as Mask2Former's.

    The task is that of each picture in the batch, so one model answers all three. The last query stays the task's token.
    Arguments are as in Mask2Former, where all widths are one; `class_layers` look at the whole map; `dropout` is of those
    and of the pixel decoder. `texts`: what it is trained with besides; None: without them. They are not needed to answer.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "kind": "oneformer",
        "backbone": {
            "kind": "pyramid",
            "model": "swin_tiny_patch4_window7_224",
            "widths": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1],
            "heads": [1, 1, 2, 2],
            "window": 4,
        },
        "queries": 6,
        "width": 16,
        "heads": 2,
        "encoder_layers": 1,
        "encoder_feedforward": 16,
        "class_layers": 1,
        "decoder_layers": 3,
        "decoder_feedforward": 16,
    }

    reads_task = True

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: Vocabulary,
        queries: int = 150,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        encoder_feedforward: int = 1024,
        class_layers: int = 2,
        decoder_layers: int = 9,
        decoder_feedforward: int = 2048,
        points: int = 4,
        dropout: float = 0.1,
        texts: Texts | None = None,
    ) -> None:
        super().__init__()
        check_maps("oneformer", backbone)
        if queries < 2:
            raise ValueError(f"queries: {queries} must be at least 2, as the last is the task's token")
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(
            backbone.channels, width, width, heads, encoder_layers, encoder_feedforward, points, dropout
        )
        self.task = TaskToken(width)
        self.entrance = nn.Conv2d(width, width, 1)
        self.class_layers = nn.ModuleList(
            ClassLayer(width, heads, decoder_feedforward, dropout) for _ in range(class_layers)
        )
        self.class_norm = nn.LayerNorm(width)
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.positions = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, decoder_feedforward) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.mask_embed = mask_embedding(width, width)
        self.texts = None if texts is None else TextBranch(texts, vocabulary, queries, width)
        nn.init.kaiming_uniform_(self.entrance.weight, a=1)
        nn.init.zeros_(cast("Tensor", self.entrance.bias))
        self.width = width
        self.tasks = frozenset(TASKS)
        self.mean = backbone.mean
        self.multiple = backbone.multiple
        self.stride = backbone.strides[0]

    def forward(self, batch: Batch) -> Proposals:
        features, encoded = self.pixel_decoder(self.backbone(batch.pixels))
        queries = self.begin(features, batch.tasks if batch.task_numbers is None else batch.task_numbers)
        layers = cast("Iterable[DecoderLayer]", self.layers)
        memory = Memory.of(features, encoded, self.level_embed)
        every = batch.truth is not None
        stages = decode(queries, self.positions, memory, layers, self.norm, self.mask_embed, every)
        canvas = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        return replace(guesses(stages, canvas, self.stride), extras={START: queries})

    def begin(
        self, features: Float[Tensor, "B D h w"], tasks: Sequence[str] | Int64[Tensor, " B"]
    ) -> Float[Tensor, "B Q D"]:
        """The queries before the first layer."""
        token = self.norm(self.task(tasks))[:, None]
        height, width = features.shape[-2:]
        # What is read are the places, and the map only says where to look: the roles are swapped in the original, and all of
        # its weights have been trained so.
        values = sine_positions((height, width), features.shape[1], features.device).expand(features.shape[0], -1, -1)
        keys = values + self.entrance(features).flatten(2).mT
        positions = self.positions[:-1]
        queries = token.expand(-1, len(positions), -1)
        for layer in cast("Iterable[ClassLayer]", self.class_layers):
            queries = layer(queries, positions, keys, values)
        return torch.cat([self.class_norm(queries), token.to(queries.dtype)], 1)

    def extra_loss(self, proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        return {} if self.texts is None else {"contrastive": self.texts.loss(proposals.extras[START], batch)}
