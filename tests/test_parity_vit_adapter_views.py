"""What compares ViT-Adapter's windows, views and padding, on made-up numbers: plain torch's windows on a small network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst.segmenter import Inference, Segmenter
from parity.rows import Row, Tolerance
from parity.vit_adapter_views import views
from test_segmenter import Blobs, blobs

CROP, STRIDE = (64, 96), (43, 64)


def averaged(head: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Scores of every window, enlarged to it, averaged where windows overlap."""
    height, width = image.shape[-2:]
    total, visits = torch.zeros(1, 4, height, width, dtype=image.dtype), torch.zeros(height, width, dtype=image.dtype)
    for top in range(0, max(height - CROP[0] + STRIDE[0] - 1, 0) // STRIDE[0] + 1):
        for left in range(0, max(width - CROP[1] + STRIDE[1] - 1, 0) // STRIDE[1] + 1):
            y, x = (
                max(min(k * s, n - c), 0) for k, s, n, c in zip((top, left), STRIDE, (height, width), CROP, strict=True)
            )
            window = image[..., y : y + CROP[0], x : x + CROP[1]]
            scores = F.interpolate(head(window), window.shape[-2:], mode="bilinear", align_corners=False)
            total[..., y : y + CROP[0], x : x + CROP[1]] += scores
            visits[y : y + CROP[0], x : x + CROP[1]] += 1
    return total / visits


def home(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


@pytest.fixture
def model() -> Segmenter:
    segmenter, _ = blobs(Inference(order="names_first"))
    return segmenter.double()


@pytest.fixture
def folder(model: Segmenter, tmp_path: Path) -> Path:
    """The two files as the original writes them."""
    proposer = model.proposer
    assert isinstance(proposer, Blobs)

    def head(pixels: Tensor) -> Tensor:
        masks = proposer.body(pixels / 100 - 1).sigmoid()
        names = model.namer.get_submodule("linear")(proposer.query).softmax(-1)[:, :-1]
        return torch.einsum("qk,bqhw->bkhw", names, masks)

    generator = torch.Generator().manual_seed(1)
    first, second, third = (
        300 * torch.rand(1, 3, *size, generator=generator).double() for size in ((96, 160), (64, 128), (64, 128))
    )
    third[:, :, 48:] = 0
    goal, small = (40, 52), (24, 50)
    with torch.no_grad():
        plain = home(averaged(head, first), goal)
        seen = [home(averaged(head, each), goal).softmax(1) for each in (first, second)]
        seen += [home(averaged(head, each.flip(-1)), goal).softmax(1).flip(-1) for each in (first, second)]
        unpadded = home(averaged(head, third)[..., :48, :], small).softmax(1)
    average = torch.stack(seen).mean(0)
    slide = {"img": first, "img2": second, "out/slide_rescaled": plain, "out/inference_prob": plain.softmax(1)}
    slide |= {"out/simple_pred": plain[0].argmax(0), "out/aug_mean_prob": average, "out/aug_pred": average[0].argmax(0)}
    unpad = {"img": third, "out/unpadded_prob": unpadded, "out/unpadded_prob_flip": unpadded.flip(-1)}
    np.savez(tmp_path / "slide.npz", **{key: value.numpy() for key, value in slide.items()})
    np.savez(tmp_path / "unpad.npz", **{key: value.numpy() for key, value in unpad.items()})
    told = {"crop_size": CROP, "stride": STRIDE}
    (tmp_path / "slide.json").write_text(json.dumps(told | {"ori_shape": goal}))
    sizes = {"ori_shape": small, "img_shape": (48, 128), "pad_shape": (64, 128)}
    (tmp_path / "unpad.json").write_text(json.dumps(told | sizes))
    return tmp_path


def failing(folder: Path, model: Segmenter, allowed: float = 1e-6) -> list[str]:
    rows: list[Row] = list(views(folder, model, Tolerance(atol=allowed)))
    assert len(rows) >= 5
    return [row.name for row in rows if not row.passed]


def test_our_windows_views_and_padding_are_plain_torch_s(folder: Path, model: Segmenter) -> None:
    assert failing(folder, model) == []
    assert failing(folder, model.float(), 1e-5) == []


def test_other_ways_of_reading_out_show(folder: Path, model: Segmenter) -> None:
    model.inference = replace(model.inference, order="masks_first")
    assert {"slide_rescaled", "inference_prob", "aug_mean_prob", "unpadded_prob"} <= set(failing(folder, model))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("slide", "slide_rescaled"),
        ("slide", "inference_prob"),
        ("slide", "simple_pred"),
        ("slide", "aug_mean_prob"),
        ("slide", "aug_pred"),
        ("unpad", "unpadded_prob"),
        ("unpad", "unpadded_prob_flip"),
    ],
)
def test_one_wrong_number_shows(folder: Path, model: Segmenter, file: str, key: str) -> None:
    with np.load(folder / f"{file}.npz") as archive:
        arrays = dict(archive)
    arrays[f"out/{key}"].flat[-1] += 1 if key.endswith("pred") else 1e-4
    np.savez(folder / f"{file}.npz", **arrays, other=np.zeros(1))
    assert failing(folder, model) == [key, "other"]
