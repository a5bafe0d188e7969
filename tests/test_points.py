"""Points: every class of a picture as often as any other, every pixel of a class as often as any other, and nothing of void."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_parts
from maskfirst.data.points import draw
from maskfirst.errors import UserError
from maskfirst.phases.points import PointPhase
from maskfirst.train import train
from maskfirst.types import VOID, Sample


def sample(ids: torch.Tensor, classes: list[int], crowd: list[bool] | None = None) -> Sample:
    layers = ids if ids.ndim == 3 else ids[None]
    marks = torch.tensor(crowd or [False] * len(classes), dtype=torch.bool)
    image = torch.zeros(3, *layers.shape[-2:], dtype=torch.uint8)
    return Sample(image, layers.int(), torch.tensor(classes, dtype=torch.int64), marks, "a")


def uneven() -> Sample:
    """Class 7 in one pixel and in a crowd of one, class 2 in a quarter, class 300 in half; class 5 nowhere; the rest void."""
    ids = torch.full((20, 40), VOID)
    ids[:, 20:] = 3
    ids[10:, :20] = 1
    ids[0, 0], ids[2, 5] = 0, 4
    return sample(ids, [7, 2, 5, 300, 7], [False, False, False, False, True])


def test_every_point_has_the_class_of_its_pixel() -> None:
    torch.manual_seed(0)
    start = uneven()
    points, classes = draw(start, 2000)
    assert points.shape == (2000, 2)
    here = start.ids[0, points[:, 0], points[:, 1]]
    assert (here != VOID).all()
    assert torch.equal(start.classes[here.long()], classes)


def test_classes_come_equally_often_whatever_their_area() -> None:
    torch.manual_seed(0)
    _, classes = draw(uneven(), 30_000)
    found, counts = classes.unique(return_counts=True)
    assert found.tolist() == [2, 7, 300]
    # Five standard deviations of a binomial of 30,000 and a third.
    assert ((counts - 10_000).abs() < 5 * (30_000 * 2 / 9) ** 0.5).all()


def test_pixels_of_a_class_come_equally_often_from_first_to_last() -> None:
    torch.manual_seed(0)
    points, classes = draw(uneven(), 60_000)
    places = points[classes == 300]
    _, counts = (40 * places[:, 0] + places[:, 1]).unique(return_counts=True)
    assert len(counts) == 400
    expected = len(places) / 400
    # Chi-square of 399 degrees of freedom: mean 399, standard deviation 28.
    assert ((counts - expected) ** 2 / expected).sum() < 399 + 5 * 28


def test_layers_all_count_and_overlaps_have_both_classes() -> None:
    torch.manual_seed(0)
    ids = torch.full((2, 4, 6), VOID)
    ids[0, :2, :2], ids[1, 1, 1] = 0, 1
    points, classes = draw(sample(ids, [9, 4]), 200)
    assert {tuple(point) for point in points[classes == 4].tolist()} == {(1, 1)}
    assert {tuple(point) for point in points[classes == 9].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_more_classes_than_a_byte_counts() -> None:
    torch.manual_seed(0)
    start = sample(torch.arange(400).view(20, 20), list(range(400, 0, -1)))
    points, classes = draw(start, 20_000)
    assert torch.equal(400 - (20 * points[:, 0] + points[:, 1]), classes)
    assert len(classes.unique()) == 400


def test_nothing_but_void_gives_no_points() -> None:
    for start in (sample(torch.full((5, 6), VOID), []), sample(torch.full((5, 6), VOID), [3, 4])):
        points, classes = draw(start, 10)
        assert points.shape == (0, 2)
        assert classes.shape == (0,)


def test_chance_is_torchs() -> None:
    torch.manual_seed(3)
    points, classes = draw(uneven(), 50)
    torch.manual_seed(3)
    again, same = draw(uneven(), 50)
    assert torch.equal(points, again)
    assert torch.equal(classes, same)
    assert not torch.equal(draw(uneven(), 50)[0], points)


# --- the phase ----------------------------------------------------------------------------------------------------


def pointed(**train: Any) -> dict[str, Any]:
    """A recipe that trains a tiny namer of points on the true masks' proposer."""
    settings = {"optimizer": {"kind": "sgd", "lr": 0.1, "decay": 0.0}, "clip": 1.0}
    tree = tiny_parts.recipe(**settings | train)
    del tree["criterion"]
    parts = {"proposer": {"kind": "oracle"}, "namer": dict(tiny_parts.TinyPointNamer.example)}
    return tree | parts | {"phase": {"kind": "points", "count": 16}}


def phase_of(tree: dict[str, Any]) -> PointPhase:
    experiment = tiny_parts.experiment(tree)
    torch.manual_seed(0)
    phase = experiment.phase(experiment.segmenter())
    assert isinstance(phase, PointPhase)
    return phase


def void(height: int = 8, width: int = 8) -> Sample:
    return sample(torch.full((height, width), VOID), [])


def test_a_batch_has_points_of_every_picture_that_shows_a_class() -> None:
    phase = phase_of(pointed())
    noise = [tiny_parts.Noise()[index] for index in range(3)]
    batch = phase.collate([noise[0], void(), noise[1], noise[2]], "semantic")
    assert batch.keys == ("noise-0", "noise-1", "noise-2")
    assert batch.truth is None
    assert batch.points is not None
    assert batch.point_classes is not None
    assert batch.points.shape == (3, 16, 2)
    for start, points, classes in zip(noise, batch.points.long(), batch.point_classes, strict=True):
        assert torch.equal(start.ids[0, points[:, 0], points[:, 1]].long(), classes)


def test_the_loss_is_the_mean_cross_entropy_of_the_namer_at_these_pixels() -> None:
    phase = phase_of(pointed())
    batch = phase.collate([tiny_parts.Noise()[index] for index in range(3)], "semantic")
    assert batch.points is not None
    assert batch.point_classes is not None
    ((name, loss),) = next(phase.turns(batch)).items()
    assert name == "points"
    logits = phase.namer.classify(batch.pixels, batch.points / 4 - 1)
    picked = -logits.log_softmax(-1).gather(-1, batch.point_classes[..., None])
    torch.testing.assert_close(loss, picked.mean())


def test_pictures_without_any_class_give_a_loss_of_zero_that_reaches_all() -> None:
    phase = phase_of(pointed())
    (loss,) = next(phase.turns(phase.collate([void(), void()], "semantic"))).values()
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in phase.namer.parameters())


def test_training_learns_to_name(tmp_path: Path) -> None:
    tree = pointed(steps=60, evaluate_every=0.5)
    result = train(tiny_parts.experiment(tree), tmp_path, loggers=(), progress=False)
    assert result.best > 0.95, "dark from light"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["points"] for line in log if "points" in line]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_point_encoder_has_a_rate_of_its_own() -> None:
    tree = pointed(groups=[{"match": r"namer\.point_proj\..*", "lr": 1.25}])
    (optimizer,) = phase_of(tree).optimizers.values()
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == {
        "namer.trunk.weight": 0.1,
        "namer.trunk.bias": 0.1,
        "namer.point_proj.weight": 0.125,
        "namer.head.weight": 0.1,
        "namer.head.bias": 0.1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"namer": {"kind": "given"}}, "phase points trains a namer of points, and Given is none; take namer vit_p"),
        ({"criterion": {"kind": "pixel"}}, "phase points has a loss of its own; take 'criterion' out"),
        (
            {"proposer": dict(tiny_parts.TinyProposer.example)},
            r"the proposer has 4 trainable parameters \(blocks.0.weight, .*\); set proposer.freeze to true",
        ),
        ({"phase": {"kind": "points", "count": 0}}, "count: 0 must be at least 1, as points a picture"),
    ],
)
def test_what_the_phase_cannot_train_is_told_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_parts.experiment(pointed() | change).check()


def test_a_frozen_proposer_is_left_alone() -> None:
    tree = pointed() | {"proposer": {**tiny_parts.TinyProposer.example, "freeze": True}}
    assert phase_of(tree).namer.size == (8, 8)


def test_samples_of_another_size_are_told_with_the_remedy() -> None:
    message = r"augment: samples have 8 x 9 px, and the namer takes 8 x 8; end the list with \{kind: resize\}"
    with pytest.raises(UserError, match=message):
        phase_of(pointed()).collate([void(8, 9)], "semantic")
