"""Points: masks looked at in a few random places instead of everywhere.

Kirillov et al., "PointRend", 2020; as the loss of whole masks in Cheng et al., "Mask2Former", 2022.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

Draw = Callable[[int, int, torch.device], Float[Tensor, "M P 2"]]
"""P points for each of M masks: (x, y), each 0..1 of the canvas."""


def uniform(masks: int, points: int, device: torch.device) -> Float[Tensor, "M P 2"]:
    """Points everywhere alike, from torch's global random state."""
    return torch.rand(masks, points, 2, device=device)


def sample(logits: Float[Tensor, "M C h w"], points: Float[Tensor, "M P 2"]) -> Float[Tensor, "M C P"]:
    """The values of maps at points: bilinear with half-pixel centres, zeros outside."""
    return F.grid_sample(logits, points[:, None] * 2 - 1, align_corners=False)[:, :, 0]


def sample_truth(
    masks: Bool[Tensor, "N H W"], which: Int64[Tensor, " M"], points: Float[Tensor, "#M P 2"]
) -> Float[Tensor, "M P"]:
    """The same of the masks `which`, 0 outside and 1 inside, fractional at their borders; no mask is copied."""
    height, width = masks.shape[-2:]
    flat, start = masks.view(torch.uint8).flatten(), (which * (height * width))[:, None]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    found = points.new_zeros(len(which), points.shape[1])
    for row, tall in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, wide in ((left, 1 - right_share), (left + 1, right_share)):
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            found.addcmul_(flat.take(start + place), tall * wide * there)
    return found


def uncertain(
    logits: Float[Tensor, "M 1 h w"], points: int, oversample: float, importance: float, draw: Draw
) -> Float[Tensor, "M P 2"]:
    """`points` places for each mask: of `oversample` times as many the share `importance` where the logit is nearest to 0,
    the rest everywhere alike."""
    many = draw(len(logits), int(points * oversample), logits.device)
    count = int(importance * points)
    nearest = sample(logits, many)[:, 0].abs().topk(count, largest=False, sorted=False).indices
    chosen = many.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, draw(len(logits), points - count, logits.device)], 1)
