"""Criterion `set`: points are what whole masks say, matching is the cheapest, and odd truth or numbers do no harm."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maskfirst.criteria import points
from maskfirst.criteria.matched import UNKNOWN, Matched, hungarian, share_labelled
from maskfirst.errors import UserError
from maskfirst.types import Names, Proposals, Segments, Vocabulary

VOCABULARY = Vocabulary(("a", "b", "c"), frozenset({0}), ((0, 0, 0),) * 3, (0, 1, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centres(height: int, width: int) -> Tensor:
    """The points in the middle of every pixel, row by row."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)[None]


def truth(classes: list[int], size: tuple[int, int] = (24, 32), seed: int = 0) -> Segments:
    """A rectangle a class."""
    masks = torch.zeros(len(classes), *size, dtype=torch.bool)
    corners = torch.randint(0, 12, (len(classes), 2), generator=generator(seed)).tolist()
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y : y + 10, x : x + 14] = True
    return Segments(
        masks, torch.tensor(classes, dtype=torch.int64), torch.ones(len(classes)), masks.new_zeros(len(classes))
    )


def guess(queries: int = 5, batch: int = 2, seed: int = 1) -> tuple[Proposals, Names]:
    masks = torch.randn(batch, queries, 6, 8, generator=generator(seed)).mul_(3).requires_grad_()
    return Proposals(masks), Names(torch.randn(batch, queries, 4, generator=generator(seed + 1)).requires_grad_())


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def test_points_in_the_middle_of_pixels_are_the_pixels() -> None:
    maps = torch.randn(2, 1, 6, 8, generator=generator())
    torch.testing.assert_close(points.sample(maps, centres(6, 8).expand(2, -1, -1)).flatten(), maps.flatten())
    masks = torch.rand(3, 6, 8, generator=generator()) > 0.5
    which = torch.tensor([2, 0, 2])
    assert torch.equal(points.sample_truth(masks, which, centres(6, 8)), masks[which].float().flatten(1))


def test_truth_is_sampled_as_maps_are() -> None:
    masks = torch.rand(4, 13, 9, generator=generator()) > 0.5
    places = torch.rand(4, 500, 2, generator=generator())
    places[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.03, 0.97]])
    dense = points.sample(masks.float()[:, None], places)[:, 0]
    torch.testing.assert_close(points.sample_truth(masks, torch.arange(4), places), dense, rtol=0, atol=1e-5)


def test_uncertain_points_lie_where_logits_are_near_zero() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)
    found = points.uncertain(ramp, 1000, 3.0, 0.75, points.uniform)
    assert found.shape == (1, 1000, 2)
    distance = (found[0, :, 0] - 0.5).abs()
    assert (distance[:750] < 0.14).float().mean() > 0.95, "the few others lie at the border, beyond which masks are 0"
    assert 0.2 < distance[750:].mean() < 0.3


def test_proposals_where_labels_are_withheld_teach_no_name() -> None:
    """The left half has a label, the right half none; the proposals lie left, left, on both and right."""
    one = Segments(torch.zeros(1, 8, 8, dtype=torch.bool), torch.tensor([2]), torch.ones(1), torch.zeros(1).bool())
    one.masks[0, :, :4] = True
    masks = torch.full((1, 4, 4, 4), -9.0)
    masks[0, :2, :, :2] = masks[0, 2, :, 1:3] = masks[0, 3, :, 2:] = 9.0
    assert share_labelled(masks[0], one).tolist() == [1.0, 1.0, 0.5, 0.0]
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    for labelled, wanted in ((0.0, [2, 3, 3, 3]), (0.5, [2, 3, 3, UNKNOWN]), (1.0, [2, 3, UNKNOWN, UNKNOWN])):
        criterion = Matched(VOCABULARY, points=16, labelled=labelled)
        criterion.assign = lambda costs: (torch.tensor([0]), torch.tensor([0]))
        assert criterion.named(masks, [(torch.tensor([0]), torch.tensor([0]))], [one])[0].tolist() == wanted
        (slope,) = torch.autograd.grad(criterion(Proposals(masks), Names(logits), [one])["ce"], logits)
        assert slope[0].any(1).tolist() == [each != UNKNOWN for each in wanted]
    nothing = one[:0]
    losses = Matched(VOCABULARY, points=16, labelled=0.5)(Proposals(masks), Names(logits), [nothing])
    assert losses["ce"] == 0
    with pytest.raises(UserError, match=r"labelled: 1\.5 must lie in 0..1"):
        Matched(VOCABULARY, labelled=1.5)


def test_costs_at_all_pixels_are_their_definitions() -> None:
    criterion = Matched(VOCABULARY, points=24 * 32)
    criterion.draw = lambda masks, count, device: centres(24, 32)
    one = truth([0, 2, 0])
    proposals, names = guess(batch=1)
    masks, logits = proposals.masks[0].detach(), names.logits[0].detach()
    wide = points.sample(masks[None], centres(24, 32))[0]
    inside = one.masks.float().flatten(1)
    for query, segment in itertools.product(range(5), range(3)):
        x, t = wide[query], inside[segment]
        dice = 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
        expected = -2 * logits[query].softmax(0)[one.classes[segment]]
        expected = expected + 5 * F.binary_cross_entropy_with_logits(x, t) + 5 * dice
        torch.testing.assert_close(criterion.costs(masks, logits, one)[query, segment], expected, rtol=1e-4, atol=1e-4)


def test_the_assignment_is_the_cheapest() -> None:
    costs = torch.rand(5, 3, generator=generator())
    queries, segments = hungarian(costs)
    best = min(
        sum(costs[query, segment].item() for segment, query in enumerate(order))
        for order in itertools.permutations(range(5), 3)
    )
    assert costs[queries, segments].sum().item() == pytest.approx(best)


def test_losses_of_perfect_masks_and_names_vanish_in_any_order() -> None:
    torch.manual_seed(0)
    one = truth([0, 0, 2])
    order = torch.tensor([3, 0, 2])
    masks = torch.full((1, 4, 24, 32), -30.0)
    logits = torch.zeros(1, 4, 4)
    logits[..., 3] = 30.0
    masks[0, order] = torch.where(one.masks, 30.0, -30.0)
    logits[0, order] = F.one_hot(one.classes, 4) * 30.0
    losses = Matched(VOCABULARY)(Proposals(masks), Names(logits), [one])
    assert losses["ce"] < 1e-6
    wrong = Matched(VOCABULARY)(Proposals(-masks), Names(logits), [one])
    assert total(losses) < 0.05 * total(wrong), "what is left are points on borders, where bilinear truth is a fraction"


def test_losses_are_divided_by_the_segments_of_the_batch() -> None:
    torch.manual_seed(0)
    proposals, names = guess(batch=1)
    twice = (Proposals(torch.cat([proposals.masks] * 2)), Names(torch.cat([names.logits] * 2)))
    criterion, one = Matched(VOCABULARY, points=20000), truth([0, 1])
    losses, doubled = criterion(proposals, names, [one]), criterion(*twice, [one, one])
    for name in losses:
        torch.testing.assert_close(doubled[name], losses[name], rtol=0.02, atol=0.0)
    half = criterion(Proposals(proposals.masks, weight=0.5), names, [one])
    torch.testing.assert_close(half["ce"], losses["ce"] / 2)


def test_names_of_leftover_proposals_count_a_tenth() -> None:
    proposals, names = guess(batch=1)
    criterion = Matched(VOCABULARY, points=100)
    criterion.assign = lambda costs: (torch.tensor([1, 4]), torch.tensor([1, 0]))
    losses = criterion(proposals, names, [truth([2, 0])])
    named = torch.tensor([3, 0, 3, 3, 2])
    each = F.cross_entropy(names.logits[0], named, reduction="none")
    weights = torch.tensor([0.1, 1.0, 0.1, 0.1, 1.0])
    torch.testing.assert_close(losses["ce"], 2 * (each * weights).sum() / weights.sum())


@pytest.mark.parametrize("classes", [[[], []], [[1], []], [[0, 0, 1, 2, 2, 1, 0], [1]]], ids=["none", "some", "more"])
def test_any_number_of_segments_has_a_finite_loss_with_gradients(classes: list[list[int]]) -> None:
    proposals, names = guess()
    losses = Matched(VOCABULARY, points=50)(proposals, names, [truth(each) for each in classes])
    assert all(value.isfinite() for value in losses.values())
    assert (losses["mask"] > 0) == any(classes)
    total(losses).backward()
    for leaf in (proposals.masks, names.logits):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_proposal_is_matched_last(bad: float) -> None:
    proposals, names = guess(batch=1)
    one = truth([0, 1])
    masks = proposals.masks.detach().clone()
    masks[0, 2] = bad
    criterion = Matched(VOCABULARY, points=50)
    ((queries, _),) = criterion.match(masks, names.logits.detach(), [one])
    assert 2 not in queries.tolist()
    masks[:] = bad
    ((queries, _),) = criterion.match(masks, names.logits.detach(), [one])
    assert len(queries) == 2


def test_losses_are_float32_under_autocast() -> None:
    proposals, names = guess()
    criterion, given = Matched(VOCABULARY, points=200), [truth([0, 1]), truth([2])]
    torch.manual_seed(0)
    exact = criterion(proposals, names, given)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        same = criterion(proposals, names, given)
    for name, value in exact.items():
        assert same[name].dtype == torch.float32
        assert torch.equal(same[name], value)


def test_masks_are_neither_enlarged_nor_copied() -> None:
    """The largest tensor made is of points, whatever the size of the truth: 8 masks of 512 x 512 px are 2 MiB of bits."""
    one = truth([0] * 8, (512, 512))
    proposals, names = guess(10, 1)
    criterion = Matched(VOCABULARY, points=100, oversample=2.0)
    with Largest() as seen:
        total(criterion(proposals, names, [one])).backward()
    assert seen.values <= 8 * 100 * 2 * 4


class Largest(TorchDispatchMode):
    """Watches how many values the largest new tensor has; views are not new."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.values = max(self.values, made.numel())
        return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 0}, "points: 0 must be at least 1"),
        ({"oversample": 0.5}, "oversample: 0.5 must be at least 1"),
        ({"importance": 1.5}, "importance: 1.5 must lie in 0..1"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Matched(VOCABULARY, **settings)


def test_competing_masks_are_refused() -> None:
    proposals, names = guess()
    with pytest.raises(UserError, match="needs masks that stand alone"):
        Matched(VOCABULARY)(Proposals(proposals.masks, competing=True), names, [truth([0]), truth([1])])
