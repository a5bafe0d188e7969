"""Converting BEiTs: every spelling of their releases becomes weights for a trunk, and what looks like one is told apart."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst import weights
from maskfirst.backbones.beit import BEiT
from maskfirst.build import Experiment
from maskfirst.convert import beit
from maskfirst.convert.catalogue import ORIGINS, ConvertError, convert
from maskfirst.convert.rename import rename
from maskfirst.recipe import Recipe

PLACE = "proposer.backbone.trunk"
TABLE = "attn.relative_position_bias_table"
SHARED = "rel_pos_bias.relative_position_bias_table"
WIDTH, DEPTH, HEADS = 24, 3, 4


def small(side: int = 48, depth: int = DEPTH, heads: int = HEADS, **settings: Any) -> Beit:
    """As timm builds a BEiT of `side` px with tables in its blocks, no number left at its beginning."""
    torch.manual_seed(0)
    kinds = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "num_classes": 0, "global_pool": "token"} | settings
    vit = Beit(img_size=side, embed_dim=WIDTH, depth=depth, num_heads=heads, init_values=0.1, **kinds)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return vit


def blank(final_norm: bool = False) -> BEiT:
    return BEiT((48, 48), width=WIDTH, depth=DEPTH, heads=HEADS, final_norm=final_norm)


def recipe(**trunk: Any) -> Recipe:
    backbone = {
        "kind": "taps",
        "depths": [1],
        "trunk": {"kind": "beit", "size": [48, 48], "width": WIDTH, "depth": DEPTH, "heads": HEADS} | trunk,
    }
    tree = {
        "vocabulary": ["a", "b"],
        "proposer": {"kind": "dense", "backbone": backbone},
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel"},
    }
    return Recipe(tree, "tiny.yaml")


# ---- the spellings of one and the same trunk


def finetuned(ours: dict[str, Tensor]) -> tuple[str, Any]:
    """unilm's, trained to classify: a table a block, with its index."""
    extra = {f"blocks.{index}.attn.relative_position_index": torch.zeros(10, 10).long() for index in range(DEPTH)}
    head = {name: torch.zeros(2, WIDTH) for name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")}
    return "beit_base_patch16_224_pt22k_ft22k.pth", {"model": ours | extra | head}


def pretrained(ours: dict[str, Tensor]) -> tuple[str, Any]:
    """unilm's, trained on hidden patches: one table for all blocks."""
    own = {name: tensor for name, tensor in ours.items() if TABLE not in name}
    extra = {
        SHARED: ours[f"blocks.0.{TABLE}"],
        "rel_pos_bias.relative_position_index": torch.zeros(10, 10).long(),
        "mask_token": torch.zeros(1, 1, WIDTH),
        "lm_head.weight": torch.zeros(5, WIDTH),
        "lm_head.bias": torch.zeros(5),
    }
    return "beit_base_patch16_224_pt22k.pth", {"model": own | extra}


def pretrained_v2(ours: dict[str, Tensor]) -> tuple[str, Any]:
    """BEiTv2's: blocks and a head for the class token beside."""
    name, content = pretrained(ours)
    beside = {
        f"cls_pt_layers.0.{key[9:]}": ours[key] for key in ours if key.startswith("blocks.0.") and TABLE not in key
    }
    head = {"cls_pt_norm.weight": torch.zeros(WIDTH), "cls_pt_lm_head.bias": torch.zeros(5)}
    return f"beitv2_{name}", {"model": content["model"] | beside | head}


def packed_v2(ours: dict[str, Tensor]) -> tuple[str, Any]:
    """BEiTv2's, trained to classify, as DeepSpeed saves them, in half precision."""
    content = finetuned({name: tensor.half() for name, tensor in ours.items()})[1]
    beside = {"optimizer": None, "csr_tensor_module_names": set(), "dp_world_size": 16}
    return "beitv2_large_patch16_224_pt1k_ft21k.pth", {"module": content["model"], **beside}


def of_timm(ours: dict[str, Tensor]) -> tuple[str, Any]:
    model = small(num_classes=7, global_pool="avg")
    model.load_state_dict(ours, strict=False)
    return "model.safetensors", model.state_dict()


SPELLINGS = (finetuned, pretrained, pretrained_v2, packed_v2, of_timm)
NORMED = (pretrained, pretrained_v2)


def written(
    folder: Path, spelling: Callable[[dict[str, Tensor]], tuple[str, Any]], side: int = 48
) -> tuple[Path, dict]:
    """A checkpoint, and the tensors that a trunk should get of it."""
    ours = small(side).state_dict()
    if spelling in NORMED:
        ours |= {name: ours[f"blocks.0.{TABLE}"] for name in ours if TABLE in name}
    else:
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("norm.")}
    name, content = spelling(ours)
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    exact = {f"vit.{name}": tensor.half().float() if spelling is packed_v2 else tensor for name, tensor in ours.items()}
    return folder / name, exact


def count_of(content: Mapping[str, Any]) -> int:
    return len(next((content[key] for key in ("model", "module") if key in content), content))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_release_becomes_weights_for_a_trunk(
    tmp_path: Path, spelling: Callable[[dict[str, Tensor]], tuple[str, Any]]
) -> None:
    path, expected = written(tmp_path, spelling)
    normed = spelling in NORMED
    report = convert(path, recipe(final_norm=normed), tmp_path / "out.safetensors")
    assert report.origin == "a BEiT"
    assert report.recipe is None
    assert report.notes == (
        f"use: `-s {PLACE}.weights={tmp_path / 'out.safetensors'}`, or the key `weights` at that place of any recipe "
        "that it fits",
    )
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    assert report.tensors + len(report.left) == count_of(content)
    trunk = blank(final_norm=normed)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    loaded = weights.load_part(trunk, tmp_path / "out.safetensors", PLACE)
    assert (loaded.resized, loaded.reset, loaded.unused) == ((), (), ())
    found = trunk.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_left_behind_has_its_reason(tmp_path: Path) -> None:
    path, _ = written(tmp_path, pretrained_v2)
    left = dict(convert(path, None, tmp_path / "out.safetensors").left)
    assert left.pop("rel_pos_bias.relative_position_index") == "a table of the places in a window, which is computed"
    assert {"mask_token", "lm_head.bias", "cls_pt_layers.0.attn.q_bias", "cls_pt_lm_head.bias"} < left.keys()
    told = "what only its pretraining has: the token of hidden patches, and layers behind the trunk"
    assert set(left.values()) == {told}
    path, _ = written(tmp_path, finetuned)
    left = convert(path, None, tmp_path / "out.safetensors").left
    assert left["fc_norm.weight"] == left["head.bias"] == "the head of its image classification"
    assert left["blocks.2.attn.relative_position_index"].startswith("a table of the places")


def test_a_trunk_without_the_norm_leaves_that_of_pretraining_in_the_file(tmp_path: Path) -> None:
    path, _ = written(tmp_path, pretrained)
    convert(path, recipe(), tmp_path / "out.safetensors")
    loaded = weights.load_part(blank(), tmp_path / "out.safetensors", PLACE)
    assert (loaded.resized, loaded.reset) == ((), ())
    assert set(loaded.unused) == {"vit.norm.weight", "vit.norm.bias"}


def test_tables_of_another_window_are_resized_where_they_are_loaded(tmp_path: Path) -> None:
    """The file keeps them as they are, and says what a recipe does; the line that it tells loads them."""
    path, _ = written(tmp_path, finetuned)
    out = tmp_path / "out.safetensors"
    wide = recipe(size=[64, 64])
    report = convert(path, wide, out)
    tables = tuple(f"vit.blocks.{index}.{TABLE}" for index in range(DEPTH))
    assert report.notes[0] == f"note: tiny resizes: {', '.join(tables)}"
    assert load_file(out)[tables[0]].shape == (28, HEADS)
    told = re.match(r"use: `-s (\S+)`", report.notes[1])
    assert told is not None
    experiment = Experiment(recipes.override(wide, [told[1]]))
    experiment.segmenter()
    (loaded,) = experiment.loaded
    assert loaded.part == PLACE
    assert (loaded.resized, loaded.reset, loaded.unused) == (tables, (), ())


def test_another_number_of_heads_or_blocks_does_not_fit(tmp_path: Path) -> None:
    path, _ = written(tmp_path, finetuned)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConvertError) as caught:
        convert(path, recipe(heads=2, size=[64, 64]), out)
    tables = [f"vit.blocks.{index}.{TABLE} [28, 4] for [52, 2]" for index in range(DEPTH)]
    assert str(caught.value) == f"{path}: does not fit {PLACE} of tiny: {', '.join(tables)}"
    with pytest.raises(ConvertError, match=r"does not fit .* of tiny: vit\.blocks\.3\.gamma_1 missing, .* more$"):
        convert(path, recipe(depth=4), out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["beit_base_patch16_384", "beit_large_patch16_512", "beitv2_large_patch16_224"])
def test_every_key_of_timm_s_models_has_its_place(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000).state_dict()
    part = beit.build(theirs)
    renamed = rename(theirs, beit.rules(theirs), {key: value.shape for key, value in part.state_dict().items()})
    assert set(renamed.left) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    side = int(name.rsplit("_", 1)[1]) // 16
    assert renamed.tensors[f"vit.blocks.0.{TABLE}"].shape == (
        (2 * side - 1) ** 2 + 3,
        part.vit.blocks[0].attn.num_heads,
    )


# ---- what is no BEiT, or none that can be taken over


def spoilt(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """What is said of a checkpoint with changed tensors, after its name."""
    tensors = dict(small().state_dict())
    change(tensors)
    torch.save({"model": tensors}, folder / "x.pth")
    with pytest.raises(ConvertError) as caught:
        convert(folder / "x.pth", None, folder / "out.safetensors")
    assert not (folder / "out.safetensors").exists()
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(f"{folder / 'x.pth'}: ")


def tables(rows: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(rows, HEADS) for name in tensors if TABLE in name})


ABSOLUTE = (
    "has absolute positions (pos_embed), and a BEiT here has relative ones, by a table in every block; "
    "take a release with such tables"
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.update(pos_embed=torch.zeros(1, 10, WIDTH)), ABSOLUTE),
        (
            tables(80),
            "its tables of relative positions have 80 rows, as for no square picture; is it a BEiT's?",
        ),
        (tables(0), "its tables of relative positions have 0 rows, as for no square picture; is it a BEiT's?"),
        (
            lambda tensors: tensors.update({f"blocks.0.{TABLE}": torch.zeros(28)}),
            "looks like a BEiT, but its tensors have other axes; is it whole?",
        ),
        (
            lambda tensors: tensors.update({f"blocks.0.{TABLE}": torch.zeros(28, 0)}),
            "looks like a BEiT, but its tensors have other axes; is it whole?",
        ),
        (
            lambda tensors: tensors.pop(f"blocks.0.{TABLE}"),
            f"looks like a BEiT, but has no 'blocks.0.{TABLE}'; is it whole?",
        ),
        (
            lambda tensors: tensors.pop("blocks.1.attn.v_bias"),
            "the checkpoint does not fit the model: keys of the model without a source (1): vit.blocks.1.attn.v_bias",
        ),
        (
            lambda tensors: tensors.update({SHARED: torch.zeros(28, HEADS)}),
            "the checkpoint does not fit the model: keys of the model with two sources (3): "
            + ", ".join(f"vit.blocks.{index}.{TABLE}" for index in range(DEPTH)),
        ),
        (
            lambda tensors: tensors.update({"decoder.weight": torch.zeros(1)}),
            "the checkpoint does not fit the model: keys of it without a rule (1): decoder.weight",
        ),
    ],
    ids=["absolute", "oblong", "empty", "flat", "headless", "no table", "no bias", "both", "surplus"],
)
def test_what_cannot_be_taken_over_is_told(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], told: str
) -> None:
    assert spoilt(tmp_path, change) == told


def keys_of(name: str, **settings: Any) -> set[str]:
    with torch.device("meta"):
        return set(timm.create_model(name, depth=1, **settings).state_dict())


@pytest.mark.parametrize(
    ("keys", "origin"),
    [
        (keys_of("beit_base_patch16_224"), "a BEiT"),
        (keys_of("eva_giant_patch14_224"), "a BEiT"),
        (keys_of("vit_base_patch16_224"), "a ViT of timm's"),
        (keys_of("deit_base_patch16_224"), "a ViT of timm's"),
        (keys_of("vit_base_patch16_224") | {"mask_token", "decoder_embed.weight"}, "a ViT of timm's"),
        (keys_of("vit_small_patch14_reg4_dinov2"), "a DINOv2"),
        (keys_of("vit_small_patch16_dinov3"), None),
        (keys_of("vit_small_patch16_dinov3_qkvb"), None),
        (keys_of("eva02_base_patch16_clip_224"), None),
        ({f"backbone.{key}" for key in keys_of("beit_base_patch16_224")}, None),
    ],
    ids=["beit", "eva", "vit", "deit", "mae", "dinov2", "dinov3", "dinov3 with biases", "eva02", "within a whole"],
)
def test_keys_alone_tell_the_family(keys: set[str], origin: str | None) -> None:
    """EVA's share a BEiT's names, and are then refused for their positions."""
    found = [each.name for each in ORIGINS if each.recognises(keys)]
    assert found == ([] if origin is None else [origin])
