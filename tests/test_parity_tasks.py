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
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame
from maskfirst.rows import enlarge
from maskfirst.types import Names, Proposals, SegmentMap, Segments, Vocabulary

Size = tuple[int, int]


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
