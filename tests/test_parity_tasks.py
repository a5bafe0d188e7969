"""Parity with Mask2Former's post-processing and criterion: the fixtures that recorded them hold, integers exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures_dir import FIXTURES
from maskfirst import tasks
from maskfirst.criteria.matched import Matched, Pairs, hungarian
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame
from maskfirst.rows import enlarge
from maskfirst.types import Names, Proposals, SegmentMap, Segments, Vocabulary

Size = tuple[int, int]
STAGES = ("final", "aux0", "aux1")
"""In the order in which the losses are made, and the random numbers drawn."""


class Inference:
    """The fixture `inference_m2f`: fixed logits, and what Mask2Former's three tasks make of them."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        with np.load(folder / "io.npz") as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.names = Names(self.tensor("class_logits")[None])
        self.size: Size = (self.config["H"], self.config["W"])

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def proposals(self, key: str = "mask_logits") -> Proposals:
        return Proposals(self.tensor(key)[None])

    def vocabulary(self, stuff: bool = True) -> Vocabulary:
        names = [str(index) for index in range(self.config["num_classes"])]
        return from_names(names, [names[index] for index in self.config["things"]] if stuff else names)

    @property
    def low(self) -> Frame:
        """How the picture of the `low_` entries was laid out."""
        padded, image, output = (tuple(self.config["low"][key]) for key in ("padded", "image", "output"))
        return Frame(output, image, padded)


def whole(size: Size) -> Frame:
    return Frame(size, size, size)


def assert_same_map(found: SegmentMap, ids: Tensor, info: Tensor, things: frozenset[int]) -> None:
    """`ids` count from 1, 0 for none; `info` has rows of id, class, whether it is a thing."""
    assert torch.equal(found.ids + 1, ids)
    assert info[:, 0].tolist() == list(range(1, len(found) + 1))
    assert info[:, 1].tolist() == found.classes.tolist()
    assert [bool(thing) for thing in info[:, 2]] == [index in things for index in found.classes.tolist()]


@pytest.fixture(scope="module")
def inference() -> Inference:
    assert FIXTURES is not None
    return Inference(FIXTURES / "proposals" / "inference_m2f")


if FIXTURES is not None:

    def test_semantic_scores(inference: Inference) -> None:
        for order in ("masks_first", "names_first"):
            rows = tasks.read_out(inference.proposals(), inference.names, 0, inference.size, order)
            torch.testing.assert_close(rows.fetch(0, rows.height), inference.tensor("semantic"), rtol=0, atol=1e-5)
        labels = tasks.semantic(rows, 7).label_map()
        assert torch.equal(labels, inference.tensor("semantic").argmax(0))

    @pytest.mark.parametrize("case", range(4))
    @pytest.mark.parametrize("strip", [1, 9, 64])
    def test_panoptic_maps(inference: Inference, case: int, strip: int) -> None:
        told = inference.config["panoptic"][case]
        thresholds = tasks.Thresholds(told["object_mask_threshold"], told["overlap_threshold"])
        vocabulary = inference.vocabulary()
        found = tasks.panoptic(
            inference.proposals(), inference.names, 0, vocabulary, whole(inference.size), thresholds, strip
        )
        assert len(found) == told["n"]
        key = told["key"]
        assert_same_map(found, inference.tensor(key), inference.tensor(f"{key}_info"), vocabulary.things)

    @pytest.mark.parametrize("case", range(3))
    def test_instances(inference: Inference, case: int) -> None:
        told = inference.config["instance"][case]
        vocabulary = inference.vocabulary(stuff=told["panoptic_on"])
        thresholds = tasks.Thresholds(instances=told["topk"])
        found = tasks.instance(
            inference.proposals(), inference.names, 0, vocabulary, whole(inference.size), thresholds, 13
        )
        packed = inference.arrays[f"{told['key']}_masks"]
        pixels = np.unpackbits(packed, axis=1)[:, : inference.size[0] * inference.size[1]].astype(bool)
        assert_same_instances(
            found,
            torch.from_numpy(pixels).unflatten(1, inference.size),
            inference.tensor(f"{told['key']}_classes"),
            inference.tensor(f"{told['key']}_scores"),
        )
        assert len(found) == told["n"]

    def test_the_way_home_of_a_padded_picture(inference: Inference) -> None:
        proposals, frame = inference.proposals("low_mask_logits"), inference.low
        rows = tasks.home(proposals, 0, frame)
        by_strips = torch.cat([rows.fetch(y, min(y + 5, rows.height)) for y in range(0, rows.height, 5)], 1)
        torch.testing.assert_close(by_strips, inference.tensor("low_post_logits"), rtol=0, atol=1e-5)
        scores = tasks.read_home(proposals, inference.names, 0, frame)
        torch.testing.assert_close(scores.fetch(0, scores.height), inference.tensor("low_semantic"), rtol=0, atol=1e-5)
        after = tasks.read_out(proposals, inference.names, 0, frame.outer)
        after = enlarge(tasks.crop(after, frame.visible), frame.original)
        torch.testing.assert_close(
            after.fetch(0, after.height), inference.tensor("low_semantic_then_resize"), rtol=0, atol=1e-5
        )
        vocabulary = inference.vocabulary()
        found = tasks.panoptic(proposals, inference.names, 0, vocabulary, frame)
        assert_same_map(found, inference.tensor("low_pan"), inference.tensor("low_pan_info"), vocabulary.things)

    @pytest.mark.parametrize("folder", ["criterion_m2f", "criterion_of"])
    def test_the_criterion(folder: str) -> None:
        assert FIXTURES is not None
        told, criterion, arrays = recorded_criterion(FIXTURES / "proposals" / folder)
        truth = [Segments(arrays[f"t{b}_masks"], *full_marks(arrays[f"t{b}_labels"])) for b in range(2)]
        total = torch.zeros(())
        leaves = {}
        for stage in STAGES:
            masks, logits = (arrays[f"{stage}_{part}"].requires_grad_() for part in ("masks", "logits"))
            leaves |= {f"{stage}_grad_masks": masks, f"{stage}_grad_logits": logits}
            losses = criterion(Proposals(masks), Names(logits), truth)
            suffix = stage.removeprefix("final").replace("aux", "_")
            for name, value in losses.items():
                weight = told["loss_weights"][f"loss_{name}"]
                torch.testing.assert_close(value / weight, arrays[f"out_loss_{name}{suffix}"], rtol=0, atol=1e-5)
            total = total + torch.stack(list(losses.values())).sum()
        assert not criterion.draw.recorded
        for (stage, b), (costs, pairs) in criterion.assign.seen.items():
            torch.testing.assert_close(costs, arrays[f"{stage}_cost_{b}"], rtol=0, atol=1e-5)
            assert torch.equal(torch.stack(pairs), arrays[f"{stage}_match_{b}"])
        shared = arrays["out_total"]
        if "out_loss_contrastive" in arrays:
            shared = shared - told["loss_weights"]["loss_contrastive"] * arrays["out_loss_contrastive"]
        torch.testing.assert_close(total, shared, rtol=0, atol=2e-5)
        total.backward()
        for key, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, arrays[key], rtol=0, atol=1e-6)


class Replay:
    """Hands out recorded points in their order, and checks that so many were asked for."""

    def __init__(self, recorded: list[Tensor]) -> None:
        self.recorded = recorded

    def __call__(self, masks: int, points: int, device: torch.device) -> Tensor:
        found = self.recorded.pop(0)
        assert found.shape == (masks, points, 2)
        return found


class Watched:
    """The assignment, with what it was given and what it gave by stage and picture."""

    def __init__(self) -> None:
        self.order = [(stage, b) for stage in STAGES for b in range(2)]
        self.seen: dict[tuple[str, int], tuple[Tensor, Pairs]] = {}

    def __call__(self, costs: Tensor) -> Pairs:
        found = hungarian(costs)
        self.seen[self.order[len(self.seen)]] = (costs, found)
        return found


def recorded_criterion(folder: Path) -> tuple[dict[str, Any], Matched, dict[str, Tensor]]:
    told = json.loads((folder / "config.json").read_text())
    with np.load(folder / "io.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    weights, cost = told["loss_weights"], told["cost"]
    criterion = Matched(
        from_names([str(index) for index in range(told["num_classes"])]),
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
    kinds = ("match_points_0", "match_points_1", "oversample_points", "random_points")
    criterion.draw = Replay([arrays[f"{stage}_{kind}"] for stage in STAGES for kind in kinds])
    criterion.assign = Watched()
    return told, criterion, arrays


def full_marks(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes, scores and crowd marks of truth."""
    return labels, torch.ones(len(labels)), torch.zeros(len(labels), dtype=torch.bool)


def assert_same_instances(found: Segments, masks: Tensor, classes: Tensor, scores: Tensor) -> None:
    """Those of equal scores, which have no order, may be swapped."""
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
    missing = set(range(len(classes)))
    for mask, index, score in zip(found.masks, found.classes, found.scores, strict=True):
        (same, *_) = [
            other
            for other in sorted(missing)
            if classes[other] == index and abs(scores[other] - score) < 1e-5 and torch.equal(masks[other], mask)
        ]
        missing.remove(same)
