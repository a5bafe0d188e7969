"""Counts that losses are divided by, averaged over the processes that train together."""

import torch
from torch import distributed


def mean_count(count: int, device: torch.device) -> float:
    """A count averaged over the processes that train together, at least 1."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return max(float(count), 1.0)
    total = torch.tensor(float(count), device=device)
    distributed.all_reduce(total)
    return max(total.item() / distributed.get_world_size(), 1.0)
