"""EoMT-B at 640 px beside transformers' on the same weights: `python -m bench.eomt`, ratios of one run.

On DINOv2 and on DINOv3, one picture in fp32: predicting, and a training pass (forward and backward, masks everywhere) without
the losses, which are the criterion's. `--busy` takes processor time of one thread, for a machine that does other things;
`--device cuda` adds bf16 and torch.compile.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EomtConfig, EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

from bench.measure import Clock, Timing, as_json, hardware, interleaved
from maskfirst.build import Experiment
from maskfirst.convert import eomt
from maskfirst.convert.rename import rename
from maskfirst.files import write_json
from maskfirst.frames import Frame
from maskfirst.proposers.eomt import EoMT
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch

SIZES: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16, "num_upscale_blocks": 2,
    "num_blocks": 3, "num_queries": 200, "num_labels": 133, "num_register_tokens": 4,
}  # fmt: skip
TRUNKS = {"dinov2": "vit_base_patch14_reg4_dinov2", "dinov3": "vit_base_patch16_dinov3_qkvb"}
CLOSE = 1e-3
"""Largest difference of mask logits that may be rounding, at values of about 10."""


def theirs(family: str, side: int) -> Any:
    """The model of transformers with random weights, scales far from where they begin."""
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": side}
    if family == "dinov3":
        config = EomtDinov3Config(**sizes, intermediate_size=3072, layer_norm_eps=1e-5, pos_embed_rescale=None)
        model = EomtDinov3ForUniversalSegmentation(config)
    else:
        model = EomtForUniversalSegmentation(EomtConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda1" in name:
                parameter.uniform_(0.1, 0.3)
    return model


def ours(family: str, side: int, model: nn.Module) -> Segmenter:
    """Our model with those weights; it takes the same normalised pictures."""
    trunk = {"kind": "vit", "model": TRUNKS[family], "patch": 16, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    tree = {
        "size": [side, side],
        "vocabulary": [f"name {index}" for index in range(SIZES["num_labels"])],
        "proposer": {"kind": "eomt", "trunk": trunk, "queries": SIZES["num_queries"], "blocks": SIZES["num_blocks"]},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }
    segmenter = Experiment(Recipe(tree, "bench.yaml")).segmenter()
    state = model.state_dict()
    shapes = {key: tensor.shape for key, tensor in segmenter.state_dict().items()}
    segmenter.load_state_dict(rename(state, eomt.rules(state.keys()), shapes).tensors)
    return segmenter


def batch(side: int, device: str) -> Batch:
    """One normalised picture of noise."""
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    return Batch(pixels, ("panoptic",), (Frame((side, side), (side, side), (side, side)),), ("",))


def compare(
    family: str, side: int, device: str, clock: Clock, repeats: int, training: bool
) -> tuple[dict[str, Timing], float]:
    """Timings of both, and the largest difference of their masks."""
    model, given = theirs(family, side).to(device).eval(), batch(side, device)
    segmenter = ours(family, side, model).to(device).eval()
    model.attn_mask_probs.zero_()
    with torch.inference_mode():
        apart = (segmenter(given)[0].masks - model(given.pixels).masks_queries_logits).abs().max().item()
    items = {"ours": _predict(lambda: segmenter(given)), "transformers": _predict(lambda: model(given.pixels))}
    if device == "cuda":
        fast, other = torch.compile(segmenter), torch.compile(model)
        items |= {
            "ours, bf16": _predict(lambda: segmenter(given), bf16=True),
            "transformers, bf16": _predict(lambda: model(given.pixels), bf16=True),
            "ours, bf16, compiled": _predict(lambda: fast(given), bf16=True),
            "transformers, bf16, compiled": _predict(lambda: other(given.pixels), bf16=True),
        }
    timings = interleaved(items, repeats, clock)
    if training:
        segmenter.train()
        model.train()
        model.attn_mask_probs.fill_(1.0)
        proposer = segmenter.proposer
        if not isinstance(proposer, EoMT):
            raise TypeError("the recipe's proposer is EoMT")
        proposer.at(0.0)
        passes = {
            "ours, training": _step(segmenter, lambda: _last(segmenter, given)),
            "transformers, training": _step(model, lambda: model(given.pixels).masks_queries_logits),
        }
        timings |= interleaved(passes, max(1, repeats // 2), clock)
    return timings, apart


def _last(segmenter: Segmenter, given: Batch) -> Tensor:
    proposals, _ = segmenter(given)
    return proposals.masks


def _predict(run: Callable[[], object], bf16: bool = False) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return run()

    return call


def _step(model: nn.Module, masks: Callable[[], Tensor]) -> Callable[[], object]:
    def call() -> object:
        model.zero_grad()
        masks().square().mean().backward()

    return call


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Reads the command line, prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRUNKS, default=list(TRUNKS), help="which trunks")
    parser.add_argument("--side", type=int, default=640, help="of the picture, px")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="processor time of one thread")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--training", action="store_true", help="a training pass, too")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.busy else given.threads)
    clock = _synchronised if given.device == "cuda" else time.process_time if given.busy else time.perf_counter
    found: dict[str, Any] = {"hardware": hardware(), "side": given.side, "device": given.device}
    if given.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for family in given.only:
        timings, apart = compare(family, given.side, given.device, clock, given.repeats, given.training)
        ratios = {
            name: timing.ms / timings[name.replace("ours", "transformers")].ms
            for name, timing in timings.items()
            if name.startswith("ours")
        }
        for name, timing in timings.items():
            ratio = f"   ratio {ratios[name]:.3f}" if name in ratios else ""
            print(f"{family} {name:<30}{timing.ms:10.1f} ms{timing.work:10.1f} T.P{ratio}")
        print(f"{family} masks differ by {apart:.1e} at most")
        if given.device == "cpu" and apart > CLOSE:
            raise SystemExit(f"{family}: not the same model; masks differ by {apart:.1e}")
        found[family] = {"timings": as_json(timings), "ratios": ratios, "apart": apart}
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
