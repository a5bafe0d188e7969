"""ViT-Adapter's answers from windows, mirrored views and padded pictures: `slide.*` and `unpad.*` of a variant's folder."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from maskfirst.frames import Frame, Size
from maskfirst.rows import Rows, mean, softmax
from maskfirst.segmenter import Segmenter

from .arrays import read_arrays
from .foreign import NotCoveredError
from .rows import EXACT, Row, Tolerance, compare, failed
from .tables import read_json

DOUBLE, SINGLE = Tolerance(atol=2e-6), Tolerance(atol=1e-5)
"""Of probabilities, by the precision of the model."""


def views(folder: Path, model: Segmenter, logits: Tolerance) -> Iterator[Row]:
    """All rows of the two files with a variant's model. `logits`: what is allowed of scores before their softmax.

    The pictures are normalised already, so the model must not do it: mean 0, std 1. Its own order of reading out counts.
    """
    yield from _slide(folder, model, logits)
    if (folder / "unpad.json").is_file():
        yield from _unpad(folder, model)


def _slide(folder: Path, model: Segmenter, logits: Tolerance) -> Iterator[Row]:
    told, arrays = read_json(folder / "slide.json"), _arrays(folder / "slide.npz", model)
    goal, windows = _size(told["ori_shape"]), (_size(told["crop_size"]), _size(told["stride"]))

    def view(key: str, flipped: bool = False) -> Rows:
        size = _size(arrays[key].shape[-2:])
        return _seen(model, arrays[key][0], Frame(goal, size, size, flipped=flipped), windows)

    plain = view("img")
    average = mean([softmax(view(key, flipped)) for key in ("img", "img2") for flipped in (False, True)])
    allowed = _allowed(arrays["img"])
    found = {
        "slide_rescaled": (plain, logits),
        "inference_prob": (softmax(plain), allowed),
        "simple_pred": (plain, EXACT),
        "aug_mean_prob": (average, allowed),
        "aug_pred": (average, EXACT),
    }
    for key, (rows, tolerance) in found.items():
        scores = rows.fetch(0, rows.height)
        ours = scores.argmax(0) if key.endswith("pred") else scores[None]
        yield compare("slide.npz", key, ours, arrays[f"out/{key}"], tolerance)
    yield from _rest("slide.npz", arrays, {"img", "img2", *(f"out/{key}" for key in found)})


def _unpad(folder: Path, model: Segmenter) -> Iterator[Row]:
    told, arrays = read_json(folder / "unpad.json"), _arrays(folder / "unpad.npz", model)
    goal, inner, outer = (_size(told[key]) for key in ("ori_shape", "img_shape", "pad_shape"))
    windows, pad = (_size(told["crop_size"]), _size(told["stride"])), min(outer)
    image = arrays["img"][0, :, : inner[0], : inner[1]]
    if arrays["img"].abs().sum() != image.abs().sum() or Frame.fit(inner, pad=pad).outer != outer:
        raise NotCoveredError(f"unpad.npz: {inner} padded to {outer} otherwise than with zeros")
    keys = {"unpadded_prob": False, "unpadded_prob_flip": True}
    for key, flipped in keys.items():
        # The tensor is taken for one that was mirrored, which here happens on the way in.
        given = image.flip(-1) if flipped else image
        rows = softmax(_seen(model, given, Frame(goal, inner, outer, flipped=flipped), windows, pad))
        scores = rows.fetch(0, rows.height)[None]
        yield compare("unpad.npz", key, scores, arrays[f"out/{key}"], _allowed(image))
    yield from _rest("unpad.npz", arrays, {"img", *(f"out/{key}" for key in keys)})


def _seen(model: Segmenter, image: Tensor, view: Frame, windows: tuple[Size, Size], pad: int = 0) -> Rows:
    before = model.inference
    model.inference = replace(before, window=windows[0], stride=windows[1], multiple=1, pad=pad)
    rows = model.view_scores(image, view)
    model.inference = before
    return rows


def _arrays(path: Path, model: Segmenter) -> dict[str, Tensor]:
    """The arrays of a file, the pictures in the model's precision."""
    precision = next(model.parameters()).dtype
    return {key: value.to(precision) if "img" in key else value for key, value in read_arrays(path).items()}


def _allowed(image: Tensor) -> Tolerance:
    return DOUBLE if image.element_size() == 8 else SINGLE


def _rest(file: str, arrays: dict[str, Tensor], seen: set[str]) -> Iterator[Row]:
    for key in sorted(arrays.keys() - seen):
        yield failed(file, key, "not covered")


def _size(sides: Iterable[int]) -> Size:
    height, width = sides
    return height, width
