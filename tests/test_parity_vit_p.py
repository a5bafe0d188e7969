"""Parity with the original ViT-P: its fixtures hold whole, and the runner that says so fails where it should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures_dir import FIXTURES
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.recipe import Recipe
from parity.foreign import Settings
from parity.vit_p import recipe_tree
from test_parity_mask2former import assert_all_hold, failing

SUBSET = Path(__file__).parent / "fixtures" / "vit-p"


def test_what_the_repository_holds_of_the_original_holds() -> None:
    assert_all_hold(SUBSET / "vitp_fusion", 5)


def test_one_perturbed_number_of_a_blend_shows(tmp_path: Path) -> None:
    shutil.copyfile(SUBSET / "vitp_fusion" / "config.json", tmp_path / "config.json")
    with np.load(SUBSET / "vitp_fusion" / "io.npz") as archive:
        arrays = dict(archive)
    arrays["class_logits"][0, 0] += 0.1
    np.savez(tmp_path / "io.npz", **arrays)
    shown = {row.name for row in failing(tmp_path)}
    assert shown == {"fused_logits_oneformer", "semantic_oneformer", "semantic_mmseg"}


if FIXTURES is not None:
    FOLDER = FIXTURES / "vit-p"

    @pytest.mark.parametrize(("part", "least"), [("vit-p", 15), ("proposals/vitp_fusion", 5)])
    def test_everything_of_the_original_holds(part: str, least: int) -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / part, least)

    @pytest.mark.parametrize("key", ["pos_embed", "cls_embeddings.weight", "blocks.1.attn.qkv.bias", "register_tokens"])
    def test_one_perturbed_weight_shows(tmp_path: Path, key: str) -> None:
        for path in FOLDER.glob("registers.*"):
            shutil.copyfile(path, tmp_path / path.name)
        weights = load_file(tmp_path / "registers.safetensors")
        weights[key].flatten()[0] += 0.5
        save_file(weights, tmp_path / "registers.safetensors")
        assert "logits, torch.float64" in {row.name for row in failing(tmp_path)}

    def converted(tmp_path: Path, classes: int, depth: int, *prefixes: str) -> Path:
        """The fixture as a checkpoint is released, converted by a recipe of so many classes and blocks."""
        told = json.loads((FOLDER / "registers.json").read_text(encoding="utf-8"))
        tree = recipe_tree(Settings(told | {"num_classes": classes, "depth": depth}, "registers.json"))
        weights = load_file(FOLDER / "registers.safetensors")
        state = {"".join(prefixes) + key: tensor for key, tensor in weights.items()}
        torch.save(state, tmp_path / "released.pth")
        convert(tmp_path / "released.pth", Recipe(tree, "points.yaml"), tmp_path / "ours.safetensors")
        return tmp_path / "ours.safetensors"

    @pytest.mark.parametrize("prefixes", [(), ("teacher.", "backbone."), ("module.",)], ids=str)
    def test_a_released_checkpoint_becomes_ours(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
        ours = load_file(converted(tmp_path, 7, 2, *prefixes))
        theirs = load_file(FOLDER / "registers.safetensors")
        assert torch.equal(ours["namer.slot"], theirs["pos_embed"][0, 0])
        assert torch.equal(ours["namer.trunk.vit.pos_embed"], theirs["pos_embed"][:, 1:])
        assert torch.equal(ours["namer.point_proj.weight"], theirs["cls_embeddings.weight"])

    @pytest.mark.parametrize(
        ("classes", "depth", "named"), [(9, 2, r"head\.weight"), (7, 3, r"blocks\.2\."), (7, 1, r"blocks\.1\.")]
    )
    def test_another_size_is_refused_by_name(tmp_path: Path, classes: int, depth: int, named: str) -> None:
        with pytest.raises(ConvertError, match=named):
            converted(tmp_path, classes, depth)
