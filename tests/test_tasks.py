"""Tasks: the read-out by strips is the read-out in one piece; targets merge and filter; the oracles are perfect."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskfirst import rows, tasks
from maskfirst.build import Experiment
from maskfirst.criteria.fixed import Fixed
from maskfirst.errors import UserError
from maskfirst.frames import Fit, Frame, resize
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.dense import one_name_each
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.recipe import Recipe
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
    found = segmenter.segment(image, truth=Segments.from_label_map(labels)).label_map()
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


def chessboard(probabilities: list[tuple[int, float]], masks: Tensor) -> tuple[Proposals, Names]:
    """Proposals named with a probability, the rest of it on no object; masks of 1 and 0 as logits of 9 and -9."""
    joint = torch.zeros(1, len(probabilities), 6)
    for query, (name, probability) in enumerate(probabilities):
        joint[0, query, name], joint[0, query, 5] = probability, 1 - probability
    return Proposals((masks[None] * 2.0 - 1) * 9), Names(joint.log())


def whole(size: tuple[int, int]) -> Frame:
    return Frame(size, size, size)


def test_panoptic_merges_stuff_and_drops_what_is_covered_or_unsure() -> None:
    columns = torch.zeros(7, 4, 12)
    for query, (start, stop) in enumerate([(0, 2), (2, 4), (4, 6), (6, 8), (3, 6), (8, 10), (10, 12)]):
        columns[query, :, start:stop] = 1
    proposals, names = chessboard([(0, 0.9), (3, 0.95), (0, 0.99), (3, 0.85), (4, 0.9), (5, 1.0), (4, 0.5)], columns)
    found = tasks.panoptic(proposals, names, 0, VOCABULARY, whole((4, 12)))
    assert found.ids[0].tolist() == [0, 0, 1, 1, 0, 0, 2, 2, VOID, VOID, VOID, VOID]
    assert found.classes.tolist() == [0, 3, 3], "one segment of stuff, and two things of one class"
    torch.testing.assert_close(found.scores, torch.tensor([0.99, 0.95, 0.85]))
    lenient = tasks.panoptic(proposals, names, 0, VOCABULARY, whole((4, 12)), tasks.Thresholds(0.4, 0.0))
    assert lenient.classes.tolist() == [0, 3, 3, 4]
    assert lenient.ids[0, 10] == 3
    nothing = tasks.panoptic(proposals, names, 0, VOCABULARY, whole((4, 12)), tasks.Thresholds(1.0))
    assert len(nothing) == 0
    assert (nothing.ids == VOID).all()


def test_panoptic_segments_never_overlap_and_stuff_occurs_once() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        proposals = Proposals(torch.randn(1, 12, 5, 6, generator=generator) * 4)
        names = Names(torch.randn(1, 12, 6, generator=generator) * 4)
        frame = Frame((19, 23), (27, 31), (32, 32), flipped=seed % 2 == 1)
        found = tasks.panoptic(proposals, names, 0, VOCABULARY, frame, tasks.Thresholds(0.3, 0.3), 5)
        assert torch.equal(found.ids.unique()[found.ids.unique() != VOID].long(), torch.arange(len(found)))
        stuff = [index for index in found.classes.tolist() if index not in VOCABULARY.things]
        assert len(stuff) == len(set(stuff))
        assert (found.segments.masks.sum(0) <= 1).all()


def test_instances_may_overlap_and_share_a_mask() -> None:
    masks = torch.zeros(3, 4, 6)
    masks[0, :, :4], masks[1, :, 2:] = 1, 1
    proposals, _ = chessboard([(0, 1.0)] * 3, masks)
    joint = torch.tensor([[0.0, 0, 0.1, 0.6, 0.2, 0.1], [0, 0, 0.0, 0, 0.9, 0.1], [0.8, 0, 0, 0.05, 0, 0.15]])
    found = tasks.instance(proposals, Names((joint[None] + 1e-9).log()), 0, VOCABULARY, whole((4, 6)))
    assert found.classes[:3].tolist() == [4, 3, 4]
    assert torch.equal(found.masks[:3], masks[[1, 0, 0]] > 0)
    sure = torch.tensor(9.0).sigmoid()
    torch.testing.assert_close(found.scores[:3], torch.tensor([0.9, 0.6, 0.2]) * sure, rtol=1e-5, atol=1e-6)
    assert found.scores[3:].max() < 1e-6, "an empty mask is worth nothing"
    few = tasks.instance(
        proposals, Names((joint[None] + 1e-9).log()), 0, VOCABULARY, whole((4, 6)), tasks.Thresholds(instances=2)
    )
    assert few.classes.tolist() == [4], "the second of the likeliest two is no thing"


@pytest.mark.parametrize("task", [tasks.panoptic, tasks.instance])
def test_memory_is_bounded_by_a_strip(task: Callable[..., object]) -> None:
    """Of 40 masks of 512 x 1024 px, 80 MiB as numbers, no more than a strip is there at a time."""
    generator = torch.Generator().manual_seed(0)
    proposals = Proposals(torch.randn(1, 40, 32, 64, generator=generator) * 4)
    names = Names(torch.randn(1, 40, 6, generator=generator) * 4)
    with LargestFloats() as seen:
        task(proposals, names, 0, VOCABULARY, whole((512, 1024)), tasks.Thresholds(0.2), 16)
    assert 0 < seen.values <= 40 * 16 * 1024


class LargestFloats(TorchDispatchMode):
    """Watches how many values the largest tensor of numbers has."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.is_floating_point():
            self.values = max(self.values, made.numel())
        return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"object": 1.5}, "object: 1.5 must lie in 0..1"),
        ({"overlap": -0.1}, "overlap: -0.1 must lie in 0..1"),
        ({"instances": 0}, "instances: 0 must be at least 1"),
    ],
)
def test_thresholds_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.Thresholds(**settings)


def test_recipes_reach_the_thresholds() -> None:
    tree = {
        "vocabulary": ["a", "b"],
        "proposer": {"kind": "oracle"},
        "namer": {"kind": "given"},
        "criterion": {"kind": "set"},
    }
    tree["inference"] = {"thresholds": {"object": 0.3, "instances": 7}}
    segmenter = Experiment(Recipe(tree, "mine.yaml")).segmenter()
    assert segmenter.inference.thresholds == tasks.Thresholds(0.3, 0.8, 7)
    tree["inference"] = {"thresholds": {"object": 3.0}}
    with pytest.raises(UserError, match=r"mine\.yaml: inference\.thresholds: object: 3\.0 must lie in 0\.\.1"):
        Experiment(Recipe(tree, "mine.yaml")).segmenter()
    with pytest.raises(UserError, match=r"mine\.yaml: task: the instance task finds things, and none"):
        Experiment(Recipe(tree | {"task": "instance", "inference": {}}, "mine.yaml")).segmenter()
