"""Parity with the original ViT-Adapter: its fixtures hold whole, and the runner that says so fails where it should."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fixtures_dir import FIXTURES
from test_parity_mask2former import assert_all_hold, failing

if FIXTURES is not None:
    FOLDER = FIXTURES / "vit-adapter"

    @pytest.mark.parametrize(
        ("part", "least"),
        [("vit_upernet", 31), ("beit_upernet", 30), ("beit_mask2former", 2645), ("relpos_load", 30), ("optim", 12)],
    )
    def test_everything_of_the_original_holds(part: str, least: int) -> None:
        assert_all_hold(FOLDER / part, least)

    @pytest.mark.parametrize(
        ("part", "key", "shown"),
        [
            ("vit_upernet", "backbone.interactions.2.injector.gamma", "out/tap.interaction2.0"),
            ("vit_upernet", "decode_head.lateral_convs.1.bn.running_var", "out/decode_logits"),
            ("beit_upernet", "backbone.blocks.1.attn.relative_position_bias_table", "out/pyramid.3"),
            ("beit_upernet", "auxiliary_head.conv_seg.bias", "out/aux_logits"),
        ],
    )
    def test_one_perturbed_weight_shows(tmp_path: Path, part: str, key: str, shown: str) -> None:
        for path in (FOLDER / part).iterdir():
            shutil.copyfile(path, tmp_path / path.name)
        weights = load_file(tmp_path / "model.safetensors")
        weights[key].flatten()[0] += 0.2
        save_file(weights, tmp_path / "model.safetensors")
        assert shown in {row.name for row in failing(tmp_path)}
