"""Sine positions: a code for every place of a map, without parameters.

Carion et al., "End-to-End Object Detection with Transformers" (DETR), 2020, normalised to the map's size.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from maskfirst.frames import Size

BASE = 10000.0
EPSILON = 1e-6


def sine_positions(size: Size, width: int, device: torch.device) -> Float[Tensor, "N D"]:
    """Codes of all places of a map, row by row, in single precision: half of the `width` for y, then half for x."""
    if width % 4:
        raise ValueError(f"sine positions need a width that 4 divides, got {width}")
    height, breadth = size
    y, x = (_axis(length, width // 2, device) for length in size)
    rows = y[:, None].expand(-1, breadth, -1)
    columns = x[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def _axis(length: int, features: int, device: torch.device) -> Float[Tensor, "L F"]:
    """Sine and cosine in turn of 1..length, as shares of a turn, at falling frequencies."""
    turns = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + EPSILON) * (2 * math.pi)
    exponents = torch.arange(0, features, 2, dtype=torch.float32, device=device) / features
    angles = turns[:, None] / BASE**exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
