"""Uni-Perceiver: its network from its description alone, on the original's keys, and its weights in every place they go."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst import recipe as recipes
from maskfirst import weights
from maskfirst.backbones.uni_perceiver import UniPerceiver
from maskfirst.backbones.vit import resize_positions
from maskfirst.build import Experiment
from maskfirst.convert import uni_perceiver
from maskfirst.convert.catalogue import ORIGINS, ConvertError, convert
from maskfirst.convert.rename import rename
from maskfirst.optim import parameter_groups
from maskfirst.recipe import Recipe

D, DEPTH, HEADS, PATCH, SIDE = 24, 2, 3, 16, 3
PLACE = "proposer.backbone.trunk"
SMALL: dict[str, Any] = {"width": D, "depth": DEPTH, "heads": HEADS}
BARE: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def original() -> dict[str, Tensor]:
    """Random weights under the original's keys, for pictures of 48 px."""
    torch.manual_seed(0)
    embed, shapes = "visual_embed.", dict[str, tuple[int, ...]]()

    def pair(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    pair(f"{embed}embeddings_norm", D)
    pair(f"{embed}patch_embed.proj", D, 3, PATCH, PATCH)
    shapes[f"{embed}patch_embed.spatial_pos_embed.weight"] = (SIDE * SIDE, D)
    shapes[f"{embed}patch_embed.temporal_pos_embed.weight"] = (8, D)
    for index in range(DEPTH):
        layer = f"layers.{index}."
        shapes |= {f"{layer}gamma_1": (D,), f"{layer}gamma_2": (D,)}
        for name, shape in {
            "norm1": (D,), "norm2": (D,), "self_attn.in_proj": (3 * D, D), "self_attn.out_proj": (D, D),
            "linear1": (4 * D, D), "linear2": (D, 4 * D),
        }.items():  # fmt: skip
            pair(f"{layer}{name}", *shape)
    return {key: torch.randn(shape).double() * 0.4 for key, shape in shapes.items()}


def trunk(**settings: Any) -> UniPerceiver:
    """One of the original's weights."""
    made = UniPerceiver((48, 48), **{**SMALL, **settings}).double().eval()
    shapes = {key: tensor.shape for key, tensor in made.state_dict().items()}
    made.load_state_dict(rename(original(), uni_perceiver.rules(), shapes).tensors)
    return made


def run(made: UniPerceiver, pixels: Tensor) -> Tensor:
    tokens, grid = made.embed(pixels)
    for index in range(made.depth):
        tokens = made.block(index, tokens, grid)
    return made.norm(tokens)


def by_the_text(pixels: Tensor) -> Tensor:
    """The tokens after the last layer, step by step from the description, for normalised pixels of whole patches."""
    told = original()

    def norm(tokens: Tensor, name: str) -> Tensor:
        return F.layer_norm(tokens, (D,), told[f"{name}.weight"], told[f"{name}.bias"], 1e-5)

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ told[f"{name}.weight"].T + told[f"{name}.bias"]

    embed = "visual_embed.patch_embed."
    maps = F.conv2d(pixels, told[f"{embed}proj.weight"], told[f"{embed}proj.bias"], stride=PATCH)
    places = told[f"{embed}spatial_pos_embed.weight"].T.view(1, D, SIDE, SIDE)
    places = F.interpolate(places, maps.shape[-2:], mode="bicubic", align_corners=False)
    tokens = (maps + places).flatten(2).transpose(1, 2) + told[f"{embed}temporal_pos_embed.weight"][0]
    tokens = norm(tokens, "visual_embed.embeddings_norm")
    for index in range(DEPTH):
        layer = f"layers.{index}."
        batch, count, _ = tokens.shape
        packed = linear(norm(tokens, f"{layer}norm1"), f"{layer}self_attn.in_proj")
        query, key, value = packed.view(batch, count, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        seen = (query @ key.transpose(2, 3) * (D // HEADS) ** -0.5).softmax(-1) @ value
        seen = linear(seen.transpose(1, 2).reshape(batch, count, D), f"{layer}self_attn.out_proj")
        tokens = tokens + told[f"{layer}gamma_1"] * seen
        hidden = F.gelu(linear(norm(tokens, f"{layer}norm2"), f"{layer}linear1"))
        tokens = tokens + told[f"{layer}gamma_2"] * linear(hidden, f"{layer}linear2")
    return tokens


@pytest.mark.parametrize("size", [(48, 48), (64, 96), (32, 16)], ids=str)
def test_it_is_the_network_of_its_description(size: tuple[int, int]) -> None:
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    made = trunk(**BARE)
    assert made.prefix == 0
    torch.testing.assert_close(run(made, pixels), by_the_text(pixels))


def test_it_normalises_for_itself() -> None:
    pixels = torch.rand(1, 3, 48, 48).double() * 255
    mean, std = (10.0, 20.0, 30.0), (2.0, 3.0, 4.0)
    scaled = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(run(trunk(mean=mean, std=std), pixels), by_the_text(scaled))


def test_everything_learns() -> None:
    """Scales do at once, and what they scale as soon as they are not 0, with which they begin."""
    made = UniPerceiver((48, 48), **SMALL)
    assert not any(block.ls1.gamma.any() or block.ls2.gamma.any() for block in made.plain.vit.blocks)
    run(made, torch.rand(1, 3, 64, 40) * 255).square().sum().backward()
    assert all(block.ls1.gamma.grad.any() and block.ls2.gamma.grad.any() for block in made.plain.vit.blocks)
    made = trunk()
    run(made, torch.rand(1, 3, 64, 40).double() * 255).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())


def recipe(**own: Any) -> Recipe:
    inside = {"kind": "uni_perceiver", "size": [48, 48], **SMALL, **own}
    tree = {
        "vocabulary": ["a", "b"],
        "proposer": {"kind": "dense", "backbone": {"kind": "taps", "depths": [1], "trunk": inside}},
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel"},
        "train": {"steps": 10, "batch": 1, "groups": [{"match": rf"{re.escape(PLACE)}\..*", "layer_decay": 0.5}]},
    }
    return Recipe(tree, "tiny.yaml")


def test_what_comes_before_the_blocks_learns_slowest() -> None:
    experiment = Experiment(recipe())
    parameters = dict(experiment.segmenter(meta=True).named_parameters())
    training = experiment.training()
    groups = parameter_groups(parameters, training.optimizer, training.groups)
    factors = {name: group["lr"] / training.optimizer.lr for group in groups for name in group["names"]}
    first = {name.removeprefix(f"{PLACE}.") for name, factor in factors.items() if factor == 0.5**3}
    assert first == {
        "moment", "embedding_norm.weight", "embedding_norm.bias", "plain.vit.pos_embed", "plain.vit.patch_embed.proj.weight",
        "plain.vit.patch_embed.proj.bias",
    }  # fmt: skip


def test_a_release_becomes_weights_for_a_trunk(tmp_path: Path) -> None:
    told, out = original(), tmp_path / "out.safetensors"
    torch.save(told, tmp_path / "uni-perceiver.pth")
    assert [each.name for each in ORIGINS if each.recognises(told.keys())] == ["a Uni-Perceiver"]
    report = convert(tmp_path / "uni-perceiver.pth", recipe(), out)
    assert (report.origin, report.tensors, dict(report.left)) == ("a Uni-Perceiver", len(told), {})
    experiment = Experiment(recipes.override(recipe(), [f"{PLACE}.weights={out}"]))
    own = experiment.segmenter().proposer.get_submodule("backbone.trunk").state_dict()
    (loaded,) = experiment.loaded
    assert (loaded.resized, loaded.reset, loaded.unused) == ((), (), ())
    assert all(torch.equal(own[name], tensor.float()) for name, tensor in trunk().state_dict().items())


def test_positions_of_other_pictures_are_resized_where_they_are_loaded(tmp_path: Path) -> None:
    torch.save(original(), tmp_path / "uni-perceiver.pth")
    wide, out = recipe(size=[64, 64]), tmp_path / "out.safetensors"
    report = convert(tmp_path / "uni-perceiver.pth", wide, out)
    assert report.notes[0] == "note: tiny resizes: plain.vit.pos_embed"
    made = UniPerceiver((64, 64), **SMALL)
    assert weights.load_part(made, out, PLACE).resized == ("plain.vit.pos_embed",)
    places = original()["visual_embed.patch_embed.spatial_pos_embed.weight"].float()[None]
    torch.testing.assert_close(made.plain.vit.pos_embed.data, resize_positions(places, (4, 4)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"layers.1.gamma_1": None},
            "the checkpoint does not fit the model: keys of the model without a source (1): plain.vit.blocks.1.ls1.gamma",
        ),
        (
            {"visual_embed.patch_embed.spatial_pos_embed.weight": torch.zeros(10, D)},
            "the checkpoint does not fit the model: of another shape (1): plain.vit.pos_embed [1, 10, 24] must be [1, 9, 24]",
        ),
        (
            {"token_embed.weight": torch.zeros(1)},
            "the checkpoint does not fit the model: keys of it without a rule (1): token_embed.weight",
        ),
        (
            {"visual_embed.patch_embed.proj.weight": torch.zeros(())},
            "looks like a Uni-Perceiver, but its tensors have other axes; is it whole?",
        ),
    ],
    ids=["no scale", "oblong", "surplus", "no axes"],
)
def test_what_cannot_be_taken_over_is_told(tmp_path: Path, change: dict[str, Tensor | None], told: str) -> None:
    tensors = {key: tensor for key, tensor in (original() | change).items() if tensor is not None}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ConvertError) as caught:
        convert(tmp_path / "x.pth", None, tmp_path / "out.safetensors")
    assert str(caught.value) == f"{tmp_path / 'x.pth'}: {told}"
