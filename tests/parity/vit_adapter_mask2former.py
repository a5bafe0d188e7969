"""ViT-Adapter's Mask2Former: all that its head makes of a picture, and its losses with gradients."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskfirst import tasks
from maskfirst.convert.rename import Renamed
from maskfirst.criteria.matched import Matched
from maskfirst.criteria.points import uncertain
from maskfirst.frames import Frame, Size, resize
from maskfirst.proposers.mask2former import LEVELS, Mask2Former, may_see
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Batch, Segments

from .answers import Replay, Watched
from .arrays import Compared, read_arrays
from .foreign import NotCoveredError, Settings
from .rows import EXACT, Row, Tolerance, compare, equal, failed

LOSSES = Tolerance(atol=1e-6, rtol=1e-5)
GRADIENTS = Tolerance(rtol=1e-3)


def single(theirs: Tensor) -> Tolerance:
    """What single precision may differ by, which is relative to the largest number."""
    return Tolerance(atol=1e-4 * max(1.0, float(theirs.abs().max())))


def batch(pixels: Tensor, truth: tuple[Segments, ...] | None) -> Batch:
    """Pictures as they come, as canvases."""
    size = (pixels.shape[-2], pixels.shape[-1])
    frame = Frame(size, size, size)
    return Batch(pixels, ("semantic",) * len(pixels), (frame,) * len(pixels), ("",) * len(pixels), truth)


def nothing(pictures: int, size: Size) -> tuple[Segments, ...]:
    """Truth without a segment, with which earlier guesses are made."""
    empty = torch.zeros(0)
    return (Segments(torch.zeros(0, *size).bool(), empty.long(), empty, empty.bool()),) * pictures


def proposer_tree(
    config: Mapping[str, Any], training: Mapping[str, Any], backbone: dict[str, Any]
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """The recipes of the head of a mmseg config, on any backbone, and of its criterion, and the number of its classes."""
    told = Settings(config, "decode_head")
    told.only("type", "Mask2FormerHead")
    told.only("in_index", [0, 1, 2, 3])
    told.only("num_transformer_feat_level", LEVELS)
    told.only("enforce_decoder_input_project", False)
    told.need("in_channels")
    width = told.need("feat_channels")
    encoder, encoder_heads = _layers(told.need("pixel_decoder")["encoder"], ["self_attn", "norm", "ffn", "norm"])
    decoder, heads = _layers(
        told.need("transformer_decoder"), ["cross_attn", "norm", "self_attn", "norm", "ffn", "norm"]
    )
    if encoder_heads != heads:
        raise NotCoveredError(f"decode_head: {encoder_heads} and {heads} heads")
    told.only("positional_encoding", {"type": "SinePositionalEncoding", "num_feats": width // 2, "normalize": True})
    proposer = {
        "kind": "mask2former",
        "backbone": backbone,
        "queries": told.need("num_queries"),
        "width": width,
        "mask_width": told.need("out_channels"),
        "heads": heads,
        "encoder_layers": encoder["num_layers"],
        "encoder_feedforward": encoder["transformerlayers"]["ffn_cfgs"]["feedforward_channels"],
        "decoder_layers": decoder["num_layers"],
        "decoder_feedforward": decoder["transformerlayers"]["ffn_cfgs"]["feedforward_channels"],
        "points": encoder["transformerlayers"]["attn_cfgs"]["num_points"],
    }
    classes = told.need("num_things_classes") + told.need("num_stuff_classes")
    losses = {part: told.need(f"loss_{part}") for part in ("cls", "mask", "dice")}
    told.done()
    assigner = training["assigner"]
    criterion = {
        "kind": "set",
        "points": training["num_points"],
        "oversample": training["oversample_ratio"],
        "importance": training["importance_sample_ratio"],
        "name_weight": losses["cls"]["loss_weight"],
        "mask_weight": losses["mask"]["loss_weight"],
        "dice_weight": losses["dice"]["loss_weight"],
        "no_object": losses["cls"]["class_weight"][-1],
        "name_cost": assigner["cls_cost"]["weight"],
        "mask_cost": assigner["mask_cost"]["weight"],
        "dice_cost": assigner["dice_cost"]["weight"],
    }
    return proposer, classes, criterion


def _layers(config: Mapping[str, Any], order: list[str]) -> tuple[Mapping[str, Any], int]:
    """A stack of transformer layers and its number of heads."""
    layer = config["transformerlayers"]
    if layer["operation_order"] != order:
        raise NotCoveredError(f"decode_head: layers of {layer['operation_order']}")
    return config, layer["attn_cfgs"]["num_heads"]


def head(model: Segmenter, compared: Compared, picture: Tensor) -> Iterator[Row]:
    """What the pixel decoder and every layer of the decoder give, and the semantic scores."""
    proposer = model.proposer
    assert isinstance(proposer, Mask2Former)
    size = (picture.shape[-2], picture.shape[-1])
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, key=f"{key}{index}": seen.__setitem__(key, output))
        for key, layers in (("pixel_encoder_layer", proposer.pixel_decoder.layers), ("decoder_layer", proposer.layers))
        for index, layer in enumerate(layers)
    ]
    given = batch(picture, nothing(len(picture), size))
    with torch.no_grad():
        features, encoded = proposer.pixel_decoder(proposer.backbone(picture))
        proposals, names = model(given)
    for hook in hooks:
        hook.remove()
    yield _near(compared, "out/tap.pixel_decoder.0", features)
    for index, each in enumerate(encoded):
        yield _near(compared, f"out/tap.pixel_decoder.1.{index}", each)
    for key, output in seen.items():
        yield _near(compared, f"out/tap.{key}", output.transpose(0, 1))
    guesses = [*proposals.earlier, proposals]
    for index, guess in enumerate(guesses):
        with torch.no_grad():
            named = model.namer(guess, given).logits
        yield _near(compared, f"out/class_logits.{index}", named)
        yield _near(compared, f"out/mask_logits.{index}", guess.masks)
        # The original's are told before rows that are blocked whole are opened.
        blocked = compared.take(f"out/attn_mask.{index}").bool()
        level = encoded[index % LEVELS]
        shrunk = resize(features, (level.shape[-2], level.shape[-1])).flatten(2)
        with torch.no_grad():
            open_ = may_see(proposer.mask_embed(guess.queries), shrunk)[:, 0]
        yield compare(compared.file, f"attn_mask.{index}", ~open_, blocked & ~blocked.all(-1, keepdim=True), EXACT)
    for key, canvas in (("quarter", (proposals.masks.shape[-2], proposals.masks.shape[-1])), ("full", size)):
        scores = [tasks.read_out(proposals, names, image, canvas, "names_first") for image in range(len(picture))]
        yield _near(compared, f"out/semantic_{key}", torch.stack([rows.fetch(0, rows.height) for rows in scores]))


def _near(compared: Compared, key: str, ours: Tensor) -> Row:
    return (
        compared.row(key, ours, single(compared.left[key]))
        if key in compared.left
        else failed(compared.file, key, "missing")
    )


def losses(model: Segmenter, renamed: Renamed, picture: Tensor, folder: Path) -> Iterator[Row]:
    """Every case: costs, matches, points, losses and gradients, with the recorded random points."""
    told = json.loads((folder / "loss.json").read_text(encoding="utf-8"))
    compared = Compared("loss.npz", read_arrays(folder / "loss.npz"))
    for name, case in told["cases"].items():
        yield from _case(model, renamed, picture, compared, name, case)
    yield from compared.rest()


def _case(
    model: Segmenter, renamed: Renamed, picture: Tensor, compared: Compared, name: str, case: Mapping[str, Any]
) -> Iterator[Row]:
    labels = compared.take(f"{name}/gt_semantic_seg")
    truth = tuple(Segments.from_label_map(one.masked_fill(one == 255, VOID)) for one in labels)
    for image, segments in enumerate(truth):
        yield compared.row(f"{name}/gt_labels.{image}", segments.classes, EXACT)
    matching, assigned = (compared.take(f"{name}/{key}") for key in ("match_points", "assigned_gt"))
    drawn = {
        key: compared.take(f"{name}/{key}")
        for key in ("oversampled_points", "random_points", "final_points")
        if f"{name}/{key}" in compared.left
    }
    # The last guess is asked first here.
    stages = [len(matching) - 1, *range(len(matching) - 1)]
    criterion = model.criterion
    assert isinstance(criterion, Matched)
    points: list[Tensor] = []
    for stage in stages:
        points += [matching[stage, image][None] for image in range(len(truth))]
        points += [drawn[key][stage] for key in ("oversampled_points", "random_points") if key in drawn]
    replay, watched, ordinary = Replay(points), Watched(), (criterion.draw, criterion.assign)
    criterion.draw, criterion.assign = replay, watched
    model.zero_grad()
    found = model.losses(batch(picture, truth))
    total = torch.stack(list(found.values())).sum()
    total.backward()
    criterion.draw, criterion.assign = ordinary
    yield equal("loss.npz", f"{name}, recorded points that were not asked for", len(replay.recorded), 0)
    calls = {(stage, image): watched.seen.pop(0) for stage in stages for image in range(len(truth))}
    for (stage, image), (costs, (queries, segments)) in sorted(calls.items()):
        key = f"{name}/cost.layer{stage}.img{image}"
        if key in compared.left:
            theirs = compared.take(key).sum(0)
            yield compare("loss.npz", key, costs, theirs, single(theirs))
        ours = torch.full((assigned.shape[-1],), -1)
        ours[queries] = segments
        yield compare("loss.npz", f"{name}/assigned_gt, {stage}, {image}", ours, assigned[stage, image], EXACT)
    if "final_points" in drawn:
        yield from _points(model, picture, truth, calls, drawn, name, criterion)
    expected = dict(case["losses"])
    for key, value in found.items():
        part, _, stage = key.partition("_")
        foreign = f"decode.{f'd{stage}.' if stage else ''}loss_{'cls' if part == 'ce' else part}"
        yield compare("loss.json", f"{name}, {foreign}", value, expected.pop(foreign), LOSSES)
    yield equal("loss.json", f"{name}, losses that are not made", sorted(expected), [])
    yield compare("loss.json", f"{name}, total", total, case["total"], LOSSES)
    yield from _gradients(model, renamed, compared, case, name)


def _points(
    model: Segmenter,
    picture: Tensor,
    truth: tuple[Segments, ...],
    calls: Mapping[tuple[int, int], Any],
    drawn: Mapping[str, Tensor],
    name: str,
    criterion: Matched,
) -> Iterator[Row]:
    """Where the losses look: those least certain, in any order, and some at random."""
    with torch.no_grad():
        proposals, _ = model(batch(picture, truth))
    for stage, guess in enumerate((*proposals.earlier, proposals)):
        chosen = torch.cat([guess.masks[image][calls[stage, image][1][0]] for image in range(len(truth))])[:, None]
        draw = Replay([drawn[key][stage] for key in ("oversampled_points", "random_points")])
        ours = uncertain(chosen, criterion.points, criterion.oversample, criterion.importance, draw)
        theirs = drawn["final_points"][stage]
        yield compare("loss.npz", f"{name}/final_points, {stage}", _sorted(ours), _sorted(theirs), EXACT)


def _sorted(points: Tensor) -> Tensor:
    """The points of each mask by their x, which are all different."""
    return points.gather(1, points[..., :1].argsort(1).expand_as(points))


def _gradients(
    model: Segmenter, renamed: Renamed, compared: Compared, case: Mapping[str, Any], name: str
) -> Iterator[Row]:
    own = dict(model.named_parameters())
    for foreign, length in case["grad_l2"].items():
        parts = [_gradient(own[key]) for key in renamed.homes[foreign]]
        together = torch.cat([part.flatten() for part in parts]).double()
        # Those that the loss does not reach are exactly 0 there, and only nearly so in single precision.
        tiny = Tolerance(atol=1e-6, rtol=GRADIENTS.rtol)
        yield compare("loss.json", f"{name}, grad_l2 {foreign}", together.norm(), length, tiny)
        room = Tolerance(atol=1e-6 + GRADIENTS.rtol * length)
        yield compare("loss.json", f"{name}, grad_sum {foreign}", together.sum(), case["grad_sum"][foreign], room)
        key = f"grad/{foreign}"
        if name == "normal" and key in compared.left:
            theirs = compared.take(key)
            room = Tolerance(atol=GRADIENTS.rtol * float(theirs.abs().max()))
            yield compare("loss.npz", key, torch.cat(parts).view_as(theirs), theirs, room)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
