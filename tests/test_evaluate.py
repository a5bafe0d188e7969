"""Evaluation: the same scores in one process and in two, the worst pictures, and files that cannot be read."""

import io
import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console

from maskfirst.contracts import Dataset
from maskfirst.data.images import ImageError, read_image
from maskfirst.evaluate import evaluate, truth_labels
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.types import VOID, Sample
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


def side_processes(world: int, dataset: Dataset, **options) -> list:
    """`evaluate` as `world` ranks that meet to add up and to gather, each in a thread of its own."""
    barrier, board = threading.Barrier(world), [None] * world

    def meet(rank, value):
        board[rank] = value
        barrier.wait()
        everyone = list(board)
        barrier.wait()
        return everyone

    def run(rank):
        return evaluate(
            Threshold(),
            dataset,
            rank=rank,
            world=world,
            reduce=lambda tensor: torch.stack(meet(rank, tensor)).sum(0),
            gather=lambda entries: meet(rank, entries),
            **options,
        )

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_scores_are_those_of_one_matrix_over_all_pictures():
    dataset, matrix = Noise(), ConfusionMatrix(3)
    for index in range(len(dataset)):
        sample = dataset[index]
        matrix.update(sample.truth.label_map(), Threshold().predict(sample.image).label_map())
    result = evaluate(Threshold(), dataset)
    expected = matrix.scores(VOCABULARY.names)
    assert json.dumps(result.scores) == json.dumps(expected)
    assert math.isnan(result.scores["IoU"]["unseen"])
    assert result.count == 9
    assert [row[0] for row in result.rows] == list(VOCABULARY.names)
    assert sum(row[3] for row in result.rows) == pytest.approx(1)


@pytest.mark.parametrize("world", [2, 4])
def test_many_processes_equal_one(world, tmp_path):
    dataset = Noise(count=7, broken=(2, 5))
    alone = evaluate(Threshold(), dataset, worst=3, worst_dir=tmp_path / "one")
    for rank in side_processes(world, dataset, worst=3, worst_dir=tmp_path / "many"):
        assert json.dumps(rank.scores) == json.dumps(alone.scores)
        assert (rank.worst, rank.failed, rank.count) == (alone.worst, alone.failed, alone.count)
    for page in (tmp_path / "one").iterdir():
        assert page.read_bytes() == (tmp_path / "many" / page.name).read_bytes()


def test_a_process_without_pictures_takes_part():
    assert [rank.count for rank in side_processes(3, Noise(count=2))] == [2, 2, 2]


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
    assert result.scores["mIoU"] > 0


def test_json_has_null_for_nan_and_the_table_a_line_for_every_class():
    result = evaluate(Threshold(), Noise(broken=(4,)))
    content = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(content) == {"mIoU", "aAcc", "mAcc", "IoU", "Acc", "images", "seconds", "worst", "failed"}
    assert content["IoU"] == {
        "dark": result.scores["IoU"]["dark"],
        "bright": result.scores["IoU"]["bright"],
        "unseen": None,
    }
    assert content["failed"] == [{"key": "street/004", "error": "street/004.png: broken or cut short"}]
    page = io.StringIO()
    Console(width=100, file=page).print(result.as_table())
    text = page.getvalue()
    assert all(name in text for name in VOCABULARY.names)
    assert f"{100 * result.scores['mIoU']:.2f} %" in text
    assert "–" in text


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


def test_truth_of_overlapping_layers_is_that_of_the_opened_segments():
    ids = torch.randint(-1, 6, (3, 9, 11), dtype=torch.int32)
    sample = Sample(
        torch.zeros(3, 9, 11, dtype=torch.uint8), ids, torch.tensor([4, 0, 2, 2, 7, 1]), torch.zeros(6) > 0, "a"
    )
    assert torch.equal(truth_labels(sample), sample.truth.label_map())


def test_several_processes_must_be_able_to_meet():
    with pytest.raises(ValueError, match="2 processes needs `reduce` and `gather`"):
        evaluate(Threshold(), Noise(), world=2)
