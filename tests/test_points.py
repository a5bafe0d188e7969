"""Points: every class of a picture as often as any other, every pixel of a class as often as any other, and nothing of void."""

import torch

from maskfirst.data.points import draw
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
