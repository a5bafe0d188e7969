"""Mask2Former: heads on given maps, in the original's and in mmseg's names; a whole one; a backbone; the operator."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskfirst import tasks
from maskfirst.backbones.deformable import DeformableAttention
from maskfirst.backbones.pyramid import Pyramid
from maskfirst.build import Experiment
from maskfirst.convert import mask2former, pyramids
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename
from maskfirst.frames import Frame, resize
from maskfirst.ops.deformable_attention import deformable_attention, deformable_attention_by_gather, to_places
from maskfirst.proposers.mask2former import LEVELS, Mask2Former, may_see
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch, Names, Proposals, Segments, Vocabulary

from .arrays import Compared, Given, given, read_arrays
from .foreign import Settings
from .rows import EXACT, Row, Tolerance, compare, equal

FEATURES = Tolerance(atol=3e-5)
MASKS = Tolerance(atol=3e-4)
SWIN = Tolerance(atol=2e-5)
SCORES = Tolerance(atol=1e-4)
PIXELS = Tolerance(atol=2e-3)
OPERATOR = {
    torch.float64: Tolerance(atol=1e-12, rtol=1e-12),
    torch.float32: Tolerance(atol=1e-5, rtol=1e-5),
}
"""Relative, too, as gradients reach 30."""


def segmenter(proposer: Mapping[str, Any], classes: int, weights: Mapping[str, Tensor], source: str) -> Segmenter:
    """The model of a recipe with foreign weights, whole or of a head alone, in evaluation."""
    tree = {
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {"kind": "mask2former", **proposer},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }
    model = Experiment(Recipe(tree, source)).segmenter()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, mask2former.rules(weights), shapes).tensors)
    return model.eval()


def _batch(model: Segmenter, height: int, width: int, pictures: int, truth: bool) -> Batch:
    frame = Frame((height, width), (height, width), (height, width))
    segments = None
    if truth:
        empty = torch.zeros(0)
        segments = (Segments(torch.zeros(0, height, width).bool(), empty.long(), empty, empty.bool()),) * pictures
    pixels = torch.zeros(pictures, 3, height, width)
    return Batch(pixels, ("panoptic",) * pictures, (frame,) * pictures, ("",) * pictures, segments)


def _head(folder: Path, proposer: dict[str, Any], classes: int, inputs: list[str]) -> Iterator[Row]:
    """All that a head makes of given maps, and the same by the shorter way of inference."""
    arrays = read_arrays(folder / "io.npz")
    compared = Compared("io.npz", arrays)
    weights = open_checkpoint(folder / "state.safetensors").tensors
    model = segmenter(proposer, classes, weights, "config.json")
    head = model.proposer
    assert isinstance(head, Mask2Former)
    assert isinstance(head.backbone, Given)
    head.backbone.maps = [compared.take(key) for key in inputs]
    pictures, _, height, width = head.backbone.maps[0].shape
    size = (height * head.stride, width * head.stride)
    with torch.inference_mode():
        features, encoded = head.pixel_decoder(head.backbone.maps)
        if "mask_features" in arrays:
            yield compared.row("mask_features", features, FEATURES)
        for index, each in enumerate(encoded):
            yield compared.row(f"ms_{index}", each, FEATURES)
        proposals, names = model(_batch(model, *size, pictures, truth=False))
        yield equal("io.npz", "guesses without truth", len(proposals.earlier), 0)
        yield compare("io.npz", "pred_masks, without truth", proposals.masks, arrays["pred_masks"], MASKS)
        yield compare("io.npz", "pred_logits, without truth", names.logits, arrays["pred_logits"], FEATURES)
        batch = _batch(model, *size, pictures, truth=True)
        proposals, names = model(batch)
        yield compared.row("pred_masks", proposals.masks, MASKS)
        yield compared.row("pred_logits", names.logits, FEATURES)
        yield equal("io.npz", "earlier guesses", len(proposals.earlier), len(head.layers))
        for index, guess in enumerate(proposals.earlier):
            yield compared.row(f"aux{index}_logits", model.namer(guess, batch).logits, FEATURES)
            if f"aux{index}_masks" in arrays:
                yield compared.row(f"aux{index}_masks", guess.masks, MASKS)
        for index, guess in enumerate((*proposals.earlier, proposals)):
            if f"attn_mask_{index}" in arrays:
                shrunk = resize(features, (encoded[index % LEVELS].shape[-2], encoded[index % LEVELS].shape[-1]))
                blocked = compared.take(f"attn_mask_{index}")
                opened = blocked & ~blocked.all(-1, keepdim=True)
                ours = ~may_see(head.mask_embed(guess.queries), shrunk.flatten(2))[:, 0]
                yield compare("io.npz", f"attn_mask_{index}", ours, opened, EXACT)
        if "semantic_lowres_0" in arrays:
            scores = tasks.read_out(proposals, names, 0, (height, width)).fetch(0, height)
            yield compared.row("semantic_lowres_0", scores[None], SCORES)
    yield from compared.rest()


def original_head(folder: Path, path: Path) -> Iterator[Row]:
    """The original's head alone."""
    told = _settings(path)
    levels = [told.need("in_channels"), told.need("strides")]
    told.only("pre_norm", False)
    told.only("enc_levels", LEVELS)
    proposer = {
        "backbone": given(*(list(level.values()) for level in levels)),
        "pixel_width": told.need("conv_dim"),
        "width": told.need("hidden_dim"),
        "mask_width": told.need("mask_dim"),
        "points": told.need("enc_points"),
        "heads": told.need("nheads"),
        **_common(told),
    }
    classes = told.need("num_classes")
    told.done()
    yield from _head(folder, proposer, classes, [f"in_{name}" for name in levels[0]])


def mmseg_head(folder: Path, path: Path) -> Iterator[Row]:
    """mmseg's head alone."""
    told = _settings(path)
    channels = told.need("in_channels")
    width = told.need("embed")
    proposer = {
        "backbone": given(channels, told.need("strides")),
        "width": width,
        "mask_width": width,
        "heads": told.need("heads"),
        **_common(told),
    }
    classes = told.need("num_classes")
    told.done()
    yield from _head(folder, proposer, classes, [f"in{index}" for index in range(len(channels))])


def _settings(path: Path) -> Settings:
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    # Where it comes from, and how near a tie its numbers are.
    for key in ("kind", "source", "sizes", "seed", "attn_mask", "note", "all_masked_rows"):
        told.take(key, None)
    for key in ("min_mask_logit_margin", "min_attn_mask_margin", "noise_under_1e6_relative_input_jitter"):
        told.take(key, None)
    return told


def _common(told: Settings) -> dict[str, Any]:
    return {
        "queries": told.need("num_queries"),
        "encoder_layers": told.need("enc_layers"),
        "encoder_feedforward": told.need("enc_ffn"),
        "decoder_layers": told.need("dec_layers"),
        "decoder_feedforward": told.need("dec_ffn"),
    }


def end_to_end(folder: Path, path: Path) -> Iterator[Row]:
    """A whole model on two pictures of other sizes, from its pixels to the answers of all three tasks."""
    told = _settings(path)
    swin = Settings(told.need("swin"), "swin")
    width = swin.need("embed_dim")
    swin.only("patch", 4)
    swin.only("mlp_ratio", 4.0)
    for key, value in (("qkv_bias", True), ("ape", False), ("patch_norm", True)):
        swin.only(key, value)
    backbone = {
        "kind": "pyramid",
        "widths": [width * 2**stage for stage in range(4)],
        "depths": swin.need("depths"),
        "heads": swin.need("num_heads"),
        "window": swin.need("window"),
        "mean": told.need("pixel_mean"),
        "std": told.need("pixel_std"),
    }
    swin.done()
    proposer = {
        "backbone": backbone,
        "pixel_width": told.need("conv_dim"),
        "width": told.need("hidden_dim"),
        "mask_width": told.need("mask_dim"),
        "heads": told.need("nheads"),
        **_common(told),
    }
    classes = told.need("num_classes")
    weights = open_checkpoint(folder / "state.safetensors").tensors
    model = segmenter(proposer, classes, weights, path.name)
    told.only("size_divisibility", model.proposer.multiple)
    things, stuff = told.need("things"), told.need("stuff")
    thresholds = tasks.Thresholds(told.need("object_mask_threshold"), told.need("overlap_threshold"), told.need("topk"))
    told.done()
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    count = sum(key.startswith("image") for key in compared.left)
    images = [compared.take(f"image{index}") for index in range(count)]
    homes = [tuple(compared.take(f"size{index}").tolist()) for index in range(count)]
    multiple = model.proposer.multiple
    outer = tuple(-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    inner = [(image.shape[1], image.shape[2]) for image in images]
    pixels = torch.stack(
        [Frame(size, size, outer).apply(image, model.proposer.mean) for size, image in zip(inner, images, strict=True)]
    )
    # Where each answer is wanted: its canvas shows the picture as it was given, which is another size than its own.
    frames = tuple(Frame(home, size, outer) for home, size in zip(homes, inner, strict=True))
    with torch.inference_mode():
        for index, tapped in enumerate(model.proposer.get_submodule("backbone")(pixels)):
            yield compared.row(f"feat_res{index + 2}", tapped, SWIN)
        proposals, names = model(Batch(pixels, ("panoptic",) * count, frames, ("",) * count))
    yield compared.row("pred_masks", proposals.masks, MASKS)
    yield compared.row("pred_logits", names.logits, FEATURES)
    vocabulary = Vocabulary(
        tuple(f"class {index}" for index in range(classes)),
        frozenset(things),
        ((0, 0, 0),) * classes,
        tuple(range(classes)),
    )
    yield equal(path.name, "things and stuff", sorted([*things, *stuff]), list(range(classes)))
    yield from _answers(compared, proposals, names, frames, vocabulary, thresholds)
    yield from compared.rest()


def _answers(
    compared: Compared,
    proposals: Proposals,
    names: Names,
    frames: Sequence[Frame],
    vocabulary: Vocabulary,
    thresholds: tasks.Thresholds,
) -> Iterator[Row]:
    """Where a logit is near a border a pixel may fall on either side of it."""
    file = compared.file
    for index, frame in enumerate(frames):
        scores = tasks.read_home(proposals, names, index, frame).fetch(0, frame.original[0])
        yield compared.row(f"sem_seg{index}", scores, SCORES)
        found = tasks.panoptic(proposals, names, index, vocabulary, frame, thresholds)
        info = [
            [number, name, int(name in vocabulary.things)]
            for number, name in enumerate(found.classes.tolist(), start=1)
        ]
        yield equal(file, f"pan{index}_info", info, compared.take(f"pan{index}_info").tolist())
        other = (found.ids + 1 != compared.take(f"pan{index}")).double().mean()
        yield compare(file, f"pan{index}, share of pixels that differ", other, 0.0, PIXELS)
        answer = tasks.instance(proposals, names, index, vocabulary, frame, thresholds)
        masks, classes, theirs = (compared.take(f"inst{index}_{key}") for key in ("masks", "classes", "scores"))
        order = theirs.argsort(descending=True, stable=True)
        yield compare(file, f"inst{index}_scores", answer.scores, theirs[order], SCORES)
        yield equal(file, f"inst{index}_classes", answer.classes.tolist(), classes[order].tolist())
        differ = (answer.masks != masks[order]).flatten(1).double().mean(1)
        yield compare(file, f"inst{index}_masks, share of pixels that differ", differ, differ * 0, PIXELS)


def convnext(folder: Path, path: Path) -> Iterator[Row]:
    """OneFormer's ConvNeXt with a norm on each map."""
    told = _settings(path)
    backbone = Pyramid(
        "convnext_tiny",
        widths=tuple(told.need("dims")),
        depths=tuple(told.need("depths")),
        norm_eps=told.need("ln_eps"),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    told.done()
    weights = open_checkpoint(folder / "state.safetensors").tensors
    shapes = {f"proposer.backbone.{key}": tensor.shape for key, tensor in backbone.state_dict().items()}
    renamed = rename(weights, pyramids.CONVNEXT.rules(), shapes).tensors
    backbone.load_state_dict({key.removeprefix("proposer.backbone."): tensor for key, tensor in renamed.items()})
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    with torch.inference_mode():
        maps = backbone.eval()(compared.take("image"))
    for index, tapped in enumerate(maps):
        yield compared.row(f"res{index + 2}", tapped, SWIN)
    yield from compared.rest()


def is_operator(told: Mapping[str, Any]) -> bool:
    """Whether a meta.json describes cases of deformable attention."""
    return bool(told) and all(isinstance(case, dict) and {"P", "n_points"} & case.keys() for case in told.values())


def operator(folder: Path, path: Path) -> Iterator[Row]:
    """Deformable attention alone, both ways of it, in both precisions, and with its projections around it."""
    for case, told in json.loads(path.read_text(encoding="utf-8")).items():
        arrays = read_arrays(folder / f"{case}.npz")
        yield from (
            _module(f"{case}.npz", arrays, told) if case.startswith("module") else _operator(f"{case}.npz", arrays)
        )


def _operator(file: str, arrays: dict[str, Tensor]) -> Iterator[Row]:
    compared = Compared(file, arrays)
    sizes = [(height, width) for height, width in compared.take("spatial_shapes").tolist()]
    starts = [sum(height * width for height, width in sizes[:level]) for level in range(len(sizes))]
    yield equal(file, "level_start_index", compared.take("level_start_index").tolist(), starts)
    given = [compared.take(key) for key in ("value", "sampling_locations", "attention_weights")]
    cotangent = compared.take("cotangent")
    # No gradient of the locations where they lie on kinks.
    told = {key: compared.take(key) for key in list(compared.left) if key == "output" or key.startswith("grad_")}
    for attention in (deformable_attention, deformable_attention_by_gather):
        for kind, tolerance in OPERATOR.items():
            leaves = [tensor.to(kind).requires_grad_() for tensor in given]
            output = attention(leaves[0], sizes, to_places(leaves[1], sizes), leaves[2])
            gradients = torch.autograd.grad(output, leaves, cotangent.to(kind))
            ours = dict(
                zip(
                    ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights"),
                    (output, *gradients),
                    strict=True,
                )
            )
            for key, theirs in told.items():
                name = f"{key}, {attention.__name__}, {str(kind).removeprefix('torch.')}"
                yield compare(file, name, ours[key], theirs, tolerance)
    yield from compared.rest()


def _module(file: str, arrays: dict[str, Tensor], told: Mapping[str, Any]) -> Iterator[Row]:
    """With the projections around it, with and without a padding mask; and how its offsets begin."""
    compared = Compared(file, arrays)
    heads, levels, points = told["n_heads"], told["n_levels"], told["n_points"]
    attention = DeformableAttention(told["d_model"], heads, levels, points, told["ratio"])
    begun = attention.offsets.bias
    yield compare(file, "init_sampling_offset_bias", begun, told["init_sampling_offset_bias"], Tolerance(atol=1e-6))
    sizes = [(height, width) for height, width in compared.take("spatial_shapes").tolist()]
    query, feat, reference = (compared.take(key) for key in ("query", "feat", "reference_points"))
    places = to_places(reference.expand(-1, -1, levels, -1)[..., None, :], sizes)[0, :, :, 0]
    weights = {f"w.{key[2:]}": compared.take(key) for key in arrays if key.startswith("w/")}
    shapes = {f"own.{key}": tensor.shape for key, tensor in attention.state_dict().items()}
    renamed = rename(weights, mask2former.deformable("w", "own"), shapes).tensors
    attention.double().load_state_dict({key.removeprefix("own."): tensor for key, tensor in renamed.items()})
    with torch.inference_mode():
        yield compared.row("output", attention(query, feat, sizes, places), OPERATOR[torch.float64])
        dropped = compared.take("padding_mask")[..., None]
        attention.value.register_forward_hook(lambda module, given, value: value.masked_fill(dropped, 0.0))
        yield compared.row("output_with_padding_mask", attention(query, feat, sizes, places), OPERATOR[torch.float64])
    yield from compared.rest()
