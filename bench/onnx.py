"""onnxruntime beside eager PyTorch: `python -m bench.onnx`, saved with the hardware.

One canvas through the networks of SegViT-B, Mask2Former Swin-T (both with random weights) and the bundled model, in fp32 and in
int8. Needs two idle cores for figures that compare, 6 GiB, and some minutes for tracing; `--busy` takes processor time of one
thread instead. `--side` makes canvases smaller, to see that it works.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import Clock, as_json, hardware, inference, interleaved, options, settle
from maskfirst import build, recipe, weights
from maskfirst.engine import Card, OnnxRun
from maskfirst.export import to_int8, trace_masks, write_onnx
from maskfirst.files import write_json
from maskfirst.graphs import example, networks, settled
from maskfirst.ops.cpu import fast_on_cpu
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter

MODELS = {
    "segvit": ("segvit-vit-b-ade20k", 512),
    "mask2former": ("mask2former-swin-t-ade20k-semantic", 512),
    "bundled": ("camvid-small", 480),
}
"""Recipe, or bundled weights, and the side of its canvas, px."""


def model(name: str) -> tuple[Segmenter, Recipe]:
    """The bundled weights, or a recipe's model with random ones, the same at every call."""
    source = MODELS[name][0]
    if name == "bundled":
        return build.load(source), weights.read(source).recipe
    torch.manual_seed(0)
    found = recipe.load(source)
    return build.Experiment(found).segmenter(bare=True).eval(), found


def items(name: str, side: int, folder: Path) -> dict[str, Callable[[], object]]:
    """One canvas by PyTorch, by onnxruntime, and by that in int8."""
    segmenter, told = model(name)
    network, _ = networks(settled(segmenter))
    assert network is not None
    traced = trace_masks(network, (side, side))
    path, small = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    write_onnx(path, traced.program, network, Card(told, segmenter.vocabulary, traced.facts, False))
    small.write_bytes(path.read_bytes())
    to_int8(small)
    given = tuple(each[:1] for each in example(network, (side, side)))
    feed: dict[str, torch.Tensor] = dict(zip(network.inputs, given, strict=True))
    runs = {"fp32": OnnxRun(path), "int8": OnnxRun(small)}
    # As a Segmenter runs its networks.
    return {
        f"{name} {side} px, torch": inference(lambda: network(*given), fast_on_cpu),
        **{f"{name} {side} px, onnxruntime {key}": lambda run=run: run(feed) for key, run in runs.items()},
    }


def measure(names: Sequence[str], side: int | None, repeats: int, clock: Clock) -> dict[str, Any]:
    """All figures of some models, printed at the end."""
    found: dict[str, Any] = {"hardware": hardware(), "clock": clock.__name__, "timings": {}}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            timings = interleaved(items(name, side or MODELS[name][1], Path(folder)), repeats, clock)
        found["timings"] |= as_json(timings)
        for title, timing in timings.items():
            print(f"{title:<44}{timing.work:8.1f} T.P{timing.ms:9.1f} ms{timing.repeats:4d}")
    return found


def main() -> None:
    """Reads the command line."""
    parser = options(__doc__, 9)
    parser.add_argument("--only", nargs="+", choices=[*MODELS], default=[*MODELS], help="which models")
    parser.add_argument("--side", type=int, help="of canvases, px; a multiple of 32")
    arguments = parser.parse_args()
    clock = settle(arguments)
    found = measure(arguments.only, arguments.side, arguments.repeats, clock)
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
