"""Converting EoMT: every key of both styles and both families is spoken for, and the model's figures are read from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EomtConfig, EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

import tiny_eomt
from maskfirst import build
from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.convert import eomt
from maskfirst.convert.catalogue import ConvertError, convert, released
from maskfirst.convert.rename import rename
from maskfirst.recipe import Recipe

SET = {"kind": "set"}


def recipe(form: str, **proposer: Any) -> Recipe:
    return Recipe(tiny_eomt.tree(form, SET, **proposer), "tiny.yaml")


def state(form: str, original: bool) -> dict[str, Tensor]:
    tensors = tiny_eomt.theirs(form).state_dict()
    return tiny_eomt.original(tensors) if original else tensors


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    """As Lightning saves them, or as transformers does."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "epoch": 3, "global_step": 7}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("original", [False, True], ids=["transformers", "original"])
@pytest.mark.parametrize("form", tiny_eomt.FORMS)
def test_a_checkpoint_becomes_a_model_that_predicts_the_same(form: str, original: bool, tmp_path: Path) -> None:
    model = tiny_eomt.theirs(form).eval()
    model.attn_mask_probs.zero_()
    checkpoint = saved(tmp_path / ("last.ckpt" if original else "model.safetensors"), state(form, original))
    report = convert(checkpoint, recipe(form), tmp_path / "eomt.safetensors")
    assert report.origin == "EoMT"
    family = "DINOv3" if form.startswith("dinov3") else "DINOv2"
    assert report.holds.startswith("an EoMT of 6 queries in 3 blocks for 7 classes")
    assert report.holds.endswith(f"on a {family} of 4 blocks of {model.config.hidden_size}")
    assert ("at 64 px" in report.holds) == (family == "DINOv2")
    assert {key.rsplit(".", 1)[-1] for key in report.left} == (
        {"attn_mask_probs", "empty_weight", "pixel_mean", "pixel_std"}
        if original
        else {"attn_mask_probs", "empty_weight"}
    )
    batch = tiny_eomt.batch(truth=False)
    with torch.no_grad():
        expected = model(batch.pixels)
        proposals, names = build.load(tmp_path / "eomt.safetensors")(batch)
    torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names.logits, expected.class_queries_logits, rtol=1e-4, atol=1e-4)


def renamed(tensors: dict[str, Tensor], like: Recipe) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in Experiment(like).segmenter(meta=True).state_dict().items()}
    return rename(tensors, eomt.rules(tensors.keys()), shapes).tensors


def test_an_older_gated_mlp_of_transformers_is_known() -> None:
    tensors = state("dinov2_giant", original=False)
    packed = dict(tensors)
    for index in range(4):
        for kind in ("weight", "bias"):
            branches = [packed.pop(f"layers.{index}.mlp.{name}_proj.{kind}") for name in ("gate", "up")]
            packed[f"layers.{index}.mlp.weights_in.{kind}"] = torch.cat(branches)
            packed[f"layers.{index}.mlp.weights_out.{kind}"] = packed.pop(f"layers.{index}.mlp.down_proj.{kind}")
    newer, older = (renamed(each, recipe("dinov2_giant")) for each in (tensors, packed))
    assert newer.keys() == older.keys()
    assert all(torch.equal(newer[name], older[name]) for name in newer)


FULL = {
    # Heads, blocks of the trunk, those that queries join, and what else transformers' configuration says.
    "eomt-s-coco-panoptic": (6, 12, 3, {}),
    "eomt-b-coco-panoptic": (12, 12, 3, {}),
    "eomt-l-coco-panoptic-1280": (16, 24, 4, {}),
    "eomt-g-ade20k-panoptic": (24, 40, 5, {"use_swiglu_ffn": True}),
    "eomt-l-coco-instance": (16, 24, 4, {}),
    "eomt-l-ade20k": (16, 24, 4, {}),
    "eomt-l-cityscapes": (16, 24, 4, {}),
    "eomt-b-dinov3-coco-panoptic": (12, 12, 3, {"intermediate_size": 3072}),
    "eomt-l-dinov3-ade20k": (16, 24, 4, {"intermediate_size": 4096}),
}


@pytest.mark.parametrize("name", FULL)
def test_whole_models_are_recognised_and_every_key_is_spoken_for(name: str) -> None:
    heads, depth, blocks, settings = FULL[name]
    (rotary, width, classes, queries, side) = next(facts for facts, found in eomt.RECIPES.items() if found == name)
    sizes = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "num_blocks": blocks,
        "num_queries": queries, "num_labels": classes, "image_size": side or 640, **settings,
    }  # fmt: skip
    with torch.device("meta"):
        if rotary:
            model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**sizes))
        else:
            model = EomtForUniversalSegmentation(EomtConfig(**sizes))
    styles = [model.state_dict()]
    if not rotary:
        styles.append(tiny_eomt.original(styles[0]))
    for tensors in styles:
        assert eomt.recognises(tensors.keys())
        assert eomt.plan(tensors) == (name, ())
        assert renamed(tensors, recipes.load(name))


def test_every_released_model_has_its_recipe() -> None:
    ours = {name for name in recipes.names() if name.startswith("eomt-")}
    planned = set(eomt.RECIPES.values())
    assert planned < ours
    # Of these there are two sizes of the same tensors.
    assert {name.removesuffix("-1280") for name in ours - planned} == {
        "eomt-l-dinov3-coco-panoptic",
        "eomt-l-dinov3-coco-instance",
    }
    files = {file for file, name in released().items() if name in ours}
    assert len(files) == len(ours) == 21


def test_published_scores_are_there() -> None:
    found = {name: recipes.load(name).tree["published"]["scores"] for name in recipes.names() if name[:5] == "eomt-"}
    assert found["eomt-l-ade20k"] == {"mIoU": 58.4}
    assert found["eomt-l-coco-instance-1280"] == {"AP": 48.8}
    assert found["eomt-g-coco-panoptic-1280"] == {"PQ": 59.2}
    assert found["eomt-s-dinov3-coco-panoptic"] == {"PQ": 47.2}


def test_differences_to_a_dinov3_are_refused(tmp_path: Path) -> None:
    tensors = state("dinov3", original=True)
    differences = {
        name: tensor * 1e-3 if name.startswith(eomt.ORIGINAL) else tensor for name, tensor in tensors.items()
    }
    checkpoint = saved(tmp_path / "delta.ckpt", differences)
    for chosen in (recipe("dinov3"), None):
        with pytest.raises(
            ConvertError, match=r"delta\.ckpt: its trunk holds differences to the weights of a DINOv3"
        ) as told:
            convert(checkpoint, chosen, tmp_path / "out.safetensors")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_of_no_bundled_recipe_wants_one(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "own.safetensors", state("dinov2", original=False))
    with pytest.raises(ConvertError, match=r"an EoMT of 6 queries .* which no bundled recipe is; give its own"):
        convert(checkpoint, None, tmp_path / "out.safetensors")


def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    tensors = state("dinov2", original=True)
    del tensors["network.mask_head.2.bias"]
    tensors["network.stray"] = torch.zeros(1)
    checkpoint = saved(tmp_path / "odd.ckpt", tensors)
    with pytest.raises(ConvertError) as told:
        convert(checkpoint, recipe("dinov2", queries=5), tmp_path / "out.safetensors")
    line = str(told.value)
    for part in ("network.stray", "proposer.mask_head.2.bias", "proposer.queries.weight [6, 32] must be [5, 32]"):
        assert part in line
    del tensors["network.q.weight"]
    with pytest.raises(ConvertError, match="of no known origin"):
        convert(saved(tmp_path / "odd.ckpt", tensors), recipe("dinov2"), tmp_path / "out.safetensors")
    del tensors["network.attn_mask_probs"]
    tensors["network.q.weight"] = torch.zeros(6, 32)
    with pytest.raises(ConvertError, match=r"looks like EoMT, but has no .*attn_mask_probs"):
        convert(saved(tmp_path / "odd.ckpt", tensors), None, tmp_path / "out.safetensors")
