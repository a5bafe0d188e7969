"""Tasks: the read-out by strips is the read-out in one piece; targets merge and filter; the oracles are perfect."""

import pytest
import torch
from torch import Tensor

from maskfirst import rows, tasks
from maskfirst.criteria.fixed import Fixed
from maskfirst.errors import UserError
from maskfirst.frames import Fit, Frame, resize
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.dense import one_name_each
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.types import VOID, Names, Proposals, Segments, Vocabulary

VOCABULARY = Vocabulary(tuple("abcde"), frozenset({3, 4}), ((0, 0, 0),) * 5, tuple(range(5)))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 3


def by_strips(scores: rows.Rows, strip: int) -> Tensor:
    return torch.cat([scores.fetch(y, min(y + strip, scores.height)) for y in range(0, scores.height, strip)], 1)


@pytest.mark.parametrize("strip", [1, 7, 64])
@pytest.mark.parametrize("size", [(33, 50), (90, 31), (20, 20)])
def test_enlarging_by_strips_is_resizing(size: tuple[int, int], strip: int) -> None:
    maps = random(4, 20, 25)
    torch.testing.assert_close(by_strips(rows.enlarge(rows.whole(maps), size), strip), resize(maps, size))


@pytest.mark.parametrize("resolution", [None, (40, 40)])
def test_read_out_is_the_sum_of_mask_times_name(resolution: tuple[int, int] | None) -> None:
    proposals, names = Proposals(random(2, 6, 5, 7), resolution=resolution), Names(random(2, 6, 4))
    canvas = (64, 48)
    masks = resize(proposals.masks, resolution or canvas).sigmoid()
    expected = resize(torch.einsum("bqk,bqhw->bkhw", names.joint, masks), canvas)
    for image in range(2):
        scores = tasks.read_out(proposals, names, image, canvas)
        torch.testing.assert_close(by_strips(scores, 11), expected[image])


def test_naming_before_enlarging_differs_little_and_only_by_the_order() -> None:
    proposals, names = Proposals(random(1, 6, 8, 8)), Names(random(1, 6, 4))
    scores = tasks.read_out(proposals, names, 0, (32, 32), "names_first")
    expected = resize(torch.einsum("qk,qhw->khw", names.joint[0], proposals.masks[0].sigmoid()), (32, 32))
    torch.testing.assert_close(by_strips(scores, 5), expected)


def test_competing_masks_that_arrive_named_are_the_scores() -> None:
    masks = random(1, 3, 4, 4)
    names = one_name_each(masks)
    torch.testing.assert_close(names.joint, torch.eye(3)[None])
    scores = tasks.read_out(Proposals(masks, competing=True, names=names), names, 0, (4, 4))
    torch.testing.assert_close(scores.fetch(0, 4), masks[0])
    renamed = Names(names.logits.flip(1))
    scores = tasks.read_out(Proposals(masks, competing=True, names=names), renamed, 0, (4, 4))
    torch.testing.assert_close(scores.fetch(0, 4), masks[0].softmax(0).flip(0))


def test_windows_are_averaged_where_they_overlap() -> None:
    view = Frame.fit((10, 16))
    frames = [frame for row in view.windows((8, 8), (4, 4)) for frame in row]
    maps = [random(2, 8, 8) + index for index in range(len(frames))]
    total, visits = torch.zeros(2, 10, 16), torch.zeros(10, 16)
    for frame, scores in zip(frames, maps, strict=True):
        y, x = frame.origin
        total[:, y : y + 8, x : x + 8] += scores
        visits[y : y + 8, x : x + 8] += 1
    scores = rows.stitch([(frame, rows.whole(scores)) for frame, scores in zip(frames, maps, strict=True)])
    torch.testing.assert_close(by_strips(scores, 3), total / visits)


def test_targets() -> None:
    masks = torch.zeros(4, 2, 4, dtype=torch.bool)
    for index in range(4):
        masks[index, :, index] = True
    truth = Segments(masks, torch.tensor([0, 3, 3, 4]), torch.ones(4), torch.tensor([False, False, False, True]))
    semantic = tasks.targets(truth, VOCABULARY, "semantic")
    assert semantic.classes.tolist() == [0, 3, 4]
    assert semantic.masks[1].sum() == 4
    assert tasks.targets(truth, VOCABULARY, "instance").classes.tolist() == [3, 3]
    assert tasks.targets(truth, VOCABULARY, "panoptic").classes.tolist() == [0, 3, 3]


def test_asking_for_another_task_is_a_sentence() -> None:
    with pytest.raises(UserError, match="cannot do the panoptic task, only: semantic"):
        tasks.check_task("panoptic", frozenset({"semantic"}), VOCABULARY)
    with pytest.raises(UserError, match="unknown task 'sematic'"):
        tasks.check_task("sematic", frozenset({"semantic"}), VOCABULARY)


@pytest.mark.parametrize(
    "inference", [Inference(), Inference(window=(16, 24), stride=(8, 16), scales=(1.0, 2.0), flip=True)]
)
@pytest.mark.parametrize("namer", ["given", "oracle"])
def test_the_oracle_is_perfect(inference: Inference, namer: str) -> None:
    labels = torch.full((37, 53), VOID)
    labels[5:30, 4:40] = 2
    labels[10:20, 10:35] = 4
    labels[30:, :] = 0
    segmenter = Segmenter(
        OracleProposer(VOCABULARY),
        Given() if namer == "given" else OracleNamer(VOCABULARY),
        Fixed(VOCABULARY),
        VOCABULARY,
        inference,
    ).eval()
    assert segmenter.uses_truth
    image = torch.zeros(3, 37, 53, dtype=torch.uint8)
    found = segmenter.predict(image, truth=Segments.from_label_map(labels)).label_map()
    known = labels != VOID
    assert torch.equal(found[known], labels[known])


def test_views_of_test_time_augmentation() -> None:
    views = Inference(fit=Fit(short=32), scales=(0.5, 1.0), flip=True).views((64, 64), 16, True)
    assert [(view.inner, view.flipped) for view in views] == [
        ((16, 16), False),
        ((16, 16), True),
        ((32, 32), False),
        ((32, 32), True),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (8, 8)}, "window without stride"),
        ({"stride": (8, 8)}, "stride without window"),
        ({"window": (8, 8), "stride": (9, 8)}, "pixels would be left out"),
    ],
)
def test_inference_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inference(**settings)
