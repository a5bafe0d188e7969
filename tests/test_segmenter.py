"""Segmenter: every task from a picture to its segments, what cannot be asked for, and NaN traced to its layer."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from maskfirst.build import MENUS, Experiment
from maskfirst.contracts import Proposer
from maskfirst.criteria.matched import Matched
from maskfirst.errors import UserError
from maskfirst.frames import Fit, Frame, resize
from maskfirst.namers.class_head import ClassHead
from maskfirst.namers.given import Given
from maskfirst.namers.oracle import OracleNamer
from maskfirst.proposers.oracle import OracleProposer
from maskfirst.recipe import Recipe, import_class
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.tasks import Thresholds
from maskfirst.types import TASKS, VOID, Batch, Proposals, Sample, SegmentMap, Segments, Vocabulary, collate

VOCABULARY = Vocabulary(("sky", "road", "car", "person"), frozenset({2, 3}), ((0, 0, 0),) * 4, tuple(range(4)))
SIZE = (37, 53)
IMAGE = torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def scene(overlap: bool = False) -> Segments:
    """Sky, road, two cars, a person and a crowd of persons; where they may overlap the person stands before a car."""
    ids = torch.full(SIZE, VOID)
    ids[:15], ids[20:] = 0, 1
    ids[18:30, 3:17], ids[22:34, 20:41], ids[16:26, 44:50], ids[0:9, 0:5] = 2, 3, 4, 5
    classes = torch.tensor([0, 1, 2, 2, 3, 3])
    masks = ids[None] == torch.arange(6)[:, None, None]
    if overlap:
        masks[4, 24:30, 10:24] = True
    return Segments(masks, classes, torch.ones(6), torch.arange(6) == 5)


def oracle(namer: str = "given", inference: Inference | None = None) -> Segmenter:
    named = Given() if namer == "given" else OracleNamer(VOCABULARY)
    return Segmenter(
        OracleProposer(VOCABULARY), named, Matched(VOCABULARY), VOCABULARY, inference or Inference()
    ).eval()


class Blobs(Proposer):
    """Masks from one convolution of the picture; it notes the tasks it was asked for and how large the canvas was."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "test_segmenter:Blobs"}

    def __init__(self, able: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.query = nn.Parameter(torch.randn(6, 5))
        self.width, self.tasks, self.mean, self.multiple = 5, frozenset(able), (0.0, 0.0, 0.0), 16
        self.seen: list[tuple[tuple[str, ...], torch.Size]] = []

    def forward(self, batch: Batch) -> Proposals:
        self.seen.append((batch.tasks, batch.pixels.shape[-2:]))
        return Proposals(self.body(batch.pixels / 100 - 1), queries=self.query.expand(len(batch), -1, -1))


def blobs(inference: Inference | None = None, able: tuple[str, ...] = TASKS) -> tuple[Segmenter, Blobs]:
    torch.manual_seed(0)
    proposer = Blobs(able)
    model = Segmenter(proposer, ClassHead(VOCABULARY, 5), Matched(VOCABULARY), VOCABULARY, inference or Inference())
    return model.eval(), proposer


@pytest.mark.parametrize("namer", ["given", "oracle"])
@pytest.mark.parametrize("inference", [Inference(), Inference(multiple=32, strip=5), Inference(fit=Fit(long=106))])
def test_the_oracle_finds_every_segment(namer: str, inference: Inference) -> None:
    truth = scene()
    model = oracle(namer, inference)
    found = model.segment(IMAGE, "panoptic", truth=truth)
    wanted = truth[~truth.crowd]
    assert found.classes.tolist() == wanted.classes.tolist()
    assert not found.crowd.any()
    assert (found.masks.sum(0) <= 1).all()
    if inference.fit == Fit():
        assert torch.equal(found.masks, wanted.masks)
        assert torch.equal(SegmentMap.of(found).ids, SegmentMap.of(wanted).ids)
    else:
        assert ((found.masks & wanted.masks).sum((1, 2)) / (found.masks | wanted.masks).sum((1, 2)) > 0.9).all()


@pytest.mark.parametrize("namer", ["given", "oracle"])
def test_the_oracle_finds_things_that_overlap(namer: str) -> None:
    truth = scene(overlap=True)
    found = oracle(namer).segment(IMAGE, "instance", truth=truth)
    things = {(index.item(), mask.sum().item()) for index, mask in zip(truth.classes, truth.masks, strict=True)}
    sure = found[found.scores > 0.5]
    assert sorted(sure.classes.tolist()) == [2, 2, 3]
    assert {(index.item(), mask.sum().item()) for index, mask in zip(sure.classes, sure.masks, strict=True)} <= things
    assert (sure.masks.sum(0) == 2).any()
    torch.testing.assert_close(sure.scores, torch.ones(3))


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_without_segments(task: str) -> None:
    found = oracle().segment(IMAGE, task, truth=scene()[:0])
    assert found.masks.shape[1:] == SIZE
    assert not found.masks.any() or task == "semantic"
    assert not (found.scores > 0.5).any() or task == "semantic"


def test_the_network_is_told_the_task_and_shown_the_whole_picture() -> None:
    windows = Inference(window=(16, 16), stride=(8, 8))
    model, proposer = blobs(windows)
    assert set(model.segment(IMAGE, "semantic").classes.tolist()) <= {0, 1, 2, 3}
    assert len(proposer.seen) > 1
    assert {size for _, size in proposer.seen} == {(16, 16)}
    for task in ("instance", "panoptic"):
        proposer.seen.clear()
        assert model.segment(IMAGE, task).masks.shape[1:] == SIZE
        assert proposer.seen == [((task,), (48, 64))]


def test_instances_are_the_surest_first_and_things_only() -> None:
    model, _ = blobs()
    found = model.segment(IMAGE, "instance")
    assert len(found) == 12, "six proposals by two things"
    assert set(found.classes.tolist()) == {2, 3}
    assert (found.scores.diff() <= 0).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_strips_change_nothing(task: str) -> None:
    answers = []
    for strip in (1, 7, 64):
        model, _ = blobs(Inference(strip=strip, thresholds=Thresholds(0.2, 0.2)))
        answers.append(model.segment(IMAGE, task))
    assert len(answers[0])
    for other in answers[1:]:
        assert torch.equal(other.classes, answers[0].classes)
        assert (other.masks ^ answers[0].masks).float().mean() < 1e-3
        torch.testing.assert_close(other.scores, answers[0].scores, rtol=1e-4, atol=1e-5)


def test_masks_brought_home_first_differ_little() -> None:
    fit = Fit(long=90)
    maps = []
    for order in ("masks_first", "masks_home"):
        model, _ = blobs(Inference(fit=fit, order=order))
        scores = model.scores(IMAGE)
        assert (scores.height, scores.width) == SIZE
        maps.append(scores.fetch(0, SIZE[0]))
    assert not torch.equal(*maps)
    assert (maps[0] - maps[1]).abs().mean() < 0.05
    model, _ = blobs(Inference(scales=(0.5, 1.0), flip=True, order="masks_home"))
    assert model.segment(IMAGE, augment=True).masks.shape[1:] == SIZE


def test_whole_pictures_and_windows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="order masks_home brings whole pictures home"):
        Inference(window=(8, 8), stride=(8, 8), order="masks_home")


def test_double_precision_goes_all_the_way() -> None:
    model, _ = blobs(
        Inference(Fit(short=50), window=(48, 48), stride=(32, 32), multiple=1, scales=(1.0, 1.5), flip=True)
    )
    single = model.scores(IMAGE, augment=True).fetch(0, SIZE[0])
    double = model.double().scores(IMAGE.double(), augment=True).fetch(0, SIZE[0])
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", ["mean", "black"])
def test_scores_of_padding_are_cut_off_before_they_come_home(fill: Literal["mean", "black"]) -> None:
    """Windows run over the padded picture, as they would over one that came so."""
    model, proposer = blobs(Inference(window=(48, 48), stride=(16, 16), pad=48, fill=fill, multiple=1))
    proposer.mean = (120.0, 90.0, 60.0)
    home = (20, 31)
    ours = model.view_scores(IMAGE, Frame(home, SIZE, (48, 53)))
    colour = torch.tensor(proposer.mean if fill == "mean" else (0.0, 0.0, 0.0))
    padded = colour[:, None, None].repeat(1, 48, 53)
    padded[:, : SIZE[0]] = IMAGE
    whole = model.view_scores(padded, Frame.fit((48, 53))).fetch(0, 48)
    assert [size for _, size in proposer.seen] == [(48, 48)] * 4
    torch.testing.assert_close(ours.fetch(0, home[0]), resize(whole[:, : SIZE[0]], home))
    with pytest.raises(ValueError, match="pad: -1 must not be negative"):
        Inference(pad=-1)


def test_augmented_views_may_have_a_fit_of_their_own() -> None:
    inference = Inference(Fit(short=30, round_up=32), tta_fit=Fit(short=30, least=40), scales=(0.5, 1.5), flip=True)
    assert [view.inner for view in inference.views((30, 60), 1, augment=False)] == [(32, 64)]
    assert [view.inner for view in inference.views((30, 60), 1, augment=True)] == [(40, 80)] * 2 + [(45, 90)] * 2


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_augmentation_is_semantic_only(task: str) -> None:
    model, _ = blobs()
    with pytest.raises(UserError, match=f"augmentation is for the semantic task only; leave it out for {task}"):
        model.segment(IMAGE, task, augment=True)


def test_tasks_that_cannot_be_done_are_refused() -> None:
    model, _ = blobs(able=("semantic",))
    with pytest.raises(UserError, match="cannot do the panoptic task, only: semantic"):
        model.segment(IMAGE, "panoptic")
    stuff = Vocabulary(VOCABULARY.names, frozenset(), VOCABULARY.colors, VOCABULARY.ids)
    model = Segmenter(OracleProposer(stuff), Given(), Matched(stuff), stuff, Inference())
    with pytest.raises(UserError, match="none of the vocabulary's names is marked as one"):
        model.segment(IMAGE, "instance", truth=scene())
    assert len(model.segment(IMAGE, "panoptic", truth=scene())) == 4, "without things every class is one segment"


class Root(nn.Module):
    """Square roots: NaN where the input is negative."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.sqrt()


@pytest.mark.parametrize("task", TASKS)
def test_nan_is_traced_to_the_layer_that_made_it(task: str) -> None:
    model, proposer = blobs()
    proposer.body.insert(1, Root())
    with pytest.raises(UserError, match=r"NaN first in 'proposer\.body\.1', though its weights are finite; try"):
        model.segment(IMAGE, task)


def test_nan_is_traced_to_spoilt_weights() -> None:
    model, proposer = blobs()
    with torch.no_grad():
        proposer.body.get_parameter("2.bias")[3] = torch.nan
    with pytest.raises(
        UserError, match=r"NaN first in 'proposer\.body\.2', whose bias is not finite; use other weights"
    ):
        model.segment(IMAGE)


def test_nan_between_layers_is_told_so() -> None:
    model, proposer = blobs()
    with torch.no_grad():
        proposer.query[2] = torch.nan
    with pytest.raises(UserError, match=r"NaN first in 'proposer', whose query is not finite"):
        model.segment(IMAGE)
    model, proposer = blobs()
    proposer.mean = (torch.nan,) * 3
    with pytest.raises(UserError, match=r"NaN first on the way into 'proposer\.body\.0', though"):
        model.segment(IMAGE, "panoptic")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks]
    assert not hooks


def atm(kind: str, criterion: str, queries: int | None, task: str = "semantic") -> Segmenter:
    proposer = {**import_class(MENUS[Proposer][kind]).example, "queries": queries, "spread": 0.1}
    tree = {"size": [32, 32], "task": task, "proposer": proposer}
    tree |= {
        "namer": {"kind": "class_head"},
        "criterion": {"kind": criterion} | ({"points": 300} if criterion == "set" else {}),
    }
    torch.manual_seed(0)
    return Experiment(Recipe(tree, "atm.yaml"), VOCABULARY).segmenter()


def sample() -> Sample:
    ids = SegmentMap.of(scene()).ids[None]
    return Sample(IMAGE, ids, scene().classes, scene().crowd, "scene")


@pytest.mark.parametrize("kind", ["atm", "atm_single"])
@pytest.mark.parametrize("task", TASKS)
def test_free_queries_learn_and_answer_every_task(kind: str, task: str) -> None:
    model = atm(kind, "set", 9, task)
    assert model.proposer.tasks == frozenset(TASKS)
    batch = collate([sample(), sample()], task)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.stack(list(model.train().losses(batch).values())).sum()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert min(values[-3:]) < 0.85 * values[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval().segment(IMAGE, task).masks.shape[1:] == SIZE


def test_a_query_a_class_is_semantic_only() -> None:
    assert atm("atm", "fixed", None).proposer.tasks == frozenset({"semantic"})
    with pytest.raises(UserError, match=r"atm\.yaml: task: this model cannot do the panoptic task, only: semantic"):
        atm("atm", "set", None, "panoptic")
    with pytest.raises(UserError, match="one query a class: 9 queries, 4 classes"):
        atm("atm", "fixed", 9).losses(collate([sample()], "semantic"))
    with pytest.raises(UserError, match="knows one mask a class and a picture has several"):
        atm("atm", "fixed", 4, "panoptic").losses(collate([sample()], "panoptic"))
