"""Known: masks that are certain, with or without names, as proposals."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskfirst.types import Batch, Names, Proposals

CERTAIN = 1e4
"""Logit of a mask's inside, its negative outside, and of a name that cannot be less that of one that must be.

So large that outside is a probability of exactly 0 in float32, also beside a border that was enlarged.
"""


def propose(
    masks: Sequence[Bool[Tensor, "_N H W"]], names: Sequence[Float[Tensor, "_N K1"]] | None, batch: Batch
) -> Proposals:
    """The masks of each picture of `batch`, on its canvas, and the probabilities of their names and, last, of no object.

    Where pictures have fewer masks than others they are filled with empty ones named no object.
    """
    device = batch.pixels.device
    most = max(map(len, masks))
    logits = torch.full((len(batch), most, *batch.pixels.shape[-2:]), -CERTAIN, device=device)
    for row, some in zip(logits, masks, strict=True):
        row[: len(some)][some.to(device)] = CERTAIN
    if names is None:
        return Proposals(logits)
    told = torch.zeros(len(batch), most, names[0].shape[1], device=device)
    told[..., -1] = 1
    for row, some in zip(told, names, strict=True):
        row[: len(some)] = some.to(row)
    return Proposals(logits, names=Names(told.log().clamp(min=-CERTAIN)))
