"""Augmentation: the segments go where the picture goes, chance comes from torch alone, limits hold."""

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskfirst.contracts import Augmentation
from maskfirst.data.augment import (
    Pad,
    Photometric,
    RandomCrop,
    RandomFlip,
    RandomScale,
    Resize,
    ResizedCrop,
    Rotate,
    recolored,
)
from maskfirst.frames import Fit
from maskfirst.types import VOID, Sample

FILL = (7, 8, 9)


def sample(ids: Tensor, classes: list[int] | None = None) -> Sample:
    """A picture that shows its segments: red = 20 + 10 x segment, green and blue = the place in it."""
    height, width = ids.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([20 + 10 * ids, y * 255 // height, x * 255 // width]).to(torch.uint8)
    kinds = torch.tensor(classes if classes is not None else range(int(ids.max()) + 1), dtype=torch.int64)
    return Sample(image, ids.int()[None], kinds, torch.zeros(len(kinds), dtype=torch.bool), "a")


def blocks(height: int = 60, width: int = 90, size: int = 15) -> Sample:
    """Squares of segments in rows, with a hole without any."""
    y, x = torch.meshgrid(torch.arange(height) // size, torch.arange(width) // size, indexing="ij")
    ids = (y * (width // size) + x) % 23
    ids[20:24, 20:24] = VOID
    return sample(ids)


def agree(changed: Sample) -> float:
    """The share of pixels where the colour names the segment."""
    return (changed.image[0] == 20 + 10 * changed.ids[0]).float().mean().item()


CHAIN: list[Augmentation] = [
    RandomScale(0.5, 2.0),
    RandomCrop((40, 50)),
    RandomFlip(),
    Photometric(),
    Pad((40, 50), FILL),
]


def run(chain: list[Augmentation], start: Sample, seed: int) -> Sample:
    torch.manual_seed(seed)
    for step in chain:
        start = step(start)
    return start


@pytest.mark.parametrize(
    "build",
    [
        lambda: RandomScale(0.5, 2.0),
        lambda: RandomScale(0.5, 2.0, Fit(long=100, short=50)),
        lambda: RandomCrop((40, 50)),
        lambda: RandomFlip(),
        lambda: ResizedCrop((60, 90)),
        lambda: Resize((100, 120)),
    ],
    ids=["scale", "fit", "crop", "flip", "resized_crop", "resize"],
)
def test_segments_follow_the_picture(build: Callable[[], Augmentation]) -> None:
    start = blocks()
    for seed in range(20):
        changed = run([build()], start, seed)
        # Where bilinear resizing mixes the colours of neighbours, no colour names either.
        assert agree(changed) > 0.75
        assert changed.image.shape[1:] == changed.ids.shape[1:]
        assert changed.image.dtype == torch.uint8
        assert changed.ids.dtype == torch.int32
        assert changed.key == "a"


@pytest.mark.parametrize("step", [*CHAIN, ResizedCrop((40, 50)), Rotate()], ids=lambda step: type(step).__name__)
def test_chance_is_torchs_and_the_given_sample_stays(step: Augmentation) -> None:
    start = blocks()
    image, ids = start.image.clone(), start.ids.clone()
    for seed in range(8):
        one, again = run([step], start, seed), run([step], start, seed)
        assert torch.equal(one.image, again.image)
        assert torch.equal(one.ids, again.ids)
    assert torch.equal(start.image, image)
    assert torch.equal(start.ids, ids)
    if not isinstance(step, Pad):
        assert len({run([step], start, seed).image.numpy().tobytes() for seed in range(16)}) > 1


def test_the_whole_chain_gives_one_size() -> None:
    start = blocks()
    for seed in range(20):
        changed = run(CHAIN, start, seed)
        assert changed.image.shape == (3, 40, 50)
        assert changed.ids.shape == (1, 40, 50)
        assert set(changed.ids.unique().tolist()) <= {VOID, *range(len(start.classes))}
        assert changed.truth.masks.shape[1:] == (40, 50)


# --- scale --------------------------------------------------------------------------------------------------------


def test_scale_stays_in_its_limits_and_keeps_the_aspect() -> None:
    sizes = [run([RandomScale(0.5, 2.0)], blocks(), seed).image.shape[1:] for seed in range(200)]
    heights = [height for height, _ in sizes]
    assert 30 <= min(heights) < 40
    assert 110 < max(heights) <= 120
    assert all(abs(width / height - 1.5) < 0.06 for height, width in sizes)


def test_scale_multiplies_the_limits_of_a_fit() -> None:
    # The specification's base scale: long 2048, short 512, here a twentieth of it.
    step = RandomScale(1.0, 1.0, Fit(long=102, short=26))
    assert step(blocks(60, 90)).image.shape == (3, 26, 39)
    assert step(blocks(30, 180)).image.shape == (3, 17, 102)
    assert RandomScale(0.5, 0.5, Fit(long=102, short=26))(blocks(60, 90)).image.shape == (3, 13, 20)
    assert RandomScale(0.5, 0.5, Fit(long=102, short=26, least=26))(blocks(60, 90)).image.shape == (3, 26, 39)


def test_scale_of_one_changes_nothing() -> None:
    start = blocks()
    assert RandomScale(1.0, 1.0)(start) is start


def test_scale_uses_half_pixel_centres() -> None:
    doubled = RandomScale(2.0, 2.0)(sample(torch.tensor([[0, 1], [2, VOID]])))
    assert doubled.ids.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]]]
    halved = RandomScale(0.5, 0.5)(sample(torch.arange(16).reshape(4, 4)))
    assert halved.ids.tolist() == [[[5, 7], [13, 15]]]
    # The picture's weight is centred on the same places.
    assert doubled.image[0, 0].tolist() == [20, 23, 28, 30]


# --- crop ---------------------------------------------------------------------------------------------------------


def test_crop_is_a_part_and_every_part_can_come() -> None:
    start = blocks(8, 9, 3)
    seen = set()
    for seed in range(300):
        crop = run([RandomCrop((6, 7), most=1.0)], start, seed)
        assert crop.image.shape == (3, 6, 7)
        places = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(start.image[:, y : y + 6, x : x + 7], crop.image)
            and torch.equal(start.ids[:, y : y + 6, x : x + 7], crop.ids)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_crop_larger_than_the_picture_takes_what_there_is() -> None:
    start = blocks(20, 90)
    crop = RandomCrop((40, 50))(start)
    assert crop.image.shape == (3, 20, 50)
    assert torch.equal(RandomCrop((40, 100))(start).image, start.image)


def test_crop_avoids_a_single_class() -> None:
    ids = torch.zeros(100, 100, dtype=torch.int64)
    ids[:, 50:] = 1
    start = sample(ids)
    shares = []
    for seed in range(60):
        crop = run([RandomCrop((20, 20), most=0.75, tries=400)], start, seed)
        shares.append((crop.ids == 0).float().mean().item())
    assert all(0.25 < share < 0.75 for share in shares), "at most 75 % of one class"
    free = [(run([RandomCrop((20, 20), most=1.0)], start, s).ids == 0).float().mean().item() for s in range(60)]
    assert any(share in (0.0, 1.0) for share in free)


def test_share_counts_classes_not_segments_and_leaves_void_out() -> None:
    ids = torch.full((40, 40), VOID)
    ids[:, :4] = 0
    ids[:, 4:6] = 1
    ids[:, 6:8] = 2
    whole = (40, 40)

    def draws(classes: list[int]) -> int:
        """How often the crop is drawn."""
        torch.manual_seed(0)
        RandomCrop(whole, most=0.75, tries=5)(sample(ids, classes))
        drawn = torch.rand(()).item()
        for count in range(1, 8):
            torch.manual_seed(0)
            for _ in range(2 * count):
                torch.randint(1, ())
            if torch.rand(()).item() == drawn:
                return count
        raise AssertionError

    assert draws([0, 1, 2]) == 1, "half of the pixels with a class are class 0"
    assert draws([0, 1, 1]) == 1
    assert draws([3, 3, 3]) == 6, "all one class: tried 5 times, then taken untested"
    assert draws([0, 0, 1]) == 6, "three quarters are class 0, which is too much"


def test_crop_of_a_picture_without_any_class() -> None:
    empty = sample(torch.full((30, 30), VOID), [])
    assert RandomCrop((10, 10))(empty).image.shape == (3, 10, 10)


def test_crop_keeps_layers_and_owns_its_memory() -> None:
    start = blocks()
    start = replace(start, ids=torch.cat([start.ids, start.ids.flip(1)]))
    crop = RandomCrop((40, 50))(start)
    assert crop.ids.shape == (2, 40, 50)
    assert crop.image.untyped_storage().nbytes() == crop.image.numel(), "else a worker sends the whole picture"


# --- resized_crop, rotate, resize ---------------------------------------------------------------------------------


def test_resized_crops_keep_to_their_areas_and_aspects() -> None:
    """Seen by the range of the coordinates that are the green and blue of `sample`."""
    start, step = blocks(200, 200, 40), ResizedCrop((100, 100), area=(0.5, 0.8), aspect=(0.75, 4 / 3))
    areas, aspects = [], []
    for seed in range(200):
        _, green, blue = run([step], start, seed).image.float()
        tall, wide = (float(each.max() - each.min()) / 255 for each in (green, blue))
        areas.append(tall * wide)
        aspects.append(wide / tall)
    assert 0.45 < min(areas) < 0.55
    assert 0.72 < max(areas) < 0.83
    assert 0.72 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < 1.4


def test_a_part_that_never_fits_is_the_whole_picture() -> None:
    start = blocks(10, 400, 5)
    assert torch.equal(ResizedCrop((20, 40))(start).image, Resize((20, 40))(start).image)


def corner() -> Sample:
    """A class in one corner alone, which most parts and turns lose."""
    ids = torch.full((60, 60), VOID)
    ids[:6, :6] = 0
    return sample(ids)


def test_what_would_lose_every_class_is_not_done() -> None:
    whole = Resize((40, 40))(corner())
    crops = [run([ResizedCrop((40, 40), area=(0.5, 0.6))], corner(), seed) for seed in range(50)]
    assert all((crop.ids != VOID).any() for crop in crops)
    assert 10 < sum(torch.equal(crop.image, whole.image) for crop in crops) < 50
    turned = [run([Rotate()], corner(), seed) for seed in range(50)]
    assert all((turn.ids != VOID).any() for turn in turned)
    assert 10 < sum(torch.equal(turn.image, corner().image) for turn in turned) < 50


def test_a_sample_without_any_class_gets_its_size() -> None:
    empty = sample(torch.full((30, 30), VOID), [])
    assert run([ResizedCrop((10, 12)), Rotate(), RandomFlip()], empty, 0).image.shape == (3, 10, 12)


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_turn_moves_segments_with_the_picture_and_fills_with_no_class(seed: int) -> None:
    ids = torch.zeros(80, 80, dtype=torch.int64)
    ids[:40, :40], ids[40:, 40:] = 1, 2
    turned = run([Rotate(60.0, FILL)], sample(ids), seed)
    inside = turned.ids[0] != VOID
    assert 0.75 < inside.float().mean() < 1
    named = turned.image[0] == 20 + 10 * turned.ids[0]
    assert named[inside].float().mean() > 0.9
    filled = (turned.image == torch.tensor(FILL)[:, None, None]).all(0)
    # Bilinear, so that the pixels at the border of the fill are mixed.
    near = torch.nn.functional.max_pool2d(inside.float()[None], 3, 1, 1)[0] > 0
    assert filled[~near].all()
    assert not filled[inside].any()


def test_turns_go_both_ways_and_no_further_than_told() -> None:
    """By where the middle of the upper border goes: its x moves by the sine of the angle."""
    ids = torch.full((101, 101), VOID)
    ids[10:13, 49:52] = 0
    angles = []
    for seed in range(200):
        rows, columns = (run([Rotate(60.0)], sample(ids), seed).ids[0] == 0).nonzero().float().mean(0).tolist()
        angles.append(math.degrees(math.atan2(columns - 50, 50 - rows)))
    assert -61 < min(angles) < -55
    assert 55 < max(angles) < 61


def test_a_stretch_has_no_aliases() -> None:
    """Stripes of one px become grey, and Pillow's own numbers for a picture that shrinks."""
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 90), generator=random, dtype=torch.uint8)
    image[0] = torch.arange(90) % 2 * 200
    start = replace(blocks(), image=image)
    small = Resize((15, 20))(start)
    assert (small.image[0].float() - 100).abs().max() < 20
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 15), Image.Resampling.BILINEAR)
    difference = small.image.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()
    assert difference.abs().max() <= 1
    assert Resize((60, 90))(start) is start


# --- flip, pad ----------------------------------------------------------------------------------------------------


def test_flip() -> None:
    start = blocks()
    flipped = RandomFlip(1.0)(start)
    assert torch.equal(flipped.image, start.image.flip(2))
    assert torch.equal(flipped.ids, start.ids.flip(2))
    assert RandomFlip(0.0)(start) is start
    count = sum(run([RandomFlip()], start, seed) is not start for seed in range(200))
    assert 70 < count < 130


def test_pad_is_at_the_bottom_and_right() -> None:
    start = blocks(20, 30, 10)
    padded = Pad((25, 32), FILL)(start)
    assert padded.image.shape == (3, 25, 32)
    assert torch.equal(padded.image[:, :20, :30], start.image)
    assert torch.equal(padded.ids[:, :20, :30], start.ids)
    for band in (padded.image[:, 20:], padded.image[:, :, 30:]):
        assert (band == torch.tensor(FILL, dtype=torch.uint8)[:, None, None]).all()
    assert (padded.ids[:, 20:] == VOID).all()
    assert (padded.ids[:, :, 30:] == VOID).all()
    assert Pad((10, 40), FILL)(start).image.shape == (3, 20, 40)
    assert Pad((10, 10), FILL)(start) is start


# --- photometric --------------------------------------------------------------------------------------------------


def test_recoloring_is_hsv() -> None:
    torch.manual_seed(0)
    pixels = torch.cat([torch.randint(256, (3, 12, 12)), torch.tensor([0, 255, 90]).expand(3, 12, 3)], -1).float()
    for saturation, turn in ((1.4, 0.0), (0.5, 0.0), (1.0, 0.1), (1.5, -0.1), (0.7, 0.05)):
        got = recolored(pixels.clone(), saturation, turn)
        for y in range(12):
            for x in range(15):
                hue, chroma, value = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255).tolist())
                wanted = colorsys.hsv_to_rgb((hue + turn) % 1, min(1, chroma * saturation), value)
                assert torch.allclose(got[:, y, x], 255 * torch.tensor(wanted), atol=1e-3)


def test_photometric_leaves_segments_and_often_the_picture() -> None:
    start = blocks()
    same = 0
    for seed in range(200):
        changed = run([Photometric()], start, seed)
        assert changed.ids is start.ids
        same += torch.equal(changed.image, start.image)
    assert 4 <= same <= 30, "nothing is changed with probability 1/16"
    assert torch.equal(run([Photometric(p=0.0)], start, 0).image, start.image)


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"contrast": 0.0, "saturation": 0.0, "hue": 0.0}, 100 - 32, 100 + 32),
        ({"brightness": 0.0, "saturation": 0.0, "hue": 0.0}, 50, 150),
    ],
    ids=["brightness", "contrast"],
)
def test_ranges(settings: dict[str, float], low: int, high: int) -> None:
    grey = sample(torch.zeros(2, 2, dtype=torch.int64))
    grey = replace(grey, image=torch.full((3, 2, 2), 100, dtype=torch.uint8))
    values = [run([Photometric(p=1.0, **settings)], grey, seed).image[0, 0, 0].item() for seed in range(300)]
    assert low <= min(values) < low + 5
    assert high - 5 < max(values) <= high


def test_values_are_cut_between_the_changes() -> None:
    white = replace(blocks(), image=torch.full((3, 60, 90), 250, dtype=torch.uint8))
    for seed in range(60):
        image = run([Photometric(p=1.0)], white, seed).image
        assert image.float().std() == 0, "grey stays grey, and nothing wraps around"
