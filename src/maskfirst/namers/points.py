"""Points of masks: the one pixel by which a namer of points names a mask."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SEED = 0
"""Of random points, which are the same at every call."""


def peaks(masks: Float[Tensor, "Q h w"]) -> Int64[Tensor, "Q 2"]:
    """(row, column) of the largest logit of each mask, the first row by row where several are equal."""
    places = masks.flatten(1).argmax(1)
    return torch.stack([places // masks.shape[2], places % masks.shape[2]], 1)


def centers(masks: Float[Tensor, "Q h w"], inside: Bool[Tensor, "Q h w"]) -> Int64[Tensor, "Q 2"]:
    """(row, column) of the pixel of each mask that is farthest from any outside, the map's border being outside, too.

    Masks with nothing inside have their peak.
    """
    found = peaks(masks)
    for index, mask in enumerate(inside.cpu().numpy()):
        if mask.any():
            depth = np.asarray(distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
            found[index] = torch.tensor(np.unravel_index(depth.argmax(), mask.shape))
    return found


def random(masks: Float[Tensor, "Q h w"], inside: Bool[Tensor, "Q h w"]) -> Int64[Tensor, "Q 2"]:
    """(row, column) of any pixel of each mask, the same at every call. Masks with nothing inside have their peak."""
    generator = torch.Generator().manual_seed(SEED)
    chances = torch.rand(len(masks), generator=generator).to(masks.device)
    counts = inside.flatten(1).sum(1)
    # The pixel inside before which that many lie.
    before = (chances * counts).long()[:, None]
    places = ((inside.flatten(1).cumsum(1) > before) & inside.flatten(1)).int().argmax(1)
    chosen = torch.stack([places // masks.shape[2], places % masks.shape[2]], 1)
    return torch.where(counts[:, None] > 0, chosen, peaks(masks))
