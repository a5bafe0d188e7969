"""Answers and losses of given logits: Mask2Former's post-processing for its three tasks, and its matcher and criterion."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskfirst import tasks
from maskfirst.criteria.contrastive import contrastive
from maskfirst.criteria.matched import Matched, Pairs, hungarian
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame, Size
from maskfirst.rows import Rows, crop, enlarge
from maskfirst.types import Names, Proposals, SegmentMap, Segments, Vocabulary

from .arrays import Compared, read_arrays
from .foreign import NotCoveredError, Settings
from .rows import EXACT, Row, Tolerance, compare, equal

CLOSE = Tolerance(atol=1e-5)
TOTAL = Tolerance(atol=2e-5)
GRADIENT = Tolerance(atol=1e-6)
STRIPS = (1, 9, 64)
"""Rows of the answer made at a time, which must not show in it."""


def post_processing(folder: Path, path: Path) -> Iterator[Row]:
    """The three tasks from fixed logits, and the way of a padded picture home."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    if told.take("source", "Mask2Former") == "OneFormer":
        yield from _other_instances(folder, told)
        return
    for key in (
        "kind",
        "inst_order",
        "packed",
        "min_mask_margin",
        "min_argmax_gap_at_0.8",
        "scores",
        "labels",
        "hf_pan0",
    ):
        told.take(key, None)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    classes, size = told.need("num_classes"), (told.need("H"), told.need("W"))
    vocabulary = _vocabulary(classes, told.need("things"))
    yield equal(path.name, "things and stuff", sorted([*vocabulary.things, *told.need("stuff")]), [*range(classes)])
    names = Names(compared.take("class_logits")[None])
    proposals, frame = Proposals(compared.take("mask_logits")[None]), Frame(size, size, size)
    theirs = compared.take("semantic")
    for order in ("masks_first", "names_first"):
        rows = tasks.read_out(proposals, names, 0, size, order)
        yield compare("io.npz", f"semantic, {order}", rows.fetch(0, rows.height), theirs, CLOSE)
        labels = tasks.semantic(rows, 7).label_map()
        yield compare("io.npz", f"semantic, {order}, classes", labels, theirs.argmax(0), EXACT)
    for case in told.need("panoptic"):
        thresholds = tasks.Thresholds(case["object_mask_threshold"], case["overlap_threshold"])
        ids, info = (compared.take(f"{case['key']}{rest}") for rest in ("", "_info"))
        for strip in STRIPS:
            found = tasks.panoptic(proposals, names, 0, vocabulary, frame, thresholds, strip)
            yield equal("io.npz", f"{case['key']}, segments", len(found), case["n"])
            yield from _same_map(f"{case['key']}, {strip} rows at a time", found, ids, info, vocabulary)
    for case in told.need("instance"):
        # Without the panoptic switch every class counts as a thing.
        things = vocabulary if case["panoptic_on"] else _vocabulary(classes, range(classes))
        given = (names, 0, things, frame, tasks.Thresholds(instances=case["topk"]), 13)
        yield from _instances(case["key"], tasks.instance(proposals, *given), compared, size)
    low = Settings(told.need("low"), "low")
    padded, image, output = (tuple(low.need(key)) for key in ("padded", "image", "output"))
    low.done()
    told.done()
    yield from _way_home(compared, names, vocabulary, Frame(output, image, padded))
    # What transformers makes of the same logits, which the fixture's readme says is no target.
    for key in ("hf_pan0", "hf_pan0_info"):
        compared.left.pop(key, None)
    yield from compared.rest()


def _other_instances(folder: Path, told: Settings) -> Iterator[Row]:
    """In what OneFormer's instances differ: classes counted among things on ADE20K, and unsure ones left out of a demo."""
    alike = read_arrays(folder.parent / "inference_m2f" / "io.npz")
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    size, classes = (told.need("H"), told.need("W")), told.need("num_classes")
    names, proposals = Names(alike["class_logits"][None]), Proposals(alike["mask_logits"][None])
    frame, most = Frame(size, size, size), told.need("instance")[0]["topk"]
    sure = told.need("panoptic")[0]["object_mask_threshold"]
    things = told.need("ade_instance")["thing_indices"]
    found = tasks.instance(proposals, names, 0, _vocabulary(classes, things), frame, tasks.Thresholds(instances=most))
    yield compared.row("inst_ade_scores", found.scores, CLOSE)
    places = [things.index(index) for index in found.classes.tolist()]
    yield equal("io.npz", "inst_ade_classes", places, compared.take("inst_ade_classes").tolist())
    known = _vocabulary(classes, told.need("things"))
    found = tasks.instance(proposals, names, 0, known, frame, tasks.Thresholds(instances=most, least=sure))
    yield compared.row("inst_demo_scores", found.scores, CLOSE)
    yield equal("io.npz", "inst_demo_classes", found.classes.tolist(), compared.take("inst_demo_classes").tolist())
    yield from compared.rest()


def _vocabulary(classes: int, things: Any) -> Vocabulary:
    names = [str(index) for index in range(classes)]
    return from_names(names, [names[index] for index in things])


def _same_map(name: str, found: SegmentMap, ids: Tensor, info: Tensor, vocabulary: Vocabulary) -> Iterator[Row]:
    """`ids` count from 1, 0 for none; `info` has rows of id, class, whether it is a thing."""
    yield compare("io.npz", name, found.ids + 1, ids, EXACT)
    own = [[number, one, int(one in vocabulary.things)] for number, one in enumerate(found.classes.tolist(), 1)]
    yield equal("io.npz", f"{name}, info", own, info.tolist())


def _instances(key: str, found: Segments, compared: Compared, size: Size) -> Iterator[Row]:
    """Those of equal scores, which have no order, may be swapped."""
    packed, scores, classes = (compared.take(f"{key}_{part}") for part in ("masks", "scores", "classes"))
    pixels = np.unpackbits(packed.numpy(), axis=1)[:, : size[0] * size[1]].astype(bool)
    masks = torch.from_numpy(pixels).unflatten(1, size)
    yield compare("io.npz", f"{key}_scores", found.scores, scores, CLOSE)
    missing, strange = list(range(len(classes))), 0
    for mask, index, score in zip(found.masks, found.classes, found.scores, strict=True):
        same = [
            other
            for other in missing
            if classes[other] == index and abs(scores[other] - score) < 1e-5 and torch.equal(masks[other], mask)
        ]
        if same:
            missing.remove(same[0])
        else:
            strange += 1
    yield equal("io.npz", f"{key}, instances that only one side has", (strange, len(missing)), (0, 0))


def _way_home(compared: Compared, names: Names, vocabulary: Vocabulary, frame: Frame) -> Iterator[Row]:
    proposals = Proposals(compared.take("low_mask_logits")[None])
    yield compared.row("low_post_logits", _by_strips(tasks.home(proposals, 0, frame)), CLOSE)
    yield compared.row("low_semantic", _by_strips(tasks.read_home(proposals, names, 0, frame)), CLOSE)
    after = crop(tasks.read_out(proposals, names, 0, frame.outer), frame.visible)
    yield compared.row("low_semantic_then_resize", _by_strips(enlarge(after, frame.original)), CLOSE)
    found = tasks.panoptic(proposals, names, 0, vocabulary, frame)
    yield from _same_map("low_pan", found, compared.take("low_pan"), compared.take("low_pan_info"), vocabulary)


def _by_strips(rows: Rows, strip: int = 5) -> Tensor:
    return torch.cat([rows.fetch(y, min(y + strip, rows.height)) for y in range(0, rows.height, strip)], 1)


class Replay:
    """Hands out recorded points in their order; refuses where another number is asked for."""

    def __init__(self, recorded: list[Tensor]) -> None:
        self.recorded = recorded

    def __call__(self, masks: int, points: int, device: torch.device) -> Tensor:
        found = self.recorded.pop(0)
        if found.shape != (masks, points, 2):
            raise NotCoveredError(f"{masks} x {points} points were asked for, and {list(found.shape)} were recorded")
        return found


class Watched:
    """The assignment, with what it was given and what it gave, one call after another."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Pairs]] = []

    def __call__(self, costs: Tensor) -> Pairs:
        found = hungarian(costs)
        self.seen.append((costs, found))
        return found


def criterion(folder: Path, path: Path) -> Iterator[Row]:
    """Costs, matches, losses and gradients of all stages, with the recorded random points."""
    told = json.loads(path.read_text(encoding="utf-8"))
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    weights, cost = told["loss_weights"], told["cost"]
    loss = Matched(
        _vocabulary(told["num_classes"], ()),
        told["num_points"],
        told["oversample_ratio"],
        told["importance_sample_ratio"],
        weights["loss_ce"],
        weights["loss_mask"],
        weights["loss_dice"],
        told["eos_coef"],
        cost["cls"],
        cost["mask"],
        cost["dice"],
    )
    truth = []
    while f"t{len(truth)}_labels" in compared.left:
        labels, masks = (compared.take(f"t{len(truth)}_{part}") for part in ("labels", "masks"))
        truth.append(Segments(masks, labels, torch.ones(len(labels)), torch.zeros_like(labels, dtype=torch.bool)))
    # In the order in which the losses are made, and the random numbers drawn.
    stages = ["final", *sorted({key.partition("_")[0] for key in compared.left if key.startswith("aux")})]
    kinds = [*(f"match_points_{image}" for image in range(len(truth))), "oversample_points", "random_points"]
    draw, watched = Replay([compared.take(f"{stage}_{kind}") for stage in stages for kind in kinds]), Watched()
    loss.draw, loss.assign = draw, watched
    total, leaves = torch.zeros(()), {}
    for stage in stages:
        masks, logits = (compared.take(f"{stage}_{part}").requires_grad_() for part in ("masks", "logits"))
        leaves |= {f"{stage}_grad_masks": masks, f"{stage}_grad_logits": logits}
        losses = loss(Proposals(masks), Names(logits), truth)
        suffix = stage.removeprefix("final").replace("aux", "_")
        for name, value in losses.items():
            yield compared.row(f"out_loss_{name}{suffix}", value / weights[f"loss_{name}{suffix}"], CLOSE)
        total = total + torch.stack(list(losses.values())).sum()
    yield equal("io.npz", "recorded points that were not asked for", len(draw.recorded), 0)
    places = [(stage, image) for stage in stages for image in range(len(truth))]
    for (stage, image), (costs, pairs) in zip(places, watched.seen, strict=True):
        yield compared.row(f"{stage}_cost_{image}", costs, CLOSE)
        yield compared.row(f"{stage}_match_{image}", torch.stack(pairs), EXACT)
    if "out_loss_contrastive" in compared.left:
        # OneFormer's total has a term more, of texts.
        texts = contrastive(*(compared.take(key) for key in ("contrastive_logits", "texts", "logit_scale")))
        yield compared.row("out_loss_contrastive", texts, CLOSE)
        total = total + weights["loss_contrastive"] * texts
    yield compared.row("out_total", total, TOTAL)
    total.backward()
    for key, leaf in leaves.items():
        yield compared.row(key, leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), GRADIENT)
    yield from compared.rest()
