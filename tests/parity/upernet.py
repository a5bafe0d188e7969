"""UperNet: mmseg's head and its auxiliary one, on given maps; its losses, too, where a fixture has truth."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskfirst.build import Experiment
from maskfirst.convert import upernet
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename
from maskfirst.frames import Frame, resize
from maskfirst.proposers.upernet import UperNet
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Batch, Segments

from .arrays import Compared, Given, given, read_arrays
from .foreign import NotCoveredError, Settings
from .rows import Row, Tolerance, equal

STRIDES = [4, 8, 16, 32]
LOGITS = Tolerance(atol=1e-5)
HALF = Tolerance(atol=1e-5, rtol=2**-11)
"""Of what was stored in 16 bits."""
LOSSES = Tolerance(atol=2e-6)
SINGLE_LOSSES = Tolerance(rtol=1e-5)
ACCURACY = Tolerance(atol=1e-4)
"""Per cent; mmseg counts in 32 bits."""
IGNORED = 255


def head(folder: Path, path: Path) -> Iterator[Row]:
    """Both heads on given maps, and the probabilities of the first picture."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    for key in ("kind", "source"):
        told.take(key, None)
    tree = _tree(
        told.need("num_classes"),
        {
            "backbone": given(told.need("in_channels"), STRIDES),
            "width": told.need("channels"),
            "auxiliary_width": told.need("fcn_channels"),
            "auxiliary_tap": told.need("fcn_in_index"),
        },
    )
    told.done()
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    maps = [compared.take(f"in{index}") for index in range(len(STRIDES))]
    model = _filled(tree, open_checkpoint(folder / "state.safetensors").tensors, path.name, maps)
    pictures, size = len(maps[0]), (STRIDES[0] * maps[0].shape[-2], STRIDES[0] * maps[0].shape[-1])
    void = torch.full((pictures, *size), IGNORED)
    with torch.inference_mode():
        proposals, _ = model(batch(torch.zeros(pictures, 3, *size), void))
    yield compared.row("out", proposals.masks, LOGITS)
    yield compared.row("aux_out", proposals.earlier[0].masks, LOGITS)
    yield compared.row("probs", resize(proposals.masks[:1], size).softmax(1), HALF)
    yield from compared.rest()


def on_pyramid(folder: Path, kind: torch.dtype) -> Iterator[Row]:
    """What both heads of a fixture of ViT-Adapter's make of the pyramid that it recorded, computed in `kind`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    arrays = read_arrays(folder / "io.npz")
    maps = [arrays[f"out/pyramid.{index}"].to(kind) for index in range(len(STRIDES))]
    proposer, classes = proposer_tree(config, given([each.shape[1] for each in maps], STRIDES))
    weights = open_checkpoint(folder / "model.safetensors").tensors
    heads = {key: tensor for key, tensor in weights.items() if not key.startswith("backbone.")}
    model = _filled(_tree(classes, proposer), heads, "config.json", maps).to(kind)
    wanted = ("out/decode_logits", "out/aux_logits", "out/full_logits", "out/loss.", "gt_semantic_seg")
    compared = Compared("io.npz", {key: tensor for key, tensor in arrays.items() if key.startswith(wanted)})
    labels = compared.take("gt_semantic_seg")[:, 0]
    yield from outputs(compared, model, batch(arrays["img"].to(kind), labels))
    yield from compared.rest()


def outputs(compared: Compared, model: Segmenter, seen: Batch) -> Iterator[Row]:
    """The logits and losses of any Segmenter of `upernet` on a batch with truth, in the precision of its pixels."""
    single = seen.pixels.dtype == torch.float32
    with torch.inference_mode():
        proposals, _ = model(seen)
        losses = model.losses(seen)
    yield equal(compared.file, "earlier guesses", len(proposals.earlier), 1)
    truth = torch.stack([segments.label_map() for segments in seen.truth or ()])
    heads = {"decode": ("ce", proposals.masks), "aux": ("ce_0", proposals.earlier[0].masks)}
    for name, (loss, masks) in heads.items():
        yield compared.row(f"out/{name}_logits", masks, _logits(compared, f"out/{name}_logits", single))
        key = f"out/loss.{name}."
        yield compared.row(f"{key}loss_ce", losses[loss], SINGLE_LOSSES if single else LOSSES)
        right = resize(masks, (truth.shape[-2], truth.shape[-1])).argmax(1) == truth
        yield compared.row(f"{key}acc_seg", 100 * right.double().mean(), ACCURACY)
    full = resize(proposals.masks, (seen.pixels.shape[-2], seen.pixels.shape[-1]))
    yield compared.row("out/full_logits", full, _logits(compared, "out/full_logits", single))


def _logits(compared: Compared, key: str, single: bool) -> Tolerance:
    """Larger numbers are less exact in 32 bits."""
    if not single or key not in compared.left:
        return LOGITS
    return Tolerance(atol=1e-4 * max(1.0, float(compared.left[key].abs().max())))


def proposer_tree(config: Mapping[str, Any], backbone: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The recipe of the heads of a mmseg config, on any backbone, and the number of its classes."""
    decode = Settings(config["decode_head"], "decode_head")
    auxiliary = Settings(config["auxiliary_head"], "auxiliary_head")
    classes = decode.need("num_classes")
    decode.only("type", "UPerHead")
    decode.only("in_index", [0, 1, 2, 3])
    auxiliary.only("type", "FCNHead")
    auxiliary.only("num_classes", classes)
    auxiliary.only("num_convs", 1)
    auxiliary.only("concat_input", False)
    proposer = {
        "kind": "upernet",
        "backbone": backbone,
        "width": decode.need("channels"),
        "pools": decode.need("pool_scales"),
        "dropout": decode.need("dropout_ratio"),
        "auxiliary_width": auxiliary.need("channels"),
        "auxiliary_tap": auxiliary.need("in_index"),
    }
    auxiliary.only("dropout_ratio", proposer["dropout"])
    for part in (decode, auxiliary):
        loss = Settings(part.need("loss_decode"), f"{part.place}.loss_decode")
        loss.only("type", "CrossEntropyLoss")
        loss.only("use_sigmoid", False)
        weight = loss.need("loss_weight")
        loss.done()
        if part is auxiliary:
            proposer["auxiliary_weight"] = weight
        elif weight != 1.0:
            raise NotCoveredError(f"decode_head.loss_decode.loss_weight: {weight}, not 1")
        part.only("align_corners", False)
        part.only("norm_cfg", {"type": "SyncBN", "requires_grad": True})
        part.need("in_channels")
        part.done()
    return proposer, classes


def batch(pixels: Tensor, labels: Tensor) -> Batch:
    """A batch of whole canvases under label maps (B, H, W), 255 being no class."""
    pictures, size = len(pixels), (pixels.shape[-2], pixels.shape[-1])
    truth = tuple(Segments.from_label_map(each.masked_fill(each == IGNORED, VOID)) for each in labels)
    frame = Frame(size, size, size)
    return Batch(pixels, ("semantic",) * pictures, (frame,) * pictures, ("",) * pictures, truth)


def _tree(classes: int, proposer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {"kind": "upernet", **proposer},
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel", "average": "all"},
    }


def _filled(tree: dict[str, Any], weights: Mapping[str, Tensor], source: str, maps: list[Tensor]) -> Segmenter:
    """The heads alone with foreign weights, in evaluation, on given maps."""
    model = Experiment(Recipe(tree, source)).segmenter()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, upernet.rules(), shapes).tensors)
    assert isinstance(model.proposer, UperNet)
    assert isinstance(model.proposer.backbone, Given)
    model.proposer.backbone.maps = maps
    return model.eval()
