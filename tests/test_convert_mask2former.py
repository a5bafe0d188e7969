"""Converting Mask2Formers: files of the zoo, old and new; mmseg's names; transformers' model, whose numbers are ours."""

import gzip
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from fixtures_dir import FIXTURES
from imagenet import normalised
from maskfirst import build
from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.convert import mask2former, pyramids
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.convert.rename import destinations, rename
from maskfirst.frames import Frame
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch

RULES = Path(__file__).parent / "fixtures" / "mask2former" / "keymap_mmseg_to_mask2former.json"
SWIN = {"kind": "pyramid", "widths": [8, 16, 32, 64], "depths": [2, 2, 2, 1], "heads": [1, 1, 2, 2], "window": 5}
RESNET = {"kind": "pyramid", "model": "resnet18", "norms": False, "freeze_norms": True}
LAYERS = {"encoder": 1, "decoder": 3}


def tree(backbone: Mapping[str, Any] = SWIN, **proposer: Any) -> dict[str, Any]:
    small = {"queries": 5, "width": 32, "mask_width": 32, "heads": 2, "encoder_layers": 1, "encoder_feedforward": 24}
    small |= {"decoder_layers": 3, "decoder_feedforward": 40}
    return {
        "vocabulary": ["a", "b", "c"],
        "proposer": {"kind": "mask2former", "backbone": dict(backbone), **small, **proposer},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }


def segmenter(told: dict[str, Any]) -> Segmenter:
    torch.manual_seed(0)
    model = Experiment(Recipe(told, "tiny.yaml")).segmenter().eval()
    # No number is left at its beginning, so that none can be mistaken for another.
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape).abs() if tensor.ndim < 2 else torch.randn(tensor.shape) * 0.2)
    return model


# ---- the original's names, made from ours


def head_keys() -> list[str]:
    """All of the original's head, as the module tree of a small one would list them."""
    pixels, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    pairs = [f"{pixels}input_proj.{level}.{part}" for level in range(3) for part in range(2)]
    pairs += [f"{pixels}{name}" for name in ("adapter_1.norm", "layer_1.norm", "mask_features")]
    attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for layer in range(LAYERS["encoder"]):
        place = f"{pixels}transformer.encoder.layers.{layer}."
        pairs += [f"{place}{name}" for name in ("norm1", "norm2", "linear1", "linear2")]
        pairs += [f"{place}self_attn.{name}" for name in attention]
    packed = []
    for layer in range(LAYERS["decoder"]):
        cross, own, feed = (
            f"{predictor}transformer_{name}_layers.{layer}." for name in ("cross_attention", "self_attention", "ffn")
        )
        pairs += [f"{cross}norm", f"{own}norm", f"{feed}norm", f"{feed}linear1", f"{feed}linear2"]
        pairs += [f"{cross}multihead_attn.out_proj", f"{own}self_attn.out_proj"]
        packed += [f"{cross}multihead_attn.in_proj", f"{own}self_attn.in_proj"]
    pairs += [
        f"{predictor}{name}" for name in ("decoder_norm", "class_embed", *(f"mask_embed.layers.{n}" for n in range(3)))
    ]
    return [
        *(f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")),
        *(f"{name}_{kind}" for name in packed for kind in ("weight", "bias")),
        f"{pixels}adapter_1.weight",
        f"{pixels}layer_1.weight",
        f"{pixels}transformer.level_embed",
        *(f"{predictor}{name}.weight" for name in ("query_feat", "query_embed", "level_embed")),
    ]


def swin_key(ours: str) -> str:
    name = ours.removeprefix("proposer.backbone.").removeprefix("trunk.")
    name = re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return "backbone." + re.sub(r"^norms\.(\d)", r"norm\1", name)


def resnet_key(ours: str) -> str:
    name = ours.removeprefix("proposer.backbone.trunk.")
    name = re.sub(r"^conv1", "stem.conv1", re.sub(r"^bn1", "stem.conv1.norm", name))
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\.bn(\d)", r".conv\1.norm", name)
    return "backbone." + name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def original(model: Segmenter, backbone_key: Callable[[str], str] = swin_key) -> dict[str, Tensor]:
    """The model's tensors as the original would have saved them."""
    own = model.state_dict()
    keys = [*head_keys(), *(backbone_key(key) for key in own if key.startswith("proposer.backbone."))]
    # The classifier's and the queries' names tell the spelling.
    homes = destinations(keys, mask2former.rules(keys))
    tensors = {key: torch.cat([own[home] for home in goals]) for key, goals in homes.items()}
    return tensors | {"criterion.empty_weight": torch.ones(4)}


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".pkl":
        content = {"model": {key: tensor.numpy() for key, tensor in tensors.items()}, "__author__": "third_party"}
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save({"model": tensors, "iteration": 3}, path)
    return path


def assert_same(path: Path, model: Segmenter) -> None:
    found = build.load(str(path)).state_dict()
    assert found.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(found[key], tensor), key


def early(key: str) -> str:
    return key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")


def doubled(key: str) -> str:
    return key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.pixel_decoder.pixel_decoder.")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("spelt", [str, early, doubled])
def test_files_of_all_ages_become_the_same_model(tmp_path: Path, suffix: str, spelt: Callable[[str], str]) -> None:
    model = segmenter(tree())
    tensors = {spelt(key): tensor for key, tensor in original(model).items()}
    tensors["backbone.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    report = convert(save(tmp_path / f"x{suffix}", tensors), Recipe(tree(), "tiny.yaml"), tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", model)
    assert report.origin == "Mask2Former"
    assert report.holds == ("a Mask2Former of 5 queries 32 wide for 3 classes on Swin 8 wide with 2, 2, 2, 1 blocks")
    assert set(report.left) == {
        "criterion.empty_weight",
        "backbone.layers.0.blocks.1.attn.relative_position_index",
    }
    assert report.tensors + len(report.left) == len(tensors)


def test_resnets_come_with_their_statistics(tmp_path: Path) -> None:
    model = segmenter(tree(RESNET))
    tensors = original(model, resnet_key)
    assert "backbone.res3.0.shortcut.norm.running_var" in tensors
    tensors["backbone.stem.conv1.norm.num_batches_tracked"] = torch.tensor(9)
    path = save(tmp_path / "x.pth", tensors)
    report = convert(path, Recipe(tree(RESNET), "tiny.yaml"), tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", model)
    assert "backbone.stem.conv1.norm.num_batches_tracked" in report.left


def test_projections_where_widths_differ_are_taken_over(tmp_path: Path) -> None:
    told = tree(pixel_width=64)
    model = segmenter(told)
    own = model.state_dict()
    tensors = original(model)
    for level in range(3):
        for kind in ("weight", "bias"):
            tensors[f"sem_seg_head.predictor.input_proj.{level}.{kind}"] = own[f"proposer.entrances.{level}.{kind}"]
    convert(save(tmp_path / "x.pth", tensors), Recipe(told, "tiny.yaml"), tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", model)


def test_every_key_is_spoken_for_or_nothing_is_written(tmp_path: Path) -> None:
    tensors = original(segmenter(tree()))
    tensors["sem_seg_head.predictor.surplus.weight"] = torch.zeros(1)
    del tensors["sem_seg_head.predictor.query_embed.weight"]
    path = save(tmp_path / "x.pth", tensors)
    with pytest.raises(
        ConvertError, match=r"without a rule \(1\): .*surplus.*without a source \(1\): proposer\.positions"
    ):
        convert(path, Recipe(tree(), "tiny.yaml"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ConvertError, match="which no bundled recipe is"):
        convert(path, None, tmp_path / "out.safetensors")


def test_a_file_s_name_tells_models_of_the_same_shapes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for task, file in (("first", "model_final_1.pkl"), ("second", "model_final_2.pkl")):
        told = tree() | {"published": {"checkpoint": file}}
        (bundle / f"mask2former-tiny-{task}.yaml").write_text(yaml.safe_dump(told))
    monkeypatch.setattr(recipes, "_BUNDLED", bundle)
    monkeypatch.setattr(pyramids, "_NAMES", {("Swin", 8, (2, 2, 2, 1)): "tiny"})
    monkeypatch.setattr(mask2former, "_DATA", {3: ("first", "second")})
    tensors = original(segmenter(tree()))
    for file, name in (("model_final_2.pkl", "second"), ("model_final_1.pkl", "first"), ("mine.pkl", "first")):
        report = convert(save(tmp_path / file, tensors), None, tmp_path / "out.safetensors")
        assert report.recipe == f"mask2former-tiny-{name}"


# ---- the zoo

ZOO = [name for name in recipes.names() if name.startswith("mask2former-")]
STEMS = {
    "r50": ("stem.conv1", 64, [3, 4, 6, 3]),
    "r101": ("stem.conv1", 64, [3, 4, 23, 3]),
    "swin-t": ("patch_embed.proj", 96, [2, 2, 6, 2]),
    "swin-s": ("patch_embed.proj", 96, [2, 2, 18, 2]),
    "swin-b": ("patch_embed.proj", 128, [2, 2, 18, 2]),
    "swin-b-22k": ("patch_embed.proj", 128, [2, 2, 18, 2]),
    "swin-l": ("patch_embed.proj", 192, [2, 2, 18, 2]),
}
CLASSES = {"coco-panoptic": 133, "coco-instance": 80, "ade20k-panoptic": 150, "ade20k-semantic": 150}
CLASSES |= {"ade20k-instance": 100, "cityscapes-panoptic": 19, "cityscapes-semantic": 19, "cityscapes-instance": 8}
CLASSES |= {"mapillary-panoptic": 65, "mapillary-semantic": 65}


def test_the_zoo_is_whole() -> None:
    assert len(ZOO) == 47
    published = [recipes.load(name).tree["published"] for name in ZOO]
    assert len({told["checkpoint"] for told in published}) == 47
    of = {name: told["scores"] for name, told in zip(ZOO, published, strict=True)}
    assert of["mask2former-swin-l-coco-panoptic"] == {"PQ": 57.8, "AP": 48.6, "mIoU": 67.4}
    assert of["mask2former-swin-l-coco-instance"] == {"AP": 50.1, "APb": 36.2}
    assert of["mask2former-swin-t-ade20k-semantic"] == {"mIoU": 47.7, "mIoU_tta": 49.6}


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_of_the_zoo_finds_its_recipe(name: str) -> None:
    """By its shapes, to the task that is named first where there are several of these."""
    backbone, data, task = re.fullmatch(r"mask2former-(.+)-(\w+)-(\w+)", name).groups()  # type: ignore[union-attr]
    stem, width, depths = STEMS[backbone]
    told = recipes.load(name)
    queries = told.tree["proposer"].get("queries", 100)
    assert queries == (200 if backbone == "swin-l" and task != "semantic" else 100)
    assert len(Experiment(told).vocabulary) == CLASSES[f"{data}-{task}"]
    block = "res{}.{}.conv1.weight" if stem.startswith("stem") else "layers.{}.blocks.{}.norm1.weight"
    first = 2 if stem.startswith("stem") else 0
    keys = [f"backbone.{block.format(first + stage, index)}" for stage in range(4) for index in range(depths[stage])]
    tensors = {key: torch.empty(1, device="meta") for key in keys}
    tensors[f"backbone.{stem}.weight"] = torch.empty(width, 3, 4, 4, device="meta")
    classes = CLASSES[f"{data}-{task}"]
    tensors["sem_seg_head.predictor.class_embed.weight"] = torch.empty(classes + 1, 256, device="meta")
    tensors["sem_seg_head.predictor.query_feat.weight"] = torch.empty(queries, 256, device="meta")
    planned = mask2former.plan(tensors)
    assert planned is not None
    same = {name, name.replace("-22k", ""), name.replace("semantic", "panoptic")}
    assert planned[0] in same
    assert planned[1] == ()


if FIXTURES is not None:
    MANIFESTS = FIXTURES / "proposals" / "manifests"

    def shapes_of(name: str) -> dict[str, Tensor]:
        with gzip.open(MANIFESTS / f"{name}.json.gz", "rt") as file:
            return {key: torch.empty(shape, device="meta") for key, shape in json.load(file).items()}

    def test_the_original_s_manifest_is_the_recipe_s() -> None:
        tensors = shapes_of("mask2former_swin_large_coco_panoptic")
        assert mask2former.plan(tensors) == ("mask2former-swin-l-coco-panoptic", ())
        model = Experiment(recipes.load("mask2former-swin-l-coco-panoptic")).segmenter(meta=True)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        renamed = rename(tensors, mask2former.rules(tensors), own)
        assert all(re.search(r"relative_position_index$|^criterion\.", key) for key in renamed.left)
        assert len(renamed.homes) + len(renamed.left) == len(tensors) == 650
        taken = sum(tensors[key].numel() for key in renamed.homes)
        assert taken == sum(parameter.numel() for parameter in model.parameters())

    def test_the_head_of_internimage_s_manifest_is_ours() -> None:
        tensors = shapes_of("internimage_h_mask2former_ade20k")
        assert mask2former.facts(tensors).queries == 200
        head = {key: tensor for key, tensor in tensors.items() if key.startswith("decode_head.")}
        told = tree(
            {"kind": "pyramid", "model": "convnext_tiny", "norms": False},
            queries=200, width=1024, mask_width=1024, heads=32, encoder_layers=6, encoder_feedforward=4096,
            decoder_layers=9, decoder_feedforward=4096,
        ) | {"vocabulary": "ade20k"}  # fmt: skip
        model = Experiment(Recipe(told, "tiny.yaml")).segmenter(meta=True)
        # Its backbone has other widths, on which only the entrances depend.
        own = {key: tensor.shape for key, tensor in model.state_dict().items() if ".backbone." not in key}
        for level, width in enumerate((2560, 1280, 640)):
            own[f"proposer.pixel_decoder.entrances.{level}.0.weight"] = torch.Size([1024, width, 1, 1])
        own["proposer.pixel_decoder.lateral.0.weight"] = torch.Size([1024, 320, 1, 1])
        renamed = rename(head, mask2former.rules(head), own)
        assert len(renamed.homes) == len(head)


# ---- mmseg's names


def mmseg_keys() -> list[str]:
    """All of mmseg's head, for the layers of the small model."""
    head, pixels = "decode_head.", "decode_head.pixel_decoder."
    pairs = [f"{pixels}input_convs.{level}.{part}" for level in range(3) for part in ("conv", "gn")]
    pairs += [f"{pixels}{name}" for name in ("lateral_convs.0.gn", "output_convs.0.gn", "mask_feature")]
    pairs += [f"{head}{name}" for name in ("cls_embed", "mask_embed.0", "mask_embed.2", "mask_embed.4")]
    pairs += [f"{head}transformer_decoder.post_norm"]
    feed = ("ffns.0.layers.0.0", "ffns.0.layers.1")
    for layer in range(LAYERS["encoder"]):
        place = f"{pixels}encoder.layers.{layer}."
        pairs += [f"{place}{name}" for name in ("norms.0", "norms.1", *feed)]
        names = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        pairs += [f"{place}attentions.0.{name}" for name in names]
    packed = []
    for layer in range(LAYERS["decoder"]):
        place = f"{head}transformer_decoder.layers.{layer}."
        pairs += [f"{place}{name}" for name in ("norms.0", "norms.1", "norms.2", *feed)]
        pairs += [f"{place}attentions.{index}.attn.out_proj" for index in range(2)]
        packed += [f"{place}attentions.{index}.attn.in_proj" for index in range(2)]
    return [
        *(f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")),
        *(f"{name}_{kind}" for name in packed for kind in ("weight", "bias")),
        *(f"{pixels}{name}.conv.weight" for name in ("lateral_convs.0", "output_convs.0")),
        f"{pixels}level_encoding.weight",
        *(f"{head}{name}.weight" for name in ("query_feat", "query_embed", "level_embed")),
    ]


def test_mmseg_s_names_lead_where_the_original_s_do() -> None:
    """The 26 rules by which the one become the other were proven bit for bit."""
    table = [(re.compile(match), to) for match, to in json.loads(RULES.read_text())]
    assert len(table) == 26
    theirs = mmseg_keys()
    renamed = []
    for key in theirs:
        (fitting,) = [(match, to) for match, to in table if match.search(key)]
        renamed.append("sem_seg_head." + fitting[0].sub(fitting[1], key))
    assert sorted(renamed) == sorted(head_keys())
    ours, same = (destinations(keys, mask2former.rules(keys)) for keys in (theirs, renamed))
    assert [ours[key] for key in theirs] == [same[key] for key in renamed]


# ---- transformers


@pytest.fixture(scope="module")
def theirs() -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8, depths=[2, 2, 2, 1], num_heads=[1, 1, 2, 2], window_size=5, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=24,
        dim_feedforward=40, encoder_layers=1, decoder_layers=4, num_attention_heads=2, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + norm)
    return model


@pytest.mark.parametrize("names", ["of the file", "in memory"])
def test_transformers_model_has_our_numbers(
    theirs: Mask2FormerForUniversalSegmentation, tmp_path: Path, names: str
) -> None:
    if names == "of the file":
        theirs.save_pretrained(tmp_path)
    else:
        tensors = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", Recipe(tree(), "tiny.yaml"), tmp_path / "out.safetensors")
    assert all("layernorm" in key or key.startswith("criterion") for key in report.left)
    model = build.load(str(tmp_path / "out.safetensors"))
    pixels = torch.rand(2, 3, 64, 96) * 255
    frame = Frame((64, 96), (64, 96), (64, 96))
    with torch.inference_mode():
        proposals, said = model(Batch(pixels, ("panoptic",) * 2, (frame,) * 2, ("",) * 2))
        expected = theirs(pixel_values=normalised(pixels), pixel_mask=torch.ones(2, 64, 96, dtype=torch.long))
    torch.testing.assert_close(proposals.masks, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.logits, expected.class_queries_logits, atol=1e-4, rtol=1e-4)
