"""Parity with the original Mask2Former: its fixtures hold, and the runner that says so fails where it should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fixtures_dir import FIXTURES
from parity.rows import Row, table
from parity.runner import run

SUBSET = Path(__file__).parent / "fixtures" / "mask2former"
PARTS = ("m2f_head", "msda_op")


def failing(folder: Path) -> list[Row]:
    return [row for row in run(folder) if not row.passed]


def assert_all_hold(folder: Path, least: int) -> None:
    rows = run(folder)
    assert len(rows) >= least
    bad = [row for row in rows if not row.passed]
    assert not bad, table(bad)


def test_the_subset_is_small() -> None:
    assert sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file()) <= 600_000


@pytest.mark.parametrize(("part", "least"), [("m2f_head", 19), ("msda_op", 60)])
def test_the_subset_holds(part: str, least: int) -> None:
    assert_all_hold(SUBSET / part, least)


if FIXTURES is not None:
    WHOLE = {
        "proposals/m2f_head": 22,
        "proposals/mm_m2f_head": 16,
        "proposals/m2f_swin_e2e": 19,
        "proposals/convnext": 4,
        "vit-adapter/msda_op": 104,
    }

    @pytest.mark.parametrize(("part", "least"), WHOLE.items())
    def test_everything_of_the_original_holds(part: str, least: int) -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / part, least)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    shutil.copytree(SUBSET / "m2f_head", tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize(
    "key",
    [
        "sem_seg_head.pixel_decoder.input_proj.0.1.weight",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.sampling_offsets.bias",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.weight",
        "sem_seg_head.pixel_decoder.adapter_1.weight",
        "sem_seg_head.pixel_decoder.mask_features.bias",
        "sem_seg_head.predictor.query_feat.weight",
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.predictor.level_embed.weight",
        "sem_seg_head.predictor.transformer_cross_attention_layers.2.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.out_proj.bias",
        "sem_seg_head.predictor.mask_embed.layers.1.weight",
        "sem_seg_head.predictor.class_embed.bias",
    ],
)
def test_one_perturbed_weight_shows(head: Path, key: str) -> None:
    weights = load_file(head / "state.safetensors")
    weights[key].flatten()[-1] += 0.05
    save_file(weights, head / "state.safetensors")
    assert {row.file for row in failing(head)} == {"io.npz"}


def change(path: Path, key: str, to: np.ndarray | None) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != key}
    np.savez(path, **arrays, **({} if to is None else {key: to}))


def test_arrays_that_are_missing_or_not_known_fail(head: Path) -> None:
    change(head / "io.npz", "ms_9", np.zeros(1))
    assert [(row.name, row.note) for row in failing(head)] == [("ms_9", "not covered")]
    change(head / "io.npz", "ms_1", None)
    assert any("ms_1" in row.note for row in failing(head))


def test_one_blocked_place_shows(head: Path) -> None:
    with np.load(head / "io.npz") as archive:
        blocked = archive["attn_mask_2"]
    row, place = next((row, place) for row, place in np.ndindex(13, 96) if not blocked[0, row, place])
    blocked[0, row, place] = True
    change(head / "io.npz", "attn_mask_2", blocked)
    assert [row.name for row in failing(head)] == ["attn_mask_2"]


def test_settings_that_it_does_not_know_fail(head: Path) -> None:
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"pre_norm": True}))
    assert any("pre_norm" in row.note for row in failing(head))
    (head / "config.json").write_text(json.dumps(config | {"kind": "another"}))
    assert {row.note for row in failing(head)} == {"not covered"}


def test_one_wrong_sample_shows(tmp_path: Path) -> None:
    shutil.copytree(SUBSET / "msda_op", tmp_path / "op")
    with np.load(tmp_path / "op" / "e_border.npz") as archive:
        output = archive["output"]
    output[0, 3, 1] += 1e-4
    change(tmp_path / "op" / "e_border.npz", "output", output)
    assert {row.name.partition(",")[0] for row in failing(tmp_path / "op")} == {"output"}
