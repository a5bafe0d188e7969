"""The algebra of the types: views and their inverse, label maps and back, layers of ids."""

import pytest
import torch

from maskfirst.types import VOID, Names, Sample, SegmentMap, Segments, Vocabulary, collate


def names(*shape: int) -> Names:
    return Names(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def test_compose_is_the_inverse_of_the_views() -> None:
    first = names(2, 5, 8)
    again = Names.compose(first.given_object, first.void)
    torch.testing.assert_close(again.joint, first.joint)
    torch.testing.assert_close(again.void, first.void)
    torch.testing.assert_close(again.given_object, first.given_object)
    torch.testing.assert_close(again.logits, first.logits - first.logits.logsumexp(-1, keepdim=True))


def test_the_views_share_out_one() -> None:
    view = names(2, 5, 8)
    torch.testing.assert_close(view.joint.sum(-1) + view.void, torch.ones(2, 5))
    torch.testing.assert_close(view.given_object * (1 - view.void)[..., None], view.joint)


def test_label_map_and_back() -> None:
    labels = torch.tensor([[0, 0, 3], [VOID, 3, 5]])
    segments = Segments.from_label_map(labels)
    assert segments.classes.tolist() == [0, 3, 5]
    assert torch.equal(segments.label_map(), labels)
    assert len(segments[segments.classes > 0]) == 2
    assert len(Segments.from_label_map(torch.full((4, 4), VOID))) == 0


def sample(ids: torch.Tensor, size: tuple[int, int] = (2, 3), key: str = "a") -> Sample:
    count = int(ids.max()) + 1
    return Sample(
        torch.zeros(3, *size, dtype=torch.uint8),
        ids.int(),
        torch.arange(count),
        torch.zeros(count, dtype=torch.bool),
        key,
    )


def test_layers_let_segments_overlap_and_empty_ones_are_dropped() -> None:
    ids = torch.tensor([[[0, 0, VOID], [2, VOID, VOID]], [[3, VOID, VOID], [VOID, VOID, VOID]]])
    truth = sample(ids).truth
    assert truth.classes.tolist() == [0, 2, 3]
    assert truth.masks[0, 0, 0]
    assert truth.masks[2, 0, 0]


def test_collate_wants_one_size() -> None:
    ids = torch.zeros(1, 2, 3)
    batch = collate([sample(ids), sample(ids, key="b")], "semantic")
    assert batch.pixels.shape == (2, 3, 2, 3)
    assert batch.keys == ("a", "b")
    with pytest.raises(ValueError, match="must have one size"):
        collate([sample(ids), sample(torch.zeros(1, 4, 3), (4, 3))], "semantic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a", "a")}, "names occur twice in the vocabulary: a"),
        ({"names": ()}, "at least one name"),
        ({"ids": (1,)}, "2 names, 2 colors and 1 ids"),
        ({"things": frozenset({7})}, "must be indices of the 2 names"),
    ],
)
def test_a_vocabulary_checks_itself(changes: dict, message: str) -> None:
    good = {"names": ("a", "b"), "things": frozenset({1}), "colors": ((0, 0, 0), (1, 1, 1)), "ids": (0, 1)}
    assert len(Vocabulary(**good)) == 2
    with pytest.raises(ValueError, match=message):
        Vocabulary(**(good | changes))


def test_a_map_of_segments_opens_into_the_segments_it_was_made_of() -> None:
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, :2], masks[1, 1:3], masks[2, 3, 3:] = True, True, True
    segments = Segments(
        masks, torch.tensor([4, 2, 2]), torch.tensor([0.5, 1.0, 0.25]), torch.tensor([False, True, False])
    )
    found = SegmentMap.of(segments)
    assert found.ids.tolist()[1:] == [[1] * 5, [1] * 5, [VOID] * 3 + [2] * 2]
    opened = found.segments
    assert opened.masks[0].sum() == 5  # the later segment has won the second row
    assert torch.equal(opened.masks[1:], masks[1:])
    assert torch.equal(SegmentMap.of(opened).ids, found.ids)
