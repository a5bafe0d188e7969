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
SLOWEST, FASTEST = 0.5, 5.7
"""Turns of a place's code over a picture's side, of its slowest and its fastest sine."""


def code(places: Float[Tensor, "*N 2"], width: int) -> Float[Tensor, "*N D"]:
    """Sines and cosines of `places` (y, x) in [-1, 1], of amplitude 0.5; those that are near have codes that are alike."""
    if width % 4:
        raise ValueError(f"codes of places need a width that 4 divides, got {width}")
    turns = torch.linspace(math.log(SLOWEST), math.log(FASTEST), width // 4, device=places.device).exp()
    # A side has length 2.
    angles = [axis[..., None] * (math.pi * turns).to(places.dtype) for axis in places.unbind(-1)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], -1) / 2


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
