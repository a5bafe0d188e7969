"""Contrastive: what belongs together among the pictures of a batch is to be more alike than what does not.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.nn import functional as F

SHARPEST = 100.0
"""What similarities are multiplied with at most."""


class _Gathered(torch.autograd.Function):
    """The rows of all processes in the order of their ranks; a gradient is what all of them have for the rows of this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.first, ctx.count = distributed.get_rank() * len(rows), len(rows)
        everything = rows.new_zeros(distributed.get_world_size() * len(rows), *rows.shape[1:])
        everything[ctx.first : ctx.first + ctx.count] = rows
        distributed.all_reduce(everything)
        return everything

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone()
        distributed.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.count]


def contrastive(
    queries: Float[Tensor, "B Q D"], texts: Float[Tensor, "B Q D"], log_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Cross-entropy, both ways, of finding the texts of a picture's queries among all texts of the batch.

    All queries of a picture are one vector. The batch is that of all processes, whose shares must be of one size.
    `log_scale`: the logarithm of what cosines are multiplied with.
    """
    with torch.autocast(queries.device.type, enabled=False):
        ours, theirs = (F.normalize(each.float().flatten(1)) for each in (queries, texts))
        scale = log_scale.float().exp().clamp(max=SHARPEST)
        first, everyone, everything = 0, ours, theirs
        if distributed.is_available() and distributed.is_initialized():
            first = distributed.get_rank() * len(ours)
            everyone, everything = _Gathered.apply(ours), _Gathered.apply(theirs)
        partners = torch.arange(first, first + len(ours), device=ours.device)
        return F.cross_entropy(scale * ours @ everything.T, partners) + F.cross_entropy(
            scale * theirs @ everyone.T, partners
        )
