"""The answers that graphs give are those of `tasks`, for several pictures at once."""

from dataclasses import replace

import pytest
import torch

from maskfirst import answers, tasks
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame
from maskfirst.proposers.dense import one_name_each
from maskfirst.tasks import Thresholds
from maskfirst.types import VOID, Names, Proposals

WORDS = from_names(["sky", "road", "car", "man"], things=["car", "man"])
CANVAS = (36, 52)
FRAME = Frame(CANVAS, CANVAS, CANVAS)


def found(seed: int, queries: int = 7, sure: float = 4.0) -> tuple[Proposals, Names]:
    """Blobs for two pictures, some of which nobody names."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, queries, 4, 5, generator=random)
    masks = 6 * torch.nn.functional.interpolate(coarse, size=(9, 13), mode="bilinear")
    return Proposals(masks), Names(sure * torch.randn(2, queries, 5, generator=random))


@pytest.mark.parametrize("order", ["masks_first", "names_first"])
@pytest.mark.parametrize("competing", [False, True])
@pytest.mark.parametrize("resolution", [None, (18, 26)])
def test_semantic(order: tasks.Order, competing: bool, resolution: tuple[int, int] | None) -> None:
    proposals, names = found(0)
    proposals = replace(proposals, competing=competing, resolution=resolution)
    (labels,) = answers.answer("semantic", proposals, names, CANVAS, WORDS, order, Thresholds())
    for index in range(2):
        right = tasks.semantic(tasks.read_out(proposals, names, index, CANVAS, order)).label_map()
        assert len(right.unique()) > 1
        assert (labels[index] == right).float().mean() > 0.999


def test_semantic_of_masks_that_arrive_named() -> None:
    masks = torch.randn(2, 4, 9, 13, generator=torch.Generator().manual_seed(1))
    names = one_name_each(masks)
    proposals = Proposals(masks, competing=True, names=names)
    (labels,) = answers.answer("semantic", proposals, names, CANVAS, WORDS, "masks_first", Thresholds())
    for index in range(2):
        right = tasks.semantic(tasks.read_out(proposals, names, index, CANVAS)).label_map()
        assert (labels[index] == right).float().mean() > 0.999


def test_a_pixel_in_no_mask_has_no_class() -> None:
    masks = torch.full((1, 2, 4, 4), -torch.inf)
    masks[0, 0, :, :2] = torch.inf
    names = Names(torch.tensor([[[50.0, 0, 0, 0, 0], [0, 50.0, 0, 0, 0]]]))
    (labels,) = answers.answer("semantic", Proposals(masks), names, (4, 4), WORDS, "masks_first", Thresholds())
    assert (labels[0, :, 2:] == VOID).all()
    assert (labels[0, :, :2] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_panoptic(seed: int) -> None:
    proposals, names = found(seed, queries=12)
    thresholds = Thresholds(object=0.5, overlap=0.3)
    segments, classes, scores = answers.answer("panoptic", proposals, names, CANVAS, WORDS, "masks_first", thresholds)
    for index in range(2):
        right = tasks.panoptic(proposals, names, index, WORDS, FRAME, thresholds)
        assert len(right) > 1
        own = (classes[index] != VOID).nonzero()[:, 0]
        assert classes[index][own].tolist() == right.classes.tolist()
        torch.testing.assert_close(scores[index][own], right.scores)
        numbers = torch.cat([own, torch.tensor([VOID])])[right.ids.long()]
        assert (segments[index] == numbers).float().mean() > 0.999


def test_stuff_of_one_class_is_one_segment_with_the_surest_score() -> None:
    masks = torch.full((1, 2, 4, 4), -9.0)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 9.0, 9.0
    names = Names(torch.tensor([[[0.0, 5, 0, 0, 0], [0.0, 9, 0, 0, 0]]]))
    given = ("panoptic", Proposals(masks), names, (4, 4), WORDS, "masks_first", Thresholds(overlap=0.1))
    segments, classes, scores = answers.answer(*given)
    assert (segments == 0).all()
    assert classes.tolist() == [[1, VOID]]
    assert scores[0, 0] == names.joint[0, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_instance(seed: int) -> None:
    proposals, names = found(seed)
    thresholds = Thresholds(instances=15, least=0.02)
    masks, classes, scores = answers.answer("instance", proposals, names, CANVAS, WORDS, "masks_first", thresholds)
    assert masks.shape == (2, 15, *CANVAS)
    for index in range(2):
        right = tasks.instance(proposals, names, index, WORDS, FRAME, thresholds)
        count = len(right)
        assert 0 < count < 15
        assert classes[index][:count].tolist() == right.classes.tolist()
        assert (classes[index][count:] == VOID).all()
        torch.testing.assert_close(scores[index][:count], right.scores)
        assert (masks[index][:count] == right.masks).float().mean() > 0.999
