"""OneFormer with Swin-T beside the original and beside transformers: `python -m bench.oneformer`, saved with the hardware.

One picture of 512 px, fp32, 150 queries, random weights, which transformers, in the same process, gets the same of. Needs two
idle cores for figures that compare, and about three minutes; `--busy` takes processor time of one thread instead. The
original's figures were measured in the same unit on a 2-core AMD EPYC with AVX-512, torch 2.13.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

from bench.measure import (
    Check,
    Clock,
    Timing,
    as_json,
    hardware,
    inference,
    interleaved,
    memory_as_json,
    options,
    peak_memory,
    settle,
)
from bench.segvit import batch
from maskfirst import recipe
from maskfirst.backbones.pixels import IMAGENET_MEAN, IMAGENET_STD
from maskfirst.build import Experiment
from maskfirst.convert import oneformer
from maskfirst.convert.rename import rename
from maskfirst.files import write_json
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.proposers.oneformer import OneFormer
from maskfirst.segmenter import Segmenter

RECIPE = "oneformer-swin-l-ade20k"
SWIN_T = "swin_tiny_patch4_window7_224"
QUERIES = 150
OVERRIDES = (
    f"proposer.backbone.model={SWIN_T}",
    "proposer.backbone.pretrained=false",
    f"proposer.queries={QUERIES}",
    "proposer.texts=null",
)
ORIGINAL = {"backbone": 73.6, "pixel decoder": 199.4, "network": 389.4}
"""T.P of the original code."""
ORIGINAL_MIB = {"network": 1109}
CLOSE = 1e-3
"""Largest difference of mask logits that may be rounding."""


def segmenter() -> Segmenter:
    """The model with random weights, the same at every call."""
    torch.manual_seed(0)
    return Experiment(recipe.load(RECIPE, OVERRIDES)).segmenter().eval()


def peer(model: Segmenter) -> nn.Module:
    """transformers' model of the same shapes, whose weights `model` takes over by way of the converter."""
    swin: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    swin["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    settings: dict[str, Any] = {"num_labels": len(model.vocabulary), "num_queries": QUERIES, "is_training": False}
    theirs = OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=SwinConfig(**swin), **settings)).eval()
    weights = theirs.state_dict()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, oneformer.rules(weights), shapes).tensors)
    return theirs


def network() -> Callable[[], object]:
    """One picture to mask logits."""
    model, seen = segmenter(), batch()
    return inference(lambda: model(seen))


def latency(repeats: int, clock: Clock) -> tuple[dict[str, Timing], float]:
    """The parts, the network, and transformers' network; and by how much the masks of the two differ at most."""
    model, seen = segmenter(), batch()
    theirs, head = peer(model), model.proposer
    assert isinstance(head, OneFormer)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (seen.pixels - shift) / scale
    told = head.task.rows[head.task.places(seen.tasks)]

    def their_masks() -> Tensor:
        found = theirs(pixel_values=pixels, task_inputs=told)
        return found.masks_queries_logits

    with torch.inference_mode():
        maps = head.backbone(seen.pixels)
        differ = (model(seen)[0].masks - their_masks()).abs().max().item()
    items: dict[str, Callable[[], object]] = {
        "backbone": lambda: head.backbone(seen.pixels),
        "pixel decoder": lambda: head.pixel_decoder(maps),
        "network": lambda: model(seen),
    }
    # The parts alone as the network has them.
    items = {name: inference(run, fast_on_cpu) for name, run in items.items()}
    items["transformers"] = inference(their_masks, nullcontext)
    return interleaved(items, repeats, clock), differ


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    arguments = options(__doc__, 7).parse_args()
    clock = settle(arguments)
    timings, differ = latency(arguments.repeats, clock)
    peak, base = peak_memory(network)
    checks = [
        Check("T.P of the network", timings["network"].work, 240),
        Check("times as fast as transformers", timings["transformers"].work / timings["network"].work, 1.5, most=False),
        Check("mask logits differ from transformers'", differ, CLOSE),
    ]
    for name, timing in timings.items():
        beside = f"{ORIGINAL[name]:10.1f}{timing.work / ORIGINAL[name]:7.2f}" if name in ORIGINAL else ""
        print(f"{name:<18}{timing.work:8.1f} T.P{timing.ms:9.0f} ms{timing.repeats:4d}{beside}")
    print(f"network {peak:.0f} MiB at most, {base:.0f} before")
    for check in checks:
        print(check)
    if arguments.out is not None:
        found = {
            "hardware": hardware(),
            "recipe": RECIPE,
            "overrides": OVERRIDES,
            "clock": clock.__name__,
            "timings": as_json(timings),
            "memory": memory_as_json({"network": (peak, base)}),
            "original": {"work": ORIGINAL, "peak_mib": ORIGINAL_MIB},
            "checks": [check.as_json() for check in checks],
        }
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
