"""Losses of whole masks: focal (Lin et al., 2017) and dice (Milletari et al., 2016), without keeping anything enlarged."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskfirst.frames import Size, resize


class _MaskLosses(torch.autograd.Function):
    """Focal and dice of masks enlarged to the truth, some masks at a time so that they stay in the cache.

    Nothing of the enlarged masks is kept: the backward pass makes them again, and its formulas are written out. With t
    the truth, z = (2t - 1) x and p = sigmoid(z), the probability of what is right: focal = -alpha_t (1 - p)^gamma log p.
    Written with products, as selecting by a boolean mask takes 20 times as long on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "M h w"],
        truth: Bool[Tensor, "M H W"],
        through: Size | None,
        alpha: float,
        gamma: float,
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        focal, sums = [], []
        for some in _chunks(truth):
            inside, side, right, wrong = _split(logits[some], truth[some], through)
            each = wrong.pow(gamma).mul_((right + TINY).log_()).mul_(inside * (1 - 2 * alpha) - (1 - alpha))
            focal.append(each.flatten(1).mean(1))
            true = inside.flatten(1).sum(1)
            hit = inside.mul_(right).flatten(1).sum(1)
            # sigmoid(x) is p inside and 1 - p outside of the truth.
            found = side.mul_(right).flatten(1).sum(1) + (truth[0].numel() - true)
            sums.append(torch.stack([hit, found + true]))
        shared, total = torch.cat(sums, 1)
        ctx.save_for_backward(logits, truth, shared, total)
        ctx.settings = (through, alpha, gamma)
        return torch.cat(focal), 1 - (2 * shared + 1) / (total + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        focal, dice = gradients
        logits, truth, shared, total = ctx.saved_tensors
        through, alpha, gamma = ctx.settings
        # The slope of dice with respect to sigmoid(x), outside of the truth, and what is added inside.
        outside = (dice * (2 * shared + 1) / (total + 1) ** 2)[:, None, None]
        added = (-2 * dice / (total + 1))[:, None, None]
        focal = (focal / truth[0].numel())[:, None, None]
        tall = _interpolation(logits.shape[-2], truth.shape[-2], None if through is None else through[0], logits)
        wide = _interpolation(logits.shape[-1], truth.shape[-1], None if through is None else through[1], logits)
        result = []
        for some in _chunks(truth):
            inside, side, right, wrong = _split(logits[some], truth[some], through)
            slope = (right + TINY).log_().mul_(right).mul_(-gamma).add_(wrong).mul_(wrong.pow(gamma))
            slope.mul_(inside * (1 - 2 * alpha) - (1 - alpha)).mul_(side).mul_(focal[some])
            slope.add_(right.mul_(wrong).mul_(inside.mul_(added[some]).add_(outside[some])))
            result.append(tall.T @ slope @ wide)
        return torch.cat(result), None, None, None, None


TINY = 1e-38
"""Keeps the logarithm of a probability that underflowed at 87, float32's largest."""
_CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Pixels of masks worked on at a time: what stays in the caches, or fills a GPU."""


def _chunks(truth: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK.get(truth.device.type, 2**20) // max(1, truth[0].numel()))
    return (slice(first, first + step) for first in range(0, len(truth), step))


def _split(logits: Tensor, truth: Tensor, through: Size | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of enlarged masks: 1 inside of the truth and 0 outside; 1 and -1; the probability of what is right; of what is wrong."""
    masks = logits if through is None else resize(logits, through)
    masks = resize(masks, (truth.shape[-2], truth.shape[-1]))
    inside = truth.to(masks.dtype)
    side = inside * 2 - 1
    right = (masks * side).sigmoid_()
    return inside, side, right, 1 - right


def _interpolation(source: int, goal: int, through: int | None, like: Tensor) -> Float[Tensor, "goal source"]:
    """The matrix by which `resize` enlarges one axis; its transpose carries gradients back."""
    matrix = torch.eye(source, dtype=like.dtype, device=like.device)
    for length in (through, goal):
        if length is not None:
            matrix = resize(matrix[None], (length, source))[0]
    return matrix


def mask_losses(
    logits: Float[Tensor, "M h w"],
    truth: Bool[Tensor, "M H W"],
    through: Size | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Focal loss (Lin et al., 2017; averaged over pixels) and dice loss (Milletari et al., 2016) of every mask.

    The logits are enlarged to the truth's size, by way of the size `through` where given.
    """
    return _MaskLosses.apply(logits.float(), truth, through, alpha, gamma)
