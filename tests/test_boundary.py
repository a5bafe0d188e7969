"""Boundary IoU against erosion as the paper's own code does it, and by hand."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import ndimage

from maskfirst.data.vocabulary import from_names
from maskfirst.metrics.boundary import BoundaryIoU, boundaries
from maskfirst.types import VOID

VOCABULARY = from_names(["sky", "road", "car", "unicorn"])


def blobs(seed: int, height: int = 90, width: int = 120) -> torch.Tensor:
    """Labels in patches, void among them."""
    noise = np.random.default_rng(seed).normal(size=(4, height, width))
    smooth = np.stack([ndimage.gaussian_filter(layer, 6) for layer in noise])
    return torch.from_numpy(smooth.argmax(0) - 1)


def eroded_away(mask: np.ndarray) -> np.ndarray:
    """The mask without its erosion, step by step with a square of 3 x 3 px, nothing being outside of the picture."""
    steps = max(1, round(0.02 * math.hypot(*mask.shape)))
    return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=steps, border_value=0)


@pytest.mark.parametrize("shape", [(90, 120), (31, 17), (300, 200), (3, 3)])
def test_borders_are_what_an_erosion_takes_off(shape):
    labels = blobs(1, *shape).numpy()
    marked = boundaries(labels)
    for index in np.unique(labels):
        assert np.array_equal(marked & (labels == index), eroded_away(labels == index))


def test_scores_are_those_of_masks_eroded_one_by_one():
    metric, common, either = BoundaryIoU(VOCABULARY), np.zeros(3), np.zeros(3)
    for seed in range(4):
        truth, guess = blobs(seed), blobs(seed).roll(2, 1)
        metric.update(truth, guess)
        seen = (truth != VOID).numpy()
        for index in range(3):
            one, two = (eroded_away((side == index).numpy() & seen) for side in (truth, guess))
            common[index] += (one & two).sum()
            either[index] += (one | two).sum()
    content = metric.scores().content
    assert list(content["BIoU"].values())[:3] == pytest.approx((common / either).tolist(), abs=1e-12)
    assert math.isnan(content["BIoU"]["unicorn"])
    assert content["mBIoU"] == pytest.approx(float(np.mean(common / either)))


def test_the_truth_itself_scores_1_whatever_is_said_of_void():
    truth = blobs(5)
    metric = BoundaryIoU(VOCABULARY)
    assert metric.update(truth, torch.where(truth == VOID, 2, truth)) == 1
    assert metric.scores().value == 1


def test_a_border_that_is_off_costs_more_than_the_area_says():
    truth = torch.zeros(100, 100, dtype=torch.int64)
    truth[:, 50:] = 1
    guess = truth.roll(3, 1)
    guess[:, :3] = 0
    # IoU is 0.94. Borders of 3 px agree along the sides of the picture and not where the classes meet.
    assert BoundaryIoU(VOCABULARY).update(truth, guess) == pytest.approx((582 / 1164 + 564 / 1146) / 2)


def test_parts_are_the_whole_and_nothing_is_nan():
    whole, part = BoundaryIoU(VOCABULARY), BoundaryIoU(VOCABULARY)
    for seed in range(4):
        (whole if seed % 2 else part).update(blobs(seed), blobs(seed + 1))
    whole.merge(pickle.loads(pickle.dumps(part)))
    alone = BoundaryIoU(VOCABULARY)
    for seed in range(4):
        alone.update(blobs(seed), blobs(seed + 1))
    assert whole.scores().means == alone.scores().means
    nothing = BoundaryIoU(VOCABULARY)
    assert nothing.update(torch.full((5, 5), VOID), torch.zeros(5, 5, dtype=torch.int64)) is None
    assert math.isnan(nothing.scores().value)
