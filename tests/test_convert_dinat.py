"""DiNAT's weights: every key of a backbone has its place, in OneFormer's and Mask2Former's files and alone."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from maskfirst import build
from maskfirst.backbones.dinat import DiNAT
from maskfirst.convert import dinat, pyramids
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.convert.rename import RenameError, rename
from maskfirst.recipe import Recipe
from parity.tables import read_json
from test_convert_mask2former import assert_same, original, save, segmenter, tree

MANIFEST = Path(__file__).parent / "fixtures" / "dinat" / "manifests" / "oneformer_dinat_large_ade20k.json.gz"
SMALL: Mapping[str, Any] = {
    "kind": "dinat",
    "width": 8,
    "depths": [1, 1, 2, 1],
    "heads": [1, 2, 2, 4],
    "kernel": 3,
    "dilations": [[2], [1], [1, 2], [1]],
    "mlp_ratio": 2.0,
}
NAMES = {
    "attention.bias": "attn.rpb",
    "attention.": "attn.",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
    "scale": "gamma",
}


def theirs(ours: str) -> str:
    """The original's name, as its modules are nested."""
    name = re.sub(r"^norms\.", "norm", ours.removeprefix("proposer.backbone."))
    name = name.replace("stages.0.entrance.convolutions.", "patch_embed.proj.").replace(
        "stages.0.entrance", "patch_embed"
    )
    name = name.replace("convolutions.0", "reduction")
    name = re.sub(r"stages\.(\d)\.entrance", lambda match: f"levels.{int(match[1]) - 1}.downsample", name)
    for own, foreign in NAMES.items():
        name = name.replace(own, foreign)
    return f"backbone.{name.replace('stages', 'levels')}"


def alone(**changes: Any) -> DiNAT:
    def as_tuples(value: Any) -> Any:
        return tuple(as_tuples(each) for each in value) if isinstance(value, list) else value

    torch.manual_seed(0)
    return DiNAT(**({key: as_tuples(value) for key, value in SMALL.items() if key != "kind"} | changes))


def classifier(made: DiNAT) -> dict[str, Tensor]:
    """As classification leaves it: without the maps' norms, with a norm and a head of its own."""
    named = {theirs(key).removeprefix("backbone."): tensor for key, tensor in made.state_dict().items()}
    kept = {key: tensor for key, tensor in named.items() if not re.match(r"norm\d", key)}
    return kept | {f"{name}.{kind}": torch.zeros(3) for name in ("norm", "head") for kind in ("weight", "bias")}


def test_the_backbone_of_oneformer_s_manifest_is_ours() -> None:
    """Every key of DiNAT-L, and as many parameters."""
    told = {key: shape for key, shape in read_json(MANIFEST).items() if key.startswith("backbone.")}
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in told.items()}
        made = DiNAT("l")
    spelling = pyramids.spelling(told)
    assert spelling is not None
    assert spelling.name(tensors) == "dinat-l"
    shapes = {f"{dinat.BACKBONE}{key}": tensor.shape for key, tensor in made.state_dict().items()}
    renamed = rename(tensors, spelling.rules(), shapes)
    assert len(renamed.homes) == len(told) == 413
    assert sum(parameter.numel() for parameter in made.parameters()) == sum(prod(shape) for shape in told.values())
    assert {theirs(home) for homes in renamed.homes.values() for home in homes} == set(told)


def test_a_mask2former_on_dinat_is_converted_whole(tmp_path: Path) -> None:
    told = tree(SMALL)
    model = segmenter(told)
    path = save(tmp_path / "x.pth", original(model, theirs))
    report = convert(path, Recipe(told, "tiny.yaml"), tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", model)
    assert report.holds.endswith("on DiNAT 8 wide with 1, 1, 2, 1 blocks")
    with pytest.raises(ConvertError, match="which no bundled recipe is"):
        convert(path, None, tmp_path / "out.safetensors")


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_backbone_of_classification_becomes_weights(tmp_path: Path, scale: float | None) -> None:
    made = alone(layer_scale=scale)
    path = save(tmp_path / "cls.pth", classifier(made))
    report = convert(path, None, tmp_path / "out.safetensors")
    assert report.origin == "a DiNAT"
    assert set(report.left) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    found = load_file(tmp_path / "out.safetensors")
    own = {key: tensor for key, tensor in made.state_dict().items() if not key.startswith("norms.")}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_weights_of_smaller_windows_go_into_a_recipe(tmp_path: Path) -> None:
    """Where the tables of biases are resized, and the maps' norms begin by themselves."""
    told = tree({**SMALL, "kernel": 5})
    convert(save(tmp_path / "cls.pth", classifier(alone())), None, tmp_path / "out.safetensors")
    told["proposer"]["backbone"]["weights"] = str(tmp_path / "out.safetensors")
    experiment = build.Experiment(Recipe(told, "tiny.yaml"))
    backbone = experiment.segmenter().proposer.get_submodule("backbone")
    own = alone().state_dict()
    found = backbone.state_dict()
    assert found["stages.2.blocks.1.attention.bias"].shape == (2, 9, 9)
    assert all(torch.equal(found[key], own[key]) for key in own if not re.search(r"attention\.bias", key))


def test_a_recipe_that_it_fits_is_told_so(tmp_path: Path) -> None:
    path = save(tmp_path / "cls.pth", classifier(alone()))
    report = convert(path, Recipe(tree({**SMALL, "kernel": 5}), "tiny.yaml"), tmp_path / "out.safetensors")
    assert any("resizes" in note for note in report.notes)
    assert any("begins by itself" in note and "norms" in note for note in report.notes)
    with pytest.raises(ConvertError, match=r"does not fit proposer\.backbone of"):
        convert(path, Recipe(tree({**SMALL, "width": 16}), "tiny.yaml"), tmp_path / "out.safetensors")


def test_what_is_missing_or_unknown_is_told(tmp_path: Path) -> None:
    tensors = classifier(alone())
    with pytest.raises(ConvertError, match=r"without a rule \(1\): levels\.0\.blocks\.0\.surplus"):
        convert(
            save(tmp_path / "more.pth", tensors | {"levels.0.blocks.0.surplus": torch.zeros(1)}),
            None,
            tmp_path / "o.safetensors",
        )
    del tensors["levels.2.blocks.0.attn.rpb"]
    with pytest.raises(ConvertError, match=r"has no 'levels\.2\.blocks\.0\.attn\.rpb'"):
        convert(save(tmp_path / "less.pth", tensors), None, tmp_path / "o.safetensors")
    tensors["levels.0.blocks.0.attn.rpb"] = torch.zeros(1, 7, 7)
    with pytest.raises(ConvertError, match="windows have an odd side"):
        convert(save(tmp_path / "even.pth", tensors), None, tmp_path / "o.safetensors")


def test_shapes_that_do_not_fit_are_named() -> None:
    with torch.device("meta"):
        made = alone()
        tensors = {theirs(key): tensor for key, tensor in made.state_dict().items()}
    shapes = {f"{dinat.BACKBONE}{key}": tensor.shape for key, tensor in made.state_dict().items()}
    tensors["backbone.levels.0.blocks.0.attn.rpb"] = torch.zeros(1, 9, 9)
    with pytest.raises(RenameError) as raised:
        rename(tensors, dinat.backbone(), shapes)
    (misfit,) = raised.value.misfits
    assert misfit.found == (1, 9, 9)
