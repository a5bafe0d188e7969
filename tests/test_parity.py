"""Parity with the original SegViT: its fixtures hold, and the runner that says so fails where it should."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures_dir import FIXTURES
from maskfirst.convert import segvit
from maskfirst.convert.rename import destinations
from parity.__main__ import main
from parity.foreign import recipe_tree, segmenter
from parity.rows import Row, table
from parity.runner import run
from parity.second import Shape, make
from parity.variant import draw

SUBSET = Path(__file__).parent / "fixtures" / "segvit"
VARIANTS = ("plain", "shrunk")


def write_weights(folder: Path, name: str) -> None:
    """The weights of a variant of the subset, which it leaves out, as its seeds draw them."""
    told = json.loads((folder / f"{name}.json").read_text())
    model = segmenter(recipe_tree(told["config"]), name)
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    named = list(told["losses"]["losses_grad_l2"])
    homes = destinations(named, segvit.rules(named))
    shapes = {key: torch.Size([len(homes[key]) * own[homes[key][0]][0], *own[homes[key][0]][1:]]) for key in named}
    weights = draw(told["seeds"], shapes)
    stock = model.criterion.get_buffer("class_weights")
    weights["decode_head.loss_decode.criterion.empty_weight"] = stock
    if name == "shrunk":
        weights["decode_head.atm.loss_decode.criterion.empty_weight"] = stock.clone()
    save_file(weights, folder / told["backbone_weights"])


PICTURES = {
    "img64": (2, 3, 64, 64),
    "img96": (1, 3, 96, 96),
    "img60x64": (1, 3, 60, 64),
    "img64x96": (1, 3, 64, 96),
    "img80x112": (1, 3, 80, 112),
}
"""In the order in which they were drawn."""


def pictures(seed: int) -> dict[str, np.ndarray]:
    """Those of the fixtures."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).numpy() for key, shape in PICTURES.items()}


def write_pictures(folder: Path, name: str) -> None:
    """The pictures of a variant of the subset, which it leaves out, as its seed draws them."""
    told = json.loads((folder / f"{name}.json").read_text())
    drawn = pictures(told["seeds"]["images"])
    with np.load(folder / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(folder / f"{name}.npz", **{key: drawn[key] for key in drawn.keys() & told["arrays"].keys()}, **arrays)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The subset with its weights and pictures."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(SUBSET, folder, dirs_exist_ok=True)
    for name in VARIANTS:
        write_weights(folder, name)
        write_pictures(folder, name)
    return folder


def copy_variant(original: Path, folder: Path, name: str) -> Path:
    for suffix in ("json", "npz", "safetensors"):
        shutil.copy(original / f"{name}.{suffix}", folder)
    return folder


def failing(folder: Path) -> list[Row]:
    return [row for row in run(folder) if not row.passed]


def assert_all_hold(folder: Path) -> None:
    rows = run(folder)
    assert rows
    bad = [row for row in rows if not row.passed]
    assert not bad, table(bad)


def test_a_clone_is_small() -> None:
    """All the fixtures together."""
    assert sum(path.stat().st_size for path in SUBSET.parent.rglob("*") if path.is_file()) <= 2_100_000


def test_the_subset_holds(original: Path) -> None:
    assert_all_hold(original)


if FIXTURES is not None:

    def test_everything_of_the_original_holds() -> None:
        assert FIXTURES is not None
        assert_all_hold(FIXTURES / "segvit")

    @pytest.mark.parametrize("name", VARIANTS)
    def test_pictures_are_as_drawn(name: str) -> None:
        assert FIXTURES is not None
        told = json.loads((FIXTURES / "segvit" / f"{name}.json").read_text())
        with np.load(FIXTURES / "segvit" / f"{name}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files if key.startswith("img")}
        drawn = pictures(told["seeds"]["images"])
        assert arrays.keys() == drawn.keys()
        assert all(np.array_equal(arrays[key], drawn[key]) for key in drawn)


SECOND = {
    "plain": Shape("ATMHead"),
    "deep": Shape("ATMHead", side=96, depth=4, taps=(0, 1, 2, 3), layers=1, classes=9, dec_layers=2, crop=96, eps=1e-5),
    "fine": Shape("ATMHead", side=48, patch=8, taps=(2,), crop=48, stride=32),
    "single": Shape("ATMSingleHead"),
    "bare": Shape("ATMSingleHead", use_proj=False, head_width=24, head_heads=3, taps=(1,), dec_layers=1),
    "shrunk": Shape("TPNATMHead", shrink=1, loss=(("loss_weight", 0.5), ("mask_weight", 3.0))),
    "late": Shape("TPNATMHead", side=96, taps=(2,), shrink=2, layers=3, crop=96, stride=96),
}


@pytest.mark.parametrize("name", SECOND)
def test_models_of_other_shapes_agree_with_a_second_implementation(tmp_path: Path, name: str) -> None:
    # A seed of well-conditioned weights: with 11, a gradient of `bare` rounds by more than is allowed on some processors.
    make(tmp_path, name, SECOND[name], seed=12)
    assert_all_hold(tmp_path)


# ---- the runner fails where it should

LIVE = {
    "plain": (
        "backbone.pos_embed",
        "backbone.patch_embed.projection.weight",
        "backbone.layers.1.attn.attn.in_proj_weight",
        "backbone.layers.3.ffn.layers.1.weight",
        "decode_head.proj_norm_2.weight",
        "decode_head.decoder_1.layers.0.self_attn.in_proj_weight",
        "decode_head.decoder_3.layers.2.multihead_attn.q.weight",
        "decode_head.q.weight",
        "decode_head.class_embed.bias",
        "decode_head.loss_decode.criterion.empty_weight",
    ),
    "shrunk": (
        "decode_head.q.weight",
        "decode_head.decoder_1.layers.2.multihead_attn.in_proj_weight",
        "decode_head.atm.q.weight",
        "decode_head.atm.decoder_1.layers.0.norm3.weight",
    ),
}
DEAD = {
    "plain": ("backbone.cls_token", "decode_head.decoder_1.layers.0.multihead_attn.k.bias"),
    "shrunk": ("decode_head.atm.loss_decode.criterion.empty_weight",),
}
"""Nothing depends on them; that they are what the seeds draw is all that can be said."""


def perturb(path: Path, key: str) -> None:
    weights = load_file(path)
    weights[key].flatten()[-1] += 0.01
    save_file(weights, path)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in VARIANTS for key in LIVE[name]])
def test_one_perturbed_weight_shows_in_the_arrays(original: Path, tmp_path: Path, name: str, key: str) -> None:
    copy_variant(original, tmp_path, name)
    perturb(tmp_path / f"{name}.safetensors", key)
    assert {row.file for row in failing(tmp_path)} & {f"{name}.npz", f"{name}.json"}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in VARIANTS for key in DEAD[name]])
def test_one_perturbed_weight_shows_even_where_nothing_depends_on_it(
    original: Path, tmp_path: Path, name: str, key: str
) -> None:
    copy_variant(original, tmp_path, name)
    perturb(tmp_path / f"{name}.safetensors", key)
    assert [row.file for row in failing(tmp_path)] == [f"{name}.safetensors"]


def without(path: Path, key: str) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != key}
    np.savez(path, **arrays)


def with_more(path: Path, key: str) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **arrays, **{key: np.zeros(1, np.float32)})


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "key", ["feat1", "att_stage0_sim", "tta_argmax", "label", "img96", "grad:decode_head.q.weight"]
)
def test_a_missing_array_fails(original: Path, tmp_path: Path, key: str) -> None:
    without(copy_variant(original, tmp_path, "plain") / "plain.npz", key)
    assert any(key in row.name + row.note for row in failing(tmp_path))


def test_arrays_and_entries_that_it_does_not_know_fail(original: Path, tmp_path: Path) -> None:
    copy_variant(original, tmp_path, "plain")
    with_more(tmp_path / "plain.npz", "feat9")
    edit(tmp_path / "plain.json", lambda told: told.update(more=1))
    edit(tmp_path / "plain.json", lambda told: told["arrays"].update(feat9=[[1], "float32"]))
    edit(tmp_path / "plain.json", lambda told: told["losses"].update(losses_of_a_kind={}))
    assert {(row.name, row.note) for row in failing(tmp_path)} == {
        ("feat9", "not covered"),
        ("more", "not covered"),
        ("losses_of_a_kind", "not covered"),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config["backbone"].update(with_cls_token=True), "with_cls_token"),
        (lambda config: config["backbone"].update(window_size=7), "window_size"),
        (lambda config: config["decode_head"].update(type="FCNHead"), "FCNHead"),
        (lambda config: config["decode_head"]["loss_decode"].update(use_point=True), "use_point"),
        (lambda config: config.update(neck={"type": "FPN"}), "neck"),
        (lambda config: config["decode_head"].pop("num_heads"), "num_heads"),
    ],
)
def test_configs_that_ask_for_more_fail(
    original: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    edit(copy_variant(original, tmp_path, "plain") / "plain.json", lambda content: change(content["config"]))
    (row,) = failing(tmp_path)
    assert told in row.note


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("test_geometry.json", lambda told: told["ade20k"]["rows"][0].update(resized=[320, 428])),
        ("loss_only.json", lambda told: told["cases"]["weights"]["losses"].update(loss_dice=0.605)),
        ("lr_schedule.json", lambda told: told["lr"]["ade20k_160k_power1"]["750"].__setitem__(1, 1.0e-4)),
        ("flops.json", lambda told: told["configs"]["vit-b_ade20k_512"].update(measured_gflops=120.882)),
    ],
)
def test_one_wrong_number_in_a_table_fails(
    original: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    shutil.copy(original / file, tmp_path)
    if file == "loss_only.json":
        shutil.copy(original / "loss_only.npz", tmp_path)
    edit(tmp_path / file, change)
    assert len(failing(tmp_path)) == 1


def test_one_bit_of_the_jax_conversion_fails(original: Path, tmp_path: Path) -> None:
    with np.load(original / "jax_convert.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    tensor = arrays["mmseg:layers.1.attn.attn.in_proj_weight"]
    tensor[20, 3] = np.nextafter(tensor[20, 3], np.float32(9))
    np.savez(tmp_path / "jax_convert.npz", **arrays)
    assert [row.name for row in failing(tmp_path)] == ["vit.blocks.1.attn.qkv.weight"]


def test_files_that_it_does_not_know_or_cannot_read_fail(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("prose")
    (tmp_path / "more.npz").write_bytes(b"x")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "test_geometry.json").write_text("{")
    (tmp_path / "folder").mkdir()
    rows = failing(tmp_path)
    assert {row.file for row in rows if row.note == "not covered"} == {"more.npz", "other.json", "folder"}
    assert any(row.file == "test_geometry.json" and "JSONDecodeError" in row.note for row in rows)


def test_an_empty_or_absent_folder_fails(tmp_path: Path) -> None:
    assert [row.note for row in run(tmp_path)] == ["holds no fixtures"]
    assert [row.note for row in run(tmp_path / "none")] == ["no such folder"]


def test_the_command_prints_rows_and_exits_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "tiny", Shape("ATMHead"), seed=3)
    command = [sys.executable, "-m", "tests.parity", str(tmp_path), "--json"]
    root = Path(__file__).resolve().parents[1]
    good = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    told = json.loads(good.stdout)
    assert told["passed"]
    assert {"tiny.npz", "tiny.json", "tiny.safetensors"} <= {row["file"] for row in told["rows"]}
    perturb(tmp_path / "tiny.safetensors", "decode_head.q.weight")
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path), "--failed"])
    assert main() == 1
    assert capsys.readouterr().out.count("\nFAILED") == len(failing(tmp_path))
