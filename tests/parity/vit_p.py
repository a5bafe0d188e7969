"""ViT-P: the original's point classifier on random weights, and how its names are mixed with those of a first stage."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst import tasks
from maskfirst.build import Experiment
from maskfirst.convert import vit_p
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename
from maskfirst.namers import points
from maskfirst.namers.blend import mixed
from maskfirst.namers.vit_p import ViTP
from maskfirst.recipe import Recipe
from maskfirst.types import Names, Proposals

from .arrays import Compared, read_arrays
from .foreign import Settings
from .rows import Row, Tolerance, compare, equal

DOUBLE = Tolerance(atol=1e-5)
SINGLE = Tolerance(atol=2e-5)
GLUE = Tolerance(atol=1e-5)
MODELS = {0: "vit_small_patch14_dinov2", 4: "vit_small_patch14_reg4_dinov2"}
"""By the number of registers; the other sizes are given."""
SMALLEST = 1e-8
"""What the original adds to probabilities before their logarithm."""


def is_variant(told: Mapping[str, Any]) -> bool:
    """Whether a JSON file describes a point classifier of the original's."""
    return {"num_points", "registers", "embed_dim"} <= told.keys()


def variant(folder: Path, path: Path) -> Iterator[Row]:
    """Logits and point tokens of a batch, in double and in single precision."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    tree = recipe_tree(told)
    compared = Compared(f"{path.stem}.npz", read_arrays(folder / f"{path.stem}.npz"))
    model = Experiment(Recipe(tree, path.name)).segmenter()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    tensors = open_checkpoint(folder / f"{path.stem}.safetensors").tensors
    model.load_state_dict(rename(tensors, vit_p.rules(tensors.keys()), shapes).tensors)
    namer = model.eval().namer
    assert isinstance(namer, ViTP)
    pixels = (compared.take("image_u4").double() - 7.5) / 4
    where, logits, tokens = (compared.take(key) for key in ("points", "logits", "point_tokens"))
    yield equal(path.name, "points", tuple(where.shape[:2]), (told.need("batch"), told.need("num_points")))
    seen: list[Tensor] = []
    hook = namer.head.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    with torch.inference_mode():
        for kind, tolerance in ((torch.float64, DOUBLE), (torch.float32, SINGLE)):
            found = namer.to(kind).classify(pixels.to(kind), where.to(kind))
            yield compare(compared.file, f"logits, {kind}", found, logits, tolerance)
            yield compare(compared.file, f"point_tokens, {kind}", seen[-1], tokens, tolerance)
    hook.remove()
    # Where the picture and the points come from, how near a tie is, and how far the original is from itself.
    for key in ("image", "points", "fp32_deviation", "logit_std"):
        told.take(key, None)
    told.done()
    yield from compared.rest()


def recipe_tree(told: Settings) -> dict[str, Any]:
    """The recipe of the same namer; it takes normalised pixels."""
    size = [told.need("height"), told.need("width")]
    trunk = {
        "kind": "vit",
        "model": MODELS[told.need("registers")],
        "patch": told.need("patch_size"),
        "width": told.need("embed_dim"),
        "depth": told.need("depth"),
        "heads": told.need("num_heads"),
        "size": [518, 518],
        "class_token": "absent",
        "interpolate_offset": 0.1,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    return {
        "size": size,
        "vocabulary": [f"class {index}" for index in range(told.need("num_classes"))],
        "proposer": {"kind": "oracle"},
        "namer": {"kind": "vit_p", "trunk": trunk, "size": size},
        "criterion": {"kind": "pixel"},
    }


def fusion(folder: Path, path: Path) -> Iterator[Row]:
    """The point of every mask, and both ways in which the names of two stages were mixed."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    alpha = told.need("alpha")
    for key in ("kind", "points_per_pass", "note"):
        told.take(key, None)
    told.done()
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    masks, first, matrix = (compared.take(key) for key in ("mask_logits", "class_logits", "second_stage_matrix"))
    size = (masks.shape[-2], masks.shape[-1])
    where = 2 * points.peaks(masks) / torch.tensor(size) - 1
    yield compared.row("points_yx", where, GLUE)
    yield compared.row("second_stage_logits", where @ matrix, GLUE)
    second = Names(F.pad(where @ matrix, (0, 1), value=float("-inf"))[None])
    proposals, stage = Proposals(masks[None]), Names(first[None])
    blended = {
        "oneformer": mixed(stage, second, alpha, "renormalised"),
        "mmseg": mixed(stage, second, alpha, "joint"),
    }
    theirs = (blended["oneformer"].logits[0].softmax(-1) + SMALLEST).log()
    yield compared.row("fused_logits_oneformer", theirs, GLUE)
    for name, names in blended.items():
        scores = tasks.read_out(proposals, names, 0, size).fetch(0, size[0])
        yield compared.row(f"semantic_{name}", scores, GLUE)
    yield from compared.rest()
