"""Cost: multiply-adds of the operators that run, as the originals were counted, and memory as autograd really keeps it."""

import json
from typing import Any

import pytest
import torch

from fixtures_dir import FIXTURES
from maskfirst.backbones.vit import ShrunkTaps, Taps, TimmViT
from maskfirst.cost import cost, multiply_adds, parameters_by_part, saved_bytes, training_memory
from maskfirst.criteria.fixed import Fixed
from maskfirst.criteria.matched import Matched, hungarian
from maskfirst.frames import Frame
from maskfirst.namers.class_head import ClassHead
from maskfirst.proposers.atm import ATM, ShrunkATM
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.types import Batch, Segments, Vocabulary

CLASSES = {"ade20k": 150, "cocostuff10k": 171, "pascalcontext60": 60, "pascalcontext59": 59}


def model(
    size: int, classes: int, trunk: dict[str, Any], depths: tuple[int, ...], head: int, shrink: int | None = None
):
    """A SegViT of any size; `head`: its width."""
    vocabulary = Vocabulary(tuple(map(str, range(classes))), frozenset(), ((0, 0, 0),) * classes, tuple(range(classes)))
    vit = TimmViT((size, size), final_norm=False, **trunk)
    if shrink is None:
        proposer = ATM(Taps(vit, depths), vocabulary, (size, size), head, head // 32)
    else:
        proposer = ShrunkATM(ShrunkTaps(vit, depths, shrink), vocabulary, (size, size), head, head // 32)
    return Segmenter(proposer, ClassHead(vocabulary, head), Fixed(vocabulary), vocabulary, Inference())


def published(name: str, depth: int | None = None) -> Segmenter:
    """One of the models whose cost is published, without weights: `vit-l_shrunk_ade20k_640` and the like."""
    *kind, data, size = name.split("_")
    large = kind[0] == "vit-l"
    trunk = {"model": f"vit_{'large' if large else 'base'}_patch16_384", "depth": depth}
    depths = (7, 15, 23) if large else (5, 7, 11)
    with torch.device("meta"):
        if "shrunk" in kind:
            return model(int(size), CLASSES[data], trunk, (7, 23), 512, shrink=8)
        return model(int(size), CLASSES[data], trunk, depths, 512 if large else 384)


def tiny(shrink: int | None = None) -> Segmenter:
    torch.manual_seed(0)
    trunk = {"model": "vit_tiny_patch16_224", "width": 48, "depth": 4, "heads": 4, "drop_path": 0.1}
    return model(64, 7, trunk, (1, 3), 32, shrink)


def closed_form(width: int, depth: int, head: int, classes: int, size: int) -> int:
    """SegViT's multiply-adds, counted by hand."""
    tokens, pixels = (size // 16) ** 2, size**2
    vit = 768 * tokens * width + depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 10 * tokens * width)
    atm = 14 * classes * head**2 + 2 * classes**2 * head + 15 * classes * head
    atm += 2 * tokens * head**2 + 2 * classes * tokens * head
    entrance = tokens * width * head + 5 * tokens * head
    mixing = int(float(f"{2 * classes**2 * pixels:.3e}") / 2)
    names = classes * head * (classes + 1)
    return vit + 3 * (entrance + 3 * atm + names + 4 * classes * tokens) + 8 * classes * pixels + mixing


@pytest.mark.parametrize(("depth", "size", "classes"), [(12, 512, 150), (14, 512, 150), (12, 320, 150), (12, 512, 19)])
def test_multiply_adds_follow_the_model(depth: int, size: int, classes: int) -> None:
    trunk = {"model": "vit_base_patch16_384", "depth": depth}
    with torch.device("meta"):
        segmenter = model(size, classes, trunk, (5, 7, depth - 1), 384)
    assert multiply_adds(segmenter, (size, size))[0].total() == closed_form(768, depth, 384, classes, size)


if FIXTURES is not None:
    MEASURED = json.loads((FIXTURES / "segvit" / "flops.json").read_text())["configs"]

    @pytest.mark.parametrize("name", MEASURED)
    def test_original_by_operator_and_module(name: str) -> None:
        """The nine configurations as fvcore counted the original code."""
        expected = MEASURED[name]
        segmenter = published(name)
        operators, modules = multiply_adds(segmenter, tuple(expected["input"]))
        assert operators.total() / 1e9 == pytest.approx(expected["measured_gflops"], abs=5e-10)
        theirs = expected["by_operator"]
        products = theirs["bmm"] + theirs["matmul"] + theirs.get("scaled_dot_product_attention", 0.0)
        ours = {
            "convolution": theirs["conv"],
            "layer norm": theirs["layer_norm"],
            "linear": theirs["linear"],
            "attention": products,
            "bilinear": theirs["upsample_bilinear2d"],
            "read_out": theirs["einsum"],
        }
        assert {key: value / 1e9 for key, value in operators.items()} == pytest.approx(ours, abs=5e-10)
        backbone = "proposer.backbone"
        named = {
            backbone: "backbone",
            f"{backbone}.trunk.vit.patch_embed": "backbone.patch_embed",
            "proposer.entrances.0.proj": "decode_head.input_proj_1",
            "proposer.entrances.0.norm": "decode_head.proj_norm_1",
            "proposer.entrances.1.proj": "decode_head.input_proj_2",
            "namer": "decode_head.class_embed",
        }
        for own, foreign in named.items():
            if foreign in expected["by_module"]:
                assert modules[own] / 1e9 == pytest.approx(expected["by_module"][foreign], abs=5e-10), own
        parameters = parameters_by_part(segmenter)
        assert parameters["proposer.backbone"] == expected["backbone_params"]
        assert sum(parameters.values()) == expected["params"]


def really_kept(segmenter: Segmenter, size: int, present: int) -> int:
    """Bytes that autograd keeps in one true forward with losses, on the CPU."""
    masks = torch.rand(present, size, size) > 0.5
    crowd = torch.zeros(present, dtype=torch.bool)
    truth = Segments(masks, torch.arange(present), torch.ones(present), crowd)
    frame = Frame((size, size), (size, size), (size, size))
    batch = Batch(torch.rand(1, 3, size, size) * 255, ("semantic",), (frame,), ("",), (truth,))
    segmenter.train()
    aside = [*segmenter.parameters(), *segmenter.buffers()]
    return saved_bytes(lambda: torch.stack(list(segmenter.losses(batch).values())).sum(), aside)


@pytest.mark.parametrize("shrink", [None, 2])
@pytest.mark.parametrize("size", [64, 96])
def test_training_memory_is_what_autograd_keeps(shrink: int | None, size: int) -> None:
    segmenter = tiny(shrink)
    memory = training_memory(segmenter, (size, size), present=3)
    assert memory.activations == pytest.approx(really_kept(segmenter, size, 3), rel=1e-3)


def test_training_memory_with_matching_is_what_autograd_keeps() -> None:
    segmenter = tiny()
    segmenter.criterion = Matched(segmenter.vocabulary, points=500)
    memory = training_memory(segmenter, (64, 64), present=3)
    assert segmenter.criterion.assign is hungarian
    assert memory.activations == pytest.approx(really_kept(segmenter, 64, 3), rel=1e-3)


def test_training_memory_of_a_frozen_backbone_is_smaller() -> None:
    segmenter = tiny()
    whole = training_memory(segmenter, (64, 64))
    segmenter.proposer.backbone.requires_grad_(False)
    frozen = training_memory(segmenter, (64, 64))
    assert frozen.activations < whole.activations
    assert frozen.parameters == whole.parameters
    head = sum(p.nbytes for name, p in segmenter.named_parameters() if "backbone" not in name)
    assert (frozen.gradients, frozen.optimizer) == (head, 2 * head)
    assert whole.total(2) - whole.total(1) == whole.activations


def test_cost_leaves_the_model_as_it_was() -> None:
    segmenter = tiny()
    segmenter.train()
    segmenter.namer.eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in segmenter.state_dict(keep_vars=True).items()}
    found = cost(segmenter, (64, 64))
    assert found.parameters == sum(found.parameters_by_part.values()) == sum(p.numel() for p in segmenter.parameters())
    assert found.multiply_adds == sum(found.by_operator.values())
    assert segmenter.training
    assert not segmenter.namer.training
    for name, tensor in segmenter.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.grad is None
