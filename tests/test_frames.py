"""Frames: what is laid on a canvas comes back from it, whole or in windows, whatever the size."""

import pytest
import torch

from maskfirst.frames import Fit, Frame, resize


@pytest.mark.parametrize("original", [(40, 64), (37, 61), (64, 17)])
@pytest.mark.parametrize("fit", [Fit(), Fit(long=80, short=50), Fit(short=30, least=48), Fit(long=80, round_up=32)])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("flipped", [False, True])
def test_restore_undoes_apply(original: tuple[int, int], fit: Fit, multiple: int, flipped: bool) -> None:
    """A smooth picture, laid on the canvas and brought back, is the picture; the padding never bleeds in."""
    height, width = original
    image = torch.linspace(0, 200, height)[:, None] + torch.linspace(0, 55, width)[None]
    image = image.expand(3, -1, -1).contiguous()
    frame = Frame.fit(original, fit, multiple=multiple)
    frame = frame.flip() if flipped else frame
    canvas = frame.apply(image, (-1000.0, -1000.0, -1000.0))
    assert tuple(canvas.shape[-2:]) == frame.outer
    assert frame.outer[0] % multiple == 0
    assert frame.outer[1] % multiple == 0
    back = frame.restore(canvas)
    assert tuple(back.shape[-2:]) == original
    assert (back - image).abs().max() < 8.0
    if fit == Fit():
        torch.testing.assert_close(back, image)


def test_padding_is_the_fill() -> None:
    canvas = Frame.fit((3, 5), multiple=4).apply(torch.zeros(3, 3, 5), (1.0, 2.0, 3.0))
    assert canvas[:, 3, 0].tolist() == [1.0, 2.0, 3.0]
    assert canvas[:, 0, 7].tolist() == [1.0, 2.0, 3.0]
    assert canvas[:, :3, :5].abs().sum() == 0


def test_both_sides_are_rounded_up_after_the_limits() -> None:
    assert Fit(long=2048, short=512, round_up=32).size((512, 683)) == (512, 704)
    assert Fit(short=520, least=480, round_up=32).size((333, 500), 0.5) == (480, 736)
    assert Fit(round_up=32).size((64, 65)) == (64, 96)
    assert Fit(round_up=32).size((64, 65), 0.75) == (64, 64)
    with pytest.raises(ValueError, match="round_up: 0 must be at least 1"):
        Fit(round_up=0)


@pytest.mark.parametrize(
    ("inner", "rows", "columns"),
    [((40, 50), [0], [0]), ((64, 80), [0], [0, 16]), ((90, 30), [0, 26], [0]), ((20, 200), [0], [0, 43, 86, 129, 136])],
)
def test_windows_run_over_the_padding(inner: tuple[int, int], rows: list[int], columns: list[int]) -> None:
    view = Frame.fit(inner, pad=64)
    assert view.outer == (max(inner[0], 64), max(inner[1], 64))
    found = view.windows((64, 64), (43, 43), pad=64)
    assert [[window.origin for window in row] for row in found] == [[(y, x) for x in columns] for y in rows]
    assert {window.outer for row in found for window in row} == {(64, 64)}


def test_windows_of_padding_alone_are_left_out() -> None:
    found = Frame.fit((40, 100), pad=200).windows((64, 64), (43, 43), pad=200)
    assert [[window.origin for window in row] for row in found] == [[(0, 0), (0, 43), (0, 86)]]
    assert [window.visible for window in found[0]] == [(40, 64), (40, 57), (40, 14)]


@pytest.mark.parametrize("inner", [(70, 100), (64, 64), (40, 130), (30, 20)])
def test_windows_cover_every_pixel_and_end_at_the_border(inner: tuple[int, int]) -> None:
    view = Frame.fit(inner)
    rows = view.windows((64, 64), (43, 43), multiple=16)
    seen = torch.zeros(inner)
    for frame in (frame for row in rows for frame in row):
        (y, x), (height, width) = frame.origin, frame.visible
        seen[y : y + height, x : x + width] += 1
        assert y + height <= inner[0]
        assert x + width <= inner[1]
        assert frame.outer[0] % 16 == 0
        if inner[0] >= 64:
            assert frame.visible[0] == 64
    assert seen.min() >= 1


def test_a_window_cannot_be_restored_alone() -> None:
    window = Frame.fit((64, 128)).windows((64, 64), (32, 32))[0][1]
    with pytest.raises(ValueError, match="cannot be restored alone"):
        window.restore(torch.zeros(1, 4, 4))


def test_resize_leaves_the_same_size_alone() -> None:
    maps = torch.rand(2, 5, 6)
    assert resize(maps, (5, 6)) is maps
