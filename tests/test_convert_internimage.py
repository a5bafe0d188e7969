"""InternImage's checkpoints: every key of whole models and of backbones alone has its place; what cannot be is a sentence."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixtures_dir import FIXTURES
from maskfirst import recipe as recipes
from maskfirst.backbones.internimage import InternImage
from maskfirst.build import Experiment
from maskfirst.convert import internimage
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.convert.rename import Misfit, RenameError, destinations, rename
from parity.rows import table
from parity.runner import run
from parity.tables import read_json

SUBSET = Path(__file__).parent / "fixtures" / "internimage" / "manifests"
GROUPS = {"t": (1, 2, 4, 4), "b": (1, 2, 4, 4), "h": (1, 2, 4, 8), "g": (1, 2, 4, 4)}


def theirs(made: InternImage, after: bool) -> dict[str, Tensor]:
    """A backbone's tensors by the original's names, as its modules are nested there."""
    found = {}
    side = "after" if after else "before"
    names = {
        "look.part.depthwise": "dcn.dw_conv.0", "look.part.norm": "dcn.dw_conv.1.1", "look.part.offsets": "dcn.offset",
        "look.part.weights": "dcn.mask", "look.part.value": "dcn.input_proj", "look.part.output": "dcn.output_proj",
        "mix.part.0": "mlp.fc1", "mix.part.2": "mlp.fc2", f"look.{side}": "norm1.0", f"mix.{side}": "norm2.0",
        "look.after": "res_post_norm1.0", "mix.after": "res_post_norm2.0",
    }  # fmt: skip
    if after:
        names |= {"look.after": "norm1.0", "mix.after": "norm2.0"}
    stem = {"0.convolution": "conv1", "0.norm": "norm1.1", "2.convolution": "conv2", "2.norm": "norm2.1"}
    for key, tensor in made.state_dict().items():
        _, stage, place, *rest = key.split(".")
        inner, kind = ".".join(rest[:-1]), rest[-1]
        if place == "entrance":
            halved = f"levels.{int(stage) - 1}.downsample.{'conv' if inner == 'convolution' else 'norm.1'}.{kind}"
            home = halved if stage != "0" else f"patch_embed.{stem[inner]}.{kind}"
        elif place == "blocks":
            index, part = rest[0], ".".join(rest[1:-1])
            if kind == "scale":
                inside = "gamma1" if part == "look" else "gamma2"
            elif part == "look.part.centre":
                inside = f"dcn.center_feature_scale_proj_{kind}"
            else:
                inside = f"{names[part]}.{kind}"
            home = f"levels.{stage}.blocks.{index}.{inside}"
        else:
            home = f"levels.{stage}.{'.'.join((place, *rest[:-1]))}.0.{kind}"
        found[home] = tensor
    return found


def small(model: str, **changes: object) -> InternImage:
    between = {"h": (1,), "g": (0, 1)}.get(model, ())
    return InternImage(model, 8, (1, 1, 2, 1), GROUPS[model], post_norms=between, **changes)  # pyright: ignore


@pytest.mark.parametrize("model", GROUPS)
def test_a_backbone_of_classification_becomes_weights(tmp_path: Path, model: str) -> None:
    made = small(model)
    head = {f"{name}.weight": torch.zeros(3) for name in ("conv_head.0", "head", "dcnv3_head_x4.0", "fc_norm")}
    torch.save({"model": theirs(made, model in "bg") | head}, tmp_path / "cls.pth")
    report = convert(tmp_path / "cls.pth", None, tmp_path / "out.safetensors")
    assert report.origin == "an InternImage"
    assert set(report.left) == set(head)
    found = load_file(tmp_path / "out.safetensors")
    own = made.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_scales_that_classification_has_not_begin_with_nothing(tmp_path: Path) -> None:
    """InternImage-T's file; the recipe's scales are 1."""
    with torch.device("meta"):
        full = InternImage()
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in theirs(full, False).items() if ".gamma" not in key}
    save_file(tensors, tmp_path / "cls.safetensors")
    report = convert(
        tmp_path / "cls.safetensors", recipes.load("internimage-t-upernet-ade20k"), tmp_path / "t.safetensors"
    )
    assert any("begins by itself" in note and "blocks.0.look.scale" in note for note in report.notes)
    with pytest.raises(ConvertError, match=r"does not fit proposer\.backbone of internimage-s-upernet-ade20k"):
        convert(tmp_path / "cls.safetensors", recipes.load("internimage-s-upernet-ade20k"), tmp_path / "s.safetensors")


def test_what_is_not_whole_is_a_sentence(tmp_path: Path) -> None:
    tensors = theirs(small("t"), False)
    del tensors["patch_embed.conv2.weight"]
    save_file(tensors, tmp_path / "cls.safetensors")
    with pytest.raises(ConvertError, match=r"looks like an InternImage, but has no 'patch_embed\.conv2\.weight'"):
        convert(tmp_path / "cls.safetensors", None, tmp_path / "out.safetensors")


def manifest(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {key: torch.empty(shape) for key, shape in read_json(SUBSET / f"{name}.json.gz").items()}


def test_the_subset_of_the_manifests_holds() -> None:
    rows = run(SUBSET)
    assert len(rows) == 2
    assert all(row.passed for row in rows), table(rows)


@pytest.mark.parametrize("name", ["internimage_t_upernet_ade20k", "internimage_h_mask2former_ade20k"])
def test_one_key_more_or_less_shows(tmp_path: Path, name: str) -> None:
    told = read_json(SUBSET / f"{name}.json.gz")
    for change in ({"backbone.levels.0.blocks.0.dcn.offset_scale": [1]}, {"backbone.patch_embed.conv1.bias": [3]}):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(told | change).encode()))
        assert not all(row.passed for row in run(tmp_path))


def test_shapes_tell_the_model_and_its_recipe() -> None:
    whole = manifest("internimage_h_mask2former_ade20k")
    assert internimage.recognises(whole.keys())
    assert not internimage.is_alone(whole.keys())
    assert str(internimage.facts(whole)) == "InternImage-H with Mask2Former for 150 classes"
    assert internimage.plan(whole) == ("internimage-h-mask2former-ade20k", ())
    upernet = manifest("internimage_t_upernet_ade20k")
    assert str(internimage.facts(upernet)) == "InternImage-T with UperNet for 150 classes"
    deeper = upernet | {"backbone.levels.3.blocks.4.dcn.mask.bias": torch.empty(288, device="meta")}
    assert str(internimage.facts(deeper)) == "an InternImage 64 wide with UperNet for 150 classes"
    assert internimage.plan(deeper) is None


def test_of_cityscapes_classifiers_the_rows_that_count_are_taken(tmp_path: Path) -> None:
    """The released files for Cityscapes have ADE20K's number of rows, and name Cityscapes' classes."""
    narrow = ["proposer.width=8", "proposer.auxiliary_width=8", "proposer.backbone={width: 8, groups: [1, 2, 4, 4]}"]
    recipe = recipes.load("internimage-t-upernet-cityscapes", narrow)
    experiment = Experiment(recipe)
    own = experiment.segmenter(meta=True).state_dict()
    whole = manifest("internimage_t_upernet_ade20k")
    homes = destinations(whole, internimage.rules(whole.keys()))
    tensors = {key: torch.rand(own[goal].shape) for key, (goal,) in homes.items()}
    heads = [f"{head}.conv_seg.{kind}" for head in ("decode_head", "auxiliary_head") for kind in ("weight", "bias")]
    tensors |= {key: torch.rand(150, *tensors[key].shape[1:]) for key in heads}
    meta = {"CLASSES": experiment.vocabulary.names}
    torch.save({"meta": meta, "state_dict": tensors}, tmp_path / "mine.pth")
    report = convert(tmp_path / "mine.pth", recipe, tmp_path / "out.safetensors")
    assert set(report.left) == {f"rows 19.. of {key}" for key in heads}
    assert not report.notes
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["proposer.classifier.weight"], tensors["decode_head.conv_seg.weight"][:19])
    assert torch.equal(found["proposer.auxiliary.2.bias"], tensors["auxiliary_head.conv_seg.bias"][:19])
    with pytest.raises(ConvertError, match="8 wide with UperNet for 19 classes, which no bundled recipe is"):
        convert(tmp_path / "mine.pth", None, tmp_path / "out.safetensors")
    counted = whole | internimage.spare(whole, 19)
    assert internimage.plan(counted) == ("internimage-t-upernet-cityscapes", ())
    assert internimage.spare(whole, 150) == internimage.spare(manifest("internimage_h_mask2former_ade20k"), 19) == {}


if FIXTURES is not None:

    def test_every_backbone_key_of_oneformer_s_has_its_place() -> None:
        assert FIXTURES is not None
        told = read_json(FIXTURES / "proposals" / "manifests" / "oneformer_internimage_h_ade20k.json.gz")
        with torch.device("meta"):
            made = InternImage("h")
            tensors = {key: torch.empty(shape) for key, shape in told.items() if key.startswith("backbone.")}
        shapes = {f"{internimage.BACKBONE}{key}": tensor.shape for key, tensor in made.state_dict().items()}
        assert len(rename(tensors, internimage.backbone(tensors.keys()), shapes).homes) == len(tensors)
        tensors["backbone.levels.2.post_norms.4.0.bias"] = torch.empty(7, device="meta")
        with pytest.raises(RenameError) as caught:
            rename(tensors, internimage.backbone(tensors.keys()), shapes)
        home = f"{internimage.BACKBONE}stages.2.post_norms.4.bias"
        assert caught.value.misfits == (Misfit(home, (7,), (1280,)),)
