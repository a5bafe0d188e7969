"""Evaluation of the three tasks: the same scores in one process and in two, the worst pictures, files that cannot be read."""

import io
import json
import math
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor

from maskfirst.contracts import Dataset
from maskfirst.data.images import ImageError, read_image
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.evaluate import MEASURES, evaluate, truth_labels, truth_map
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.types import TASKS, VOID, Sample, SegmentMap, Segments
from threshold import VOCABULARY, Threshold


class Noise(Dataset):
    """Pictures of 12 x 16 px whose brightness agrees with their truth, but for a share that grows with the index."""

    vocabulary = VOCABULARY

    def __init__(self, count: int = 9, broken: tuple[int, ...] = (), blank: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.blank = count, broken, blank

    def __len__(self) -> int:
        return self.count

    def keys(self) -> Sequence[str]:
        return [f"street/{index:03d}" for index in range(self.count)]

    def __getitem__(self, index: int) -> Sample:
        key = self.keys()[index]
        if index in self.broken:
            raise ImageError(f"{key}.png: broken or cut short")
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(VOID, 2, (12, 16), generator=generator, dtype=torch.int32)
        wrong = torch.rand(12, 16, generator=generator) < index / self.count
        bright = torch.where(wrong, 1 - labels, labels) == 1
        ids = torch.full_like(labels, VOID) if index in self.blank else labels
        image = torch.where(bright, 200, 50).to(torch.uint8).expand(3, -1, -1).contiguous()
        return Sample(image, ids[None], torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), key)


class Doubled(Dataset):
    """Pictures of 12 x 16 px with sky and two cars, one of them overlapping the other, and a crowd of cars in odd ones."""

    vocabulary = from_names(["sky", "car"], things=["car"])

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def keys(self) -> Sequence[str]:
        return [f"{index}" for index in range(self.count)]

    def __getitem__(self, index: int) -> Sample:
        ids = torch.full((2, 12, 16), VOID, dtype=torch.int32)
        ids[0, :6] = 0
        ids[0, 6:, : 8 + index] = 1
        ids[1, 8:, 6:12] = 2
        ids[0, :2, 12:], ids[1, :2, 12:] = VOID, 3
        crowd = torch.tensor([False, False, False, index % 2 == 1])
        return Sample(
            torch.full((3, 12, 16), 100, dtype=torch.uint8), ids, torch.tensor([0, 1, 1, 1]), crowd, self.keys()[index]
        )


class Reader(Threshold):
    """Answers with the truth that the data set holds, without the cars after the first `found`."""

    def __init__(self, dataset: Dataset, found: int = 9) -> None:
        super().__init__()
        self.vocabulary, self.uses_truth, self.found = dataset.vocabulary, True, found

    def segment(
        self,
        image: UInt8[Tensor, "3 H W"],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Segments | None = None,
        key: str = "",
    ) -> Segments:
        assert truth is not None
        things = truth.classes == 1
        kept = truth[~truth.crowd & (~things | (things.cumsum(0) <= self.found))]
        # The mask that lies below is what a panoptic answer shows of it.
        return (
            SegmentMap.of(kept).segments
            if task == "panoptic"
            else kept[kept.classes == 1]
            if task == "instance"
            else kept
        )


def side_processes(world: int, segmenter: Threshold, dataset: Dataset, *arguments, **options) -> list:
    """`evaluate` as `world` ranks that meet to gather, each in a thread of its own."""
    barrier, board = threading.Barrier(world), [None] * world

    def meet(rank, value):
        board[rank] = pickle.dumps(value)
        barrier.wait()
        everyone = [pickle.loads(each) for each in board]
        barrier.wait()
        return everyone

    def run(rank):
        return evaluate(
            segmenter, dataset, *arguments, rank=rank, world=world, gather=lambda value: meet(rank, value), **options
        )

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_scores_are_those_of_one_matrix_over_all_pictures():
    dataset, matrix = Noise(), ConfusionMatrix(VOCABULARY)
    for index in range(len(dataset)):
        sample = dataset[index]
        matrix.update(sample.truth.label_map(), Threshold().segment(sample.image).label_map())
    result = evaluate(Threshold(), dataset)
    expected = matrix.scores()
    assert json.dumps(result.scores.content) == json.dumps(expected.content)
    assert math.isnan(result.scores.content["IoU"]["unseen"])
    assert result.count == 9
    assert [name for name, _ in result.scores.rows] == list(VOCABULARY.names)
    assert sum(numbers[2] for _, numbers in result.scores.rows) == pytest.approx(1)


@pytest.mark.parametrize("world", [2, 4])
def test_many_processes_equal_one(world, tmp_path):
    dataset = Noise(count=7, broken=(2, 5))
    alone = evaluate(Threshold(), dataset, worst=3, worst_dir=tmp_path / "one")
    for rank in side_processes(world, Threshold(), dataset, worst=3, worst_dir=tmp_path / "many"):
        assert json.dumps(rank.scores.content) == json.dumps(alone.scores.content)
        assert (rank.worst, rank.failed, rank.count) == (alone.worst, alone.failed, alone.count)
    for page in (tmp_path / "one").iterdir():
        assert page.read_bytes() == (tmp_path / "many" / page.name).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_many_processes_equal_one_in_every_task(task):
    dataset = Doubled(5)
    alone = evaluate(Reader(dataset, found=1), dataset, task)
    for rank in side_processes(3, Reader(dataset, found=1), dataset, task):
        assert json.dumps(rank.scores.content) == json.dumps(alone.scores.content)
        assert rank.worst == alone.worst


def test_a_process_without_pictures_takes_part():
    assert [rank.count for rank in side_processes(3, Threshold(), Noise(count=2))] == [2, 2, 2]


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_scores_100_in_every_task(task, tmp_path):
    dataset = Doubled()
    result = evaluate(Reader(dataset), dataset, task, worst=1, worst_dir=tmp_path)
    assert result.scores.headline == {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}[task]
    # Crowds, which the answers leave out, are truth in the semantic task alone.
    assert result.scores.value == 1.0 if task != "semantic" else 0.9 < result.scores.value < 1
    assert list(tmp_path.iterdir())


def test_cars_that_are_not_found_are_missed():
    dataset = Doubled()
    panoptic = evaluate(Reader(dataset, found=1), dataset, "panoptic").scores
    # Pictures 0 and 2 have three cars, 1 and 3 two and a crowd. One of each is found, four of ten.
    assert panoptic.content["per_class"]["sky"]["pq"] == 1
    assert panoptic.content["per_class"]["car"]["rq"] == pytest.approx(4 / (4 + 6 / 2))
    assert panoptic.content["Things"]["n"] == panoptic.content["Stuff"]["n"] == 1
    instance = evaluate(Reader(dataset, found=1), dataset, "instance").scores
    assert instance.content["AR1"] == pytest.approx(4 / 10)
    assert instance.content["per_class"].keys() == {"car"}


def test_the_metric_is_given_what_it_is_called_for():
    assert tuple(MEASURES) == ("semantic", "panoptic", "instance")


def test_tasks_that_cannot_be_scored_are_told():
    dataset = Noise()
    dataset.vocabulary = from_names(["dark", "bright"])
    segmenter = Threshold()
    segmenter.vocabulary = dataset.vocabulary
    with pytest.raises(UserError, match="no things"):
        evaluate(segmenter, dataset, "instance")
    with pytest.raises(UserError, match="unknown task 'panoptik'"):
        evaluate(segmenter, dataset, "panoptik")
    with pytest.raises(UserError, match="boundary IoU is of label maps"):
        evaluate(segmenter, dataset, "panoptic", boundary=True)


def test_boundary_iou_stands_beside_iou():
    plain, both = (evaluate(Threshold(), Noise(count=3), boundary=boundary).scores for boundary in (False, True))
    assert both.columns == ("IoU", "Acc", "share", "BIoU")
    assert both.content["IoU"].keys() == both.content["BIoU"].keys()
    # The window of 1 px around each sees another class almost everywhere in noise.
    assert both.content["mBIoU"] == pytest.approx(plain.content["mIoU"], abs=0.02)
    assert both.value == plain.value


def test_the_worst_come_first_and_are_drawn(tmp_path):
    segmenter = Threshold()
    result = evaluate(segmenter, Noise(count=9), worst=4, worst_dir=tmp_path)
    assert [key for key, _ in result.worst] == ["street/008", "street/007", "street/006", "street/005"]
    scores = [score for _, score in result.worst]
    assert scores == sorted(scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"worst-0{place}.jpg" for place in (1, 2, 3, 4)]
    page = read_image(tmp_path / "worst-01.jpg")
    assert page.shape[-1] > 3 * 360
    assert len(segmenter.calls) == 9 + 4


def test_a_picture_without_truth_is_not_among_the_worst():
    result = evaluate(Threshold(), Noise(count=3, blank=(2,)))
    assert [key for key, _ in result.worst] == ["street/001", "street/000"]


def test_unreadable_pictures_are_named_and_the_rest_is_scored():
    result = evaluate(Threshold(), Noise(count=5, broken=(1, 3)))
    assert result.failed == [(f"street/00{i}", f"street/00{i}.png: broken or cut short") for i in (1, 3)]
    assert result.count == 3
    assert result.scores.value > 0


def test_json_has_null_for_nan_and_the_table_a_line_for_every_class():
    result = evaluate(Threshold(), Noise(broken=(4,)))
    content = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(content) == {"mIoU", "aAcc", "mAcc", "IoU", "Acc", "images", "seconds", "worst", "failed"}
    assert content["IoU"] == {
        "dark": result.scores.content["IoU"]["dark"],
        "bright": result.scores.content["IoU"]["bright"],
        "unseen": None,
    }
    assert content["failed"] == [{"key": "street/004", "error": "street/004.png: broken or cut short"}]
    assert content["worst"][0].keys() == {"key", "mIoU"}
    text = printed(result)
    assert all(name in text for name in VOCABULARY.names)
    assert f"{100 * result.scores.value:.2f} %" in text
    assert "–" in text


def printed(result) -> str:
    page = io.StringIO()
    Console(width=160, file=page).print(result.as_table())
    return page.getvalue()


def test_json_and_tables_of_the_other_tasks():
    dataset = Doubled()
    panoptic, instance = (evaluate(Reader(dataset, found=1), dataset, task) for task in ("panoptic", "instance"))
    content = json.loads(json.dumps(panoptic.as_json(), allow_nan=False))
    assert content["All"].keys() == {"pq", "sq", "rq", "n"}
    assert content["per_class"]["car"].keys() == {"pq", "sq", "rq"}
    assert all(word in printed(panoptic) for word in ("Things", "Stuff", "RQ", "car"))
    content = json.loads(json.dumps(instance.as_json(), allow_nan=False))
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"} < content.keys()
    assert content["APl"] is None
    assert all(word in printed(instance) for word in ("AP75", "AR100", "car"))


def test_nothing_to_score_is_nan():
    result = evaluate(Threshold(), Noise(count=2, broken=(0, 1)))
    assert result.count == 0
    assert result.as_json()["mIoU"] is None
    assert result.worst == []


def test_progress_augmentation_and_task_are_passed_on():
    segmenter, told = Threshold(), []
    evaluate(segmenter, Noise(count=3), "panoptic", augment=True, progress=lambda *numbers: told.append(numbers))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [(call["task"], call["augment"], call["truth"]) for call in segmenter.calls] == [
        ("panoptic", True, None)
    ] * 3


def test_an_oracle_is_given_the_truth():
    segmenter = Threshold()
    segmenter.uses_truth = True
    evaluate(segmenter, Noise(count=1))
    assert torch.equal(segmenter.calls[0]["truth"].label_map(), Noise()[0].truth.label_map())


@pytest.fixture
def layered() -> Sample:
    ids = torch.randint(-1, 6, (3, 9, 11), dtype=torch.int32)
    # Segment 5 lies below the others, and segment 3 is nowhere.
    ids[ids == 3] = VOID
    ids[0, 0], ids[1, 0], ids[2, 0] = 1, 4, 2
    crowd = torch.tensor([False, True, False, False, True, False])
    return Sample(torch.zeros(3, 9, 11, dtype=torch.uint8), ids, torch.tensor([4, 0, 2, 2, 7, 1]), crowd, "a")


def test_truth_of_overlapping_layers_is_that_of_the_opened_segments(layered):
    assert torch.equal(truth_labels(layered, VOCABULARY), layered.truth.label_map())


def test_the_map_of_a_truth_has_the_segments_that_are_seen(layered):
    found, expected = truth_map(layered, VOCABULARY), SegmentMap.of(layered.truth)
    assert (found.ids[0] != VOID).all()
    for of in (found.classes, found.crowd.long()):
        assert torch.equal(
            torch.cat([of, torch.tensor([VOID])])[found.ids.long()],
            torch.cat([expected.classes if of is found.classes else expected.crowd.long(), torch.tensor([VOID])])[
                expected.ids.long()
            ],
        )
    assert len(torch.unique(found.ids[found.ids != VOID])) == len(found)


def test_several_processes_must_be_able_to_meet():
    with pytest.raises(ValueError, match="2 processes needs `gather`"):
        evaluate(Threshold(), Noise(), world=2)
