"""Points: pixels of a sample drawn so that all of its classes come equally often, however small they are.

"The Missing Point in Vision Transformers for Universal Image Segmentation", 2025 (ViT-P).
"""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from maskfirst.types import Sample


def draw(sample: Sample, count: int) -> tuple[Int64[Tensor, "P 2"], Int64[Tensor, " P"]]:
    """`count` points (y, x) px, and their classes: a class that has a pixel, any with the same chance, then one of its pixels.

    With replacement, from torch's global random state; on the CPU. A pixel counts once in every layer, crowds count as their
    class. A sample without a pixel that has a class gives no points at all.
    """
    present, ranks = np.unique(sample.classes.cpu().numpy(), return_inverse=True)
    # In 8 or 16 bits, which numpy sorts by their digits, in one pass each. VOID is looked up last.
    table = np.append(ranks, len(present)).astype(np.uint8 if len(present) < 256 else np.uint16)
    codes = table[sample.ids.cpu().numpy().ravel()]
    pixels = np.bincount(codes, minlength=len(present) + 1)[:-1]
    shown = np.flatnonzero(pixels)
    if not len(shown):
        return torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    order = np.argsort(codes, kind="stable")
    chosen = shown[torch.randint(len(shown), (count,)).numpy()]
    # In 64 bits, or large regions would have pixels that never come.
    within = (torch.rand(count, dtype=torch.float64).numpy() * pixels[chosen]).astype(np.int64)
    places = order[(np.cumsum(pixels) - pixels)[chosen] + within] % sample.ids[0].numel()
    points = np.stack(np.divmod(places, sample.ids.shape[-1]), 1)
    return torch.from_numpy(points), torch.from_numpy(present[chosen])
