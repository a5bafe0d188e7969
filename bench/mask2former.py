"""Mask2Former with Swin-T beside the original and beside transformers: `python -m bench.mask2former`, saved with the hardware.

Needs two idle cores for figures that compare, and about five minutes. `--busy` takes processor time of one thread instead. The
original's figures were measured in the same unit on a 2-core AMD EPYC with AVX-512, torch 2.13; transformers, where it is
installed, runs here, in the same process and with the same weights.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from bench.measure import (
    Check,
    Clock,
    Timing,
    as_json,
    by_groups,
    hardware,
    inference,
    interleaved,
    peak_memory,
    steps,
)
from bench.segvit import batch
from maskfirst import recipe
from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD
from maskfirst.build import Experiment
from maskfirst.convert import mask2former
from maskfirst.convert.rename import rename
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.proposers.mask2former import Mask2Former
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch

RECIPE = "mask2former-swin-t-ade20k-semantic"
OVERRIDES = ("proposer.backbone.pretrained=false", "train.precision=fp32")
ORIGINAL = {"backbone": 75.8, "pixel decoder": 195.2, "masked decoder": 44.6, "network": 316.0, "training step": 1833.1}
"""T.P of the original code."""
ORIGINAL_MIB = {"training step": 5421}
GROUPS = ("latency", "training")


def segmenter() -> Segmenter:
    """The model with random weights, the same at every call."""
    torch.manual_seed(0)
    return Experiment(recipe.load(RECIPE, OVERRIDES)).segmenter()


def given(images: int = 1, truth: bool = False) -> Batch:
    """Pictures of 512 px; the truth is ten squares of ten classes in each."""
    return batch(images, truth)


def peer(model: Segmenter) -> nn.Module:
    """transformers' model of the same shapes, whose weights `model` takes over by way of the converter."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    swin["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    settings: dict[str, Any] = {"num_labels": len(model.vocabulary), "num_queries": 100}
    config = Mask2FormerConfig(backbone_config=SwinConfig(**swin), **settings)
    theirs = Mask2FormerForUniversalSegmentation(config).eval()
    weights = theirs.state_dict()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, mask2former.rules(weights), shapes).tensors)
    return theirs


def latency(repeats: int, clock: Clock) -> tuple[dict[str, Timing], float | None]:
    """One picture of 512 px: the parts, the network, and transformers' network; and by how much the two differ."""
    model, seen = segmenter().eval(), given()
    theirs = peer(model) if find_spec("transformers") else None
    head = model.proposer
    assert isinstance(head, Mask2Former)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (seen.pixels - shift) / scale
    mask = torch.ones(1, *pixels.shape[-2:], dtype=torch.long)
    differ = None
    with torch.inference_mode():
        maps = head.backbone(seen.pixels)
        features, encoded = head.pixel_decoder(maps)
        if theirs is not None:
            masks = theirs(pixel_values=pixels, pixel_mask=mask).masks_queries_logits
            differ = (model(seen)[0].masks - masks).abs().max().item()
    items: dict[str, Callable[[], object]] = {
        "backbone": lambda: head.backbone(seen.pixels),
        "pixel decoder": lambda: head.pixel_decoder(maps),
        "masked decoder": lambda: head.decode(features, encoded, every=False),
        "network": lambda: model(seen),
    }
    # The parts alone as the network has them.
    items = {name: inference(run, fast_on_cpu) for name, run in items.items()}
    if theirs is not None:
        items["transformers"] = inference(lambda: theirs(pixel_values=pixels, pixel_mask=mask), nullcontext)
    return interleaved(items, repeats, clock), differ


def training_step() -> Callable[[], object]:
    """Forward, the losses of ten stages, backward and AdamW for two pictures of 512 px, drop-path on."""
    model, seen = segmenter().train(), given(2, truth=True)
    return steps(model, seen, Experiment(recipe.load(RECIPE, OVERRIDES)).training())


def measure(groups: Sequence[str], repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures of some groups, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "recipe": RECIPE, "clock": clock.__name__}
    timings: dict[str, Timing] = {}
    checks: list[Check] = []
    if "latency" in groups:
        timed, differ = latency(repeats, clock)
        timings |= timed
        checks += [
            Check("T.P of the network", timed["network"].work, 210),
            Check("T.P of the network, far goal", timed["network"].work, 185),
            Check("T.P of the pixel decoder", timed["pixel decoder"].work, 110),
            Check("T.P of the pixel decoder, far goal", timed["pixel decoder"].work, 85),
        ]
        if differ is None:
            found["transformers"] = "not installed"
        else:
            checks += [
                Check("network / transformers", timed["network"].work / timed["transformers"].work, 0.67),
                Check("mask logits differ from transformers'", differ, 1e-3),
            ]
    if "training" in groups:
        timings |= interleaved({"training step": training_step()}, max(1, min(repeats, 3)), clock)
        peak, base = peak_memory(training_step)
        found["memory"] = {"training step": {"peak_mib": round(peak), "base_mib": round(base)}}
        checks += [
            Check("T.P of a training step", timings["training step"].work, 1250),
            Check("peak MiB of a training step", peak, 4096),
        ]
    for name, timing in timings.items():
        beside = f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(f"{name:<18}{timing.work:8.1f} T.P{timing.ms:9.0f} ms{timing.repeats:4d}{beside}")
    for check in checks:
        print(check)
    found["timings"] = as_json(timings)
    found["original"] = {"work": ORIGINAL, "peak_mib": ORIGINAL_MIB}
    found["checks"] = [check.as_json() for check in checks]
    return found


def main() -> None:
    """Reads the command line."""
    by_groups(__doc__, 7, GROUPS, measure)


if __name__ == "__main__":
    main()
