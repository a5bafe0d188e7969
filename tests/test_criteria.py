"""Criteria: the mask losses against their definitions, and the fixed and pixel criteria's edge cases."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst.criteria.fixed import Fixed
from maskfirst.criteria.masks import mask_losses
from maskfirst.criteria.pixel import Pixel
from maskfirst.frames import resize
from maskfirst.proposers.dense import one_name_each
from maskfirst.types import VOID, Names, Proposals, Segments, Vocabulary

VOCABULARY = Vocabulary(("a", "b", "c"), frozenset(), ((0, 0, 0),) * 3, (0, 1, 2))


def by_definition(masks: Tensor, truth: Tensor, through: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    masks = masks if through is None else resize(masks, through)
    masks = resize(masks, (truth.shape[-2], truth.shape[-1]))
    inside, truth = masks.sigmoid(), truth.to(masks.dtype)
    right = inside * truth + (1 - inside) * (1 - truth)
    alpha = 0.25 * truth + 0.75 * (1 - truth)
    cross_entropy = F.binary_cross_entropy_with_logits(masks, truth, reduction="none")
    focal = (alpha * (1 - right) ** 2 * cross_entropy).flatten(1).mean(1)
    shared = (inside * truth).flatten(1).sum(1)
    dice = 1 - (2 * shared + 1) / (inside.flatten(1).sum(1) + truth.flatten(1).sum(1) + 1)
    return focal, dice


@pytest.mark.parametrize("through", [None, (21, 33)])
@pytest.mark.parametrize("size", [(40, 48), (6, 7), (400, 500)])
def test_mask_losses_and_their_gradients_are_the_definitions(
    size: tuple[int, int], through: tuple[int, int] | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randn(3, 6, 7, generator=generator, dtype=torch.float32).mul_(4).requires_grad_()
    truth = torch.rand(3, *size, generator=generator) > 0.7
    weights = torch.rand(2, 3, generator=generator)
    values, gradients = [], []
    for losses in (mask_losses(masks, truth, through), by_definition(masks, truth, through)):
        values.append(torch.stack(losses))
        gradients.append(torch.autograd.grad((values[-1] * weights).sum(), masks)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_mask_losses_stay_finite_where_probabilities_underflow() -> None:
    masks = torch.tensor([[[500.0, -500.0]]], requires_grad=True)
    focal, dice = mask_losses(masks, torch.tensor([[[False, True]]]))
    (focal.sum() + dice.sum()).backward()
    assert torch.isfinite(focal).all()
    assert focal.item() > 10
    assert masks.grad is not None
    assert masks.grad[0, 0, 0] > 0
    assert masks.grad[0, 0, 1] < 0


def proposals(**kwargs: object) -> tuple[Proposals, Names]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    return Proposals(masks, **kwargs), Names(torch.randn(2, 3, 4, generator=generator, requires_grad=True))


def truth(*maps: list[list[int]]) -> list[Segments]:
    return [
        Segments.from_label_map(torch.tensor(labels).repeat_interleave(4, 0).repeat_interleave(4, 1)) for labels in maps
    ]


def test_fixed_names_absent_classes_no_object() -> None:
    guess, names = proposals()
    losses = Fixed(VOCABULARY)(guess, names, truth([[0, 2]], [[VOID, 1]]))
    named = torch.tensor([[0, 3, 2], [3, 1, 3]])
    expected = F.cross_entropy(names.logits.transpose(1, 2), named, torch.tensor([1.0, 1.0, 1.0, 0.1]))
    torch.testing.assert_close(losses["ce"], expected)
    inside = torch.stack([s.masks[i] for s, i in zip(truth([[0, 2]], [[0, 2]], [[VOID, 1]]), (0, 1, 0), strict=True)])
    focal, dice = by_definition(guess.masks[[0, 0, 1], [0, 2, 1]], inside, None)
    torch.testing.assert_close(losses["mask"], 20 * focal.mean())
    torch.testing.assert_close(losses["dice"], dice.mean())


def test_fixed_with_nothing_labelled_is_finite_and_keeps_the_graph() -> None:
    guess, names = proposals()
    losses = Fixed(VOCABULARY)(guess, names, truth([[VOID]], [[VOID]]))
    assert losses["mask"] == 0
    assert losses["dice"] == 0
    assert torch.isfinite(losses["ce"])
    sum(losses.values(), torch.zeros(())).backward()
    assert guess.masks.grad is not None


def test_fixed_wants_one_query_a_class() -> None:
    guess = Proposals(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="one query a class: 5 queries, 3 classes"):
        Fixed(VOCABULARY)(guess, Names(torch.zeros(1, 5, 4)), truth([[0]]))


def test_pixel_is_cross_entropy_over_labelled_pixels() -> None:
    masks = torch.randn(1, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    guess = Proposals(masks, competing=True, names=one_name_each(masks))
    labels = torch.tensor([[0, VOID, 2]])
    losses = Pixel()(guess, one_name_each(masks), [Segments.from_label_map(labels)])
    torch.testing.assert_close(losses["ce"], F.cross_entropy(masks, labels[None], ignore_index=VOID))
    nothing = Pixel()(guess, one_name_each(masks), [Segments.from_label_map(torch.full((1, 3), VOID))])
    assert nothing["ce"] == 0
    with pytest.raises(ValueError, match="needs competing masks"):
        Pixel()(Proposals(masks), one_name_each(masks), [Segments.from_label_map(labels)])


def test_pixel_averages_over_all_pixels_where_asked_to() -> None:
    masks = torch.randn(2, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    guess = Proposals(masks, competing=True, names=one_name_each(masks), weight=0.4)
    labels = torch.tensor([[[0, VOID, 2]], [[VOID, VOID, 1]]])
    losses = Pixel("all")(guess, one_name_each(masks), [Segments.from_label_map(each) for each in labels])
    expected = 0.4 * F.cross_entropy(masks, labels, ignore_index=VOID, reduction="none").mean()
    torch.testing.assert_close(losses["ce"], expected)
    torch.testing.assert_close(
        Pixel()(guess, one_name_each(masks), [Segments.from_label_map(each) for each in labels])["ce"], expected * 2
    )


def test_fixed_refuses_several_segments_of_a_class() -> None:
    guess, names = proposals()
    one = truth([[0, 2]])[0]
    with pytest.raises(ValueError, match="knows one mask a class and a picture has several"):
        Fixed(VOCABULARY)(guess, names, [one, one[torch.tensor([0, 0])]])
