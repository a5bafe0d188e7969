"""DINOv2s become weights of trunks, their class token's position what ViT-P gives its points; other sizes are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import offline
from maskfirst import build, recipe, weights
from maskfirst.build import Experiment
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.namers.vit_p import ViTP
from maskfirst.recipe import Recipe
from maskfirst.weights import WeightsError

WIDTH, DEPTH, HEADS, SIDE = 24, 2, 3, 5
"""Of the small DINOv2s here, whose position tables have 5 x 5 patches of 14 px."""
REGISTERS = 4
PATCH = 14
SIZE = (4 * PATCH, 6 * PATCH)

Tensors = dict[str, Tensor]


def made(registers: bool = False, gated: bool = False, width: int = WIDTH, depth: int = DEPTH) -> Tensors:
    """A DINOv2 by the names of its release, its numbers away from where training begins."""
    hidden = (int(width * 5.33334), int(width * 5.33334) // 2) if gated else (4 * width, 4 * width)
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + SIDE * SIDE, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, REGISTERS, width)
    for block in (f"blocks.{index}" for index in range(depth)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
        for linear, (into, out) in {
            "attn.qkv": (width, 3 * width),
            "attn.proj": (width, width),
            f"mlp.{first}": (width, hidden[0]),
            f"mlp.{second}": (hidden[1], width),
        }.items():
            shapes |= {f"{block}.{linear}.weight": (out, into), f"{block}.{linear}.bias": (out,)}
    random = torch.Generator().manual_seed(7)
    return {key: torch.randn(shape, generator=random) / math.sqrt(shape[-1]) for key, shape in shapes.items()}


def point_classifier(classes: int = 3, **told: Any) -> Tensors:
    """A ViT-P by the names of its release."""
    found = made(**told)
    width = found.pop("cls_token").shape[-1]
    random = torch.Generator().manual_seed(8)
    found["cls_embeddings.weight"] = torch.randn(width, 2, generator=random)
    found["head.weight"] = torch.randn(classes, width, generator=random)
    found["head.bias"] = torch.randn(classes, generator=random)
    return found


def plain(theirs: Tensors) -> Any:
    return theirs


def trained(theirs: Tensors) -> Any:
    """As its training saves a teacher, with blocks in chunks and heads beside the backbone."""
    chunked = {key.replace("blocks.", "blocks.0.", 1): tensor for key, tensor in theirs.items()}
    return {"teacher": {f"backbone.{key}": tensor for key, tensor in chunked.items()} | {"dino_head.x": torch.ones(1)}}


def flat(theirs: Tensors) -> Any:
    return {f"teacher.backbone.{key}": tensor for key, tensor in theirs.items()}


def of_timm(theirs: Tensors) -> Any:
    """What timm makes of them."""
    letter = "giant" if any("w12" in key for key in theirs) else "base"
    registers = "reg4_" if "register_tokens" in theirs else ""
    model: Any = timm.create_model(
        f"vit_{letter}_patch14_{registers}dinov2",
        num_classes=0,
        img_size=SIDE * PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        global_pool="",
    )
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(theirs), model))
    return model.state_dict()


SPELLINGS = (plain, trained, flat, of_timm)


def points_recipe(
    registers: bool = False, gated: bool = False, classes: int = 3, width: int = WIDTH, depth: int = DEPTH, **trunk: Any
) -> Recipe:
    """A small ViT-P, which takes normalised pictures."""
    told = {
        "kind": "vit",
        "model": f"vit_{'giant' if gated else 'base'}_patch14_{'reg4_' if registers else ''}dinov2",
        "width": width,
        "depth": depth,
        "heads": HEADS,
        "size": [SIDE * PATCH, SIDE * PATCH],
        "class_token": "absent",
        "interpolate_offset": 0.1,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    tree = {
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {"kind": "oracle"},
        "namer": {"kind": "vit_p", "trunk": told | trunk, "size": list(SIZE)},
        "criterion": {"kind": "pixel"},
    }
    return Recipe(tree, "points.yaml")


def written(folder: Path, theirs: Any) -> Path:
    torch.save(theirs, folder / "theirs.pth")
    return folder / "theirs.pth"


def cubic(count: int) -> Tensor:
    """Weights by which an axis of SIDE positions becomes one of `count`: the closed form of the original's resizing."""
    found = torch.zeros(count, SIDE)
    for place in range(count):
        source = (place + 0.5) * SIDE / (count + 0.1) - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            x = abs(source - tap)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            found[place, min(max(tap, 0), SIDE - 1)] += weight
    return found


def by_hand(theirs: Tensors, encoder: Tensor, head: tuple[Tensor, Tensor], pixels: Tensor, where: Tensor) -> Tensor:
    """ViT-P on the tensors of a DINOv2, by the formulas of its description."""
    grid = (pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH)
    kernel, bias = theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"]
    patches = F.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
    table = theirs["pos_embed"][0]
    positions = torch.einsum("ya,xb,abd->yxd", cubic(grid[0]), cubic(grid[1]), table[1:].unflatten(0, (SIDE, SIDE)))
    points = where @ encoder.T + table[0]
    leading = theirs.get("register_tokens", torch.zeros(1, 0, WIDTH)).expand(len(pixels), -1, -1)
    x = torch.cat([points, leading, patches + positions.flatten(0, 1)], 1)

    def linear(name: str, given: Tensor) -> Tensor:
        return F.linear(given, theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    def norm(name: str, given: Tensor) -> Tensor:
        return F.layer_norm(given, (WIDTH,), theirs[f"{name}.weight"], theirs[f"{name}.bias"], 1e-6)

    for block in (f"blocks.{index}" for index in range(DEPTH)):
        query, key, value = (
            each.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for each in linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, -1)
        )
        shares = (query @ key.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        attended = linear(f"{block}.attn.proj", (shares @ value).transpose(1, 2).flatten(2))
        x = x + theirs[f"{block}.ls1.gamma"] * attended
        inside = norm(f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in theirs:
            gate, up = linear(f"{block}.mlp.w12", inside).chunk(2, -1)
            widened = linear(f"{block}.mlp.w3", F.silu(gate) * up)
        else:
            widened = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", inside)))
        x = x + theirs[f"{block}.ls2.gamma"] * widened
    return F.linear(norm("norm", x)[:, : where.shape[1]], *head)


def assert_by_hand(namer: Any, theirs: Tensors) -> None:
    """The namer, whose layers for points are its own, gives the numbers of `theirs`."""
    assert isinstance(namer, ViTP)
    random = torch.Generator().manual_seed(9)
    pixels, where = torch.randn(2, 3, *SIZE, generator=random), torch.rand(2, 5, 2, generator=random) * 2 - 1
    with torch.no_grad():
        expected = by_hand(theirs, namer.point_proj.weight, (namer.head.weight, namer.head.bias), pixels, where)
        torch.testing.assert_close(namer.eval().classify(pixels, where), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3


# What a ViT-P begins with


@pytest.mark.parametrize("place", ["namer.trunk.weights", "namer.weights", "--from"])
@pytest.mark.parametrize(
    ("spelt", "kind"),
    [
        *((spelt, {}) for spelt in SPELLINGS),
        *((spelt, {"registers": True}) for spelt in (plain, trained)),
        *((spelt, {"gated": True}) for spelt in (plain, of_timm)),
    ],
    ids=lambda each: each.__name__ if callable(each) else "+".join(each) or "plain",
)
def test_a_dinov2_brings_points_the_position_of_its_class_token(
    tmp_path: Path, spelt: Callable[[Tensors], Any], kind: dict[str, bool], place: str
) -> None:
    theirs, told, out = made(**kind), points_recipe(**kind), tmp_path / "out.safetensors"
    report = convert(written(tmp_path, spelt(theirs)), told, out)
    assert report.origin == "a DINOv2"
    assert any(f"`-s namer.trunk.weights={out}`" in note for note in report.notes)
    if place == "--from":
        segmenter = Experiment(told).segmenter()
        loaded = weights.load_part(segmenter, out, vocabulary=segmenter.vocabulary)
        assert "namer.slot" in loaded.loaded
    else:
        experiment = Experiment(recipe.override(told, [f"{place}={out}"]))
        segmenter = experiment.segmenter()
        (loaded,) = experiment.loaded
    start = {"--from": "namer.", "namer.weights": ""}.get(place)
    layers = {f"{start}{name}" for name in ("point_proj.weight", "head.weight", "head.bias")}
    assert set(loaded.reset) == (set() if start is None else layers)
    assert loaded.remark is None
    assert_by_hand(segmenter.namer, theirs)


def test_what_training_ends_with_keeps_its_own(tmp_path: Path) -> None:
    """A file of ours has what its points are given, which later loads take."""
    told, out = points_recipe(), tmp_path / "out.safetensors"
    convert(written(tmp_path, made()), told, out)
    first = Experiment(recipe.override(told, [f"namer.trunk.weights={out}"])).segmenter()
    assert isinstance(first.namer, ViTP)
    torch.nn.init.constant_(first.namer.slot, 3.0)
    weights.save(tmp_path / "ours.safetensors", first, told.tree, first.vocabulary)
    again = Experiment(recipe.override(told, [f"namer.trunk.weights={out}"])).segmenter()
    loaded = weights.load_part(again, tmp_path / "ours.safetensors", vocabulary=again.vocabulary)
    assert not loaded.reset
    assert (again.get_parameter("namer.slot") == 3).all()


OFFLINE: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIDE * PATCH}


def test_timm_s_weights_bring_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    models = offline.made_up(monkeypatch, **OFFLINE)
    experiment = Experiment(points_recipe(pretrained=True))
    namer = experiment.segmenter().namer
    assert experiment.loaded == []
    assert_by_hand(namer, dict(models[0].state_dict()))


def test_where_timm_has_folded_it_into_the_token_points_begin_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline.made_up(monkeypatch, **OFFLINE)
    experiment = Experiment(points_recipe(registers=True, pretrained=True))
    assert (experiment.segmenter().get_parameter("namer.slot") == 0).all()
    (told,) = experiment.loaded
    remark = "they have no position of a class token, which is 0 where it is asked for"
    assert told.describe() == f"namer.trunk from timm: {len(told.loaded)} tensors loaded; {remark}."

    out, small = tmp_path / "out.safetensors", points_recipe(registers=True)
    report = convert(written(tmp_path, of_timm(made(registers=True))), small, out)
    assert f"note: points is told of its weights: {remark}" in report.notes
    experiment = Experiment(recipe.override(small, [f"namer.trunk.weights={out}"]))
    assert (experiment.segmenter().get_parameter("namer.slot") == 0).all()
    (told,) = experiment.loaded
    assert told.describe().endswith(f"; {remark}.")
    segmenter = Experiment(small).segmenter()
    assert "namer.slot" in weights.load_part(segmenter, out, vocabulary=segmenter.vocabulary).reset


def test_a_checkpoint_of_a_vit_p_and_its_dinov2_begin_alike(tmp_path: Path) -> None:
    theirs, out = point_classifier(), tmp_path / "out.safetensors"
    report = convert(written(tmp_path, theirs), points_recipe(), out)
    assert report.origin == "ViT-P"
    namer = build.load(out).namer
    assert isinstance(namer, ViTP)
    assert torch.equal(namer.head.weight, theirs["head.weight"])
    assert torch.equal(namer.point_proj.weight, theirs["cls_embeddings.weight"])
    assert_by_hand(namer, theirs)


# Any other trunk


def seated_recipe(registers: bool, gated: bool = False) -> Recipe:
    """An EoMT, whose trunk has the class token in its blocks."""
    trunk = points_recipe(registers, gated, class_token=True, interpolate_offset=None).tree["namer"]["trunk"]
    tree = {
        "size": [SIDE * PATCH, SIDE * PATCH],
        "vocabulary": ["a", "b"],
        "proposer": {"kind": "eomt", "trunk": trunk, "queries": 3, "blocks": 1},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }
    return Recipe(tree, "seated.yaml")


@pytest.mark.parametrize("spelt", SPELLINGS)
@pytest.mark.parametrize(("registers", "gated"), [(False, False), (True, False), (True, True)])
def test_a_class_token_in_the_blocks_is_timm_s(
    tmp_path: Path, spelt: Callable[[Tensors], Any], registers: bool, gated: bool
) -> None:
    """Where there are registers, timm adds its position to the token itself."""
    theirs, out, told = made(registers, gated), tmp_path / "out.safetensors", seated_recipe(registers, gated)
    convert(written(tmp_path, spelt(theirs)), told, out)
    trunk = (
        Experiment(recipe.override(told, [f"proposer.trunk.weights={out}"])).segmenter().proposer.get_submodule("trunk")
    )
    own = {name.removeprefix("vit."): tensor for name, tensor in trunk.state_dict().items()}
    for name, tensor in of_timm(theirs).items():
        assert torch.equal(own.pop(name), tensor), name
    assert not own


def test_without_a_recipe_a_trunk_is_written_whole(tmp_path: Path) -> None:
    theirs, out = made(registers=True), tmp_path / "out.safetensors"
    report = convert(written(tmp_path, trained(theirs)), None, out)
    assert set(load_file(out)) == {
        f"vit.{key.replace('register_tokens', 'reg_token')}" for key in theirs if key != "mask_token"
    }
    assert set(report.left) == {"backbone.mask_token", "dino_head.x"}


# What does not fit


def told_of(function: Callable[..., Any], *arguments: Any, kind: type[Exception] = ConvertError) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("changed", "holds", "named"),
    [
        ({"classes": 5}, "a ViT-P of width 24 of 2 blocks, 3 classes", "namer.head.weight [3, 24] must be [5, 24]"),
        (
            {"width": 36},
            "a ViT-P of width 24 of 2 blocks, 3 classes",
            "namer.slot [24] must be [36]",
        ),
        ({"depth": 3}, "a ViT-P of width 24 of 2 blocks, 3 classes", "namer.trunk.vit.blocks.2.norm1.weight"),
        ({"depth": 1}, "a ViT-P of width 24 of 2 blocks, 3 classes", "blocks.1.norm1.weight"),
        ({"registers": True}, "a ViT-P of width 24 of 2 blocks, 3 classes", "namer.trunk.vit.reg_token"),
    ],
    ids=["K", "D", "L", "fewer", "registers"],
)
def test_a_vit_p_of_another_size_is_refused_with_its_figures(
    tmp_path: Path, changed: dict[str, Any], holds: str, named: str
) -> None:
    path = written(tmp_path, point_classifier())
    line = told_of(convert, path, points_recipe(**changed), tmp_path / "out.safetensors")
    assert line.startswith(f"{path}, {holds}, with recipe points: ")
    assert named in line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("released", "wanted", "better"),
    [
        ({"classes": 150, "width": 768, "depth": 12}, "vit-p-b-coco", "vit-p-b-ade20k"),
        ({"classes": 133, "width": 768, "depth": 12}, "vit-p-l-coco", "vit-p-b-coco"),
    ],
    ids=["K", "D and L"],
)
def test_a_released_size_is_told_its_recipe(tmp_path: Path, released: dict[str, Any], wanted: str, better: str) -> None:
    path = written(
        tmp_path, {key: torch.empty(1).expand(each.shape) for key, each in point_classifier(**released).items()}
    )
    line = told_of(convert, path, recipe.load(wanted), tmp_path / "out.safetensors")
    classes = released["classes"]
    assert line == (f"{path}: a ViT-P B of 12 blocks, {classes} classes, which {wanted} is not; take --recipe {better}")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"width": 36}, "vit.pos_embed [1, 26, 24] for [1, 25, 36]"),
        ({"depth": 3}, "vit.blocks.2.norm1.weight missing"),
        ({"registers": True}, "vit.reg_token missing"),
    ],
    ids=["D", "L", "registers"],
)
def test_a_dinov2_of_another_size_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    path = written(tmp_path, made())
    line = told_of(convert, path, points_recipe(**changed), tmp_path / "out.safetensors")
    assert line.startswith(f"{path}: does not fit namer.trunk of points: {named}")


def test_either_in_the_other_s_place_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    path = written(tmp_path, point_classifier())
    line = told_of(convert, path, seated_recipe(False), out)
    assert line.startswith(f"{path}, a ViT-P of width 24 of 2 blocks, 3 classes, with recipe seated: ")
    path = written(tmp_path, made())
    assert told_of(convert, path, recipe.load("shapes"), out).startswith(f"{path}: a DINOv2, and shapes has no ")
    convert(path, points_recipe(), out)
    assert told_of(build.load, out, kind=WeightsError) == (
        f"{out}: a part alone, of theirs.pth (a DINOv2), and no model; a recipe takes it by the key `weights`, "
        "as at namer.trunk"
    )


def test_a_dinov2_that_is_not_whole_is_named(tmp_path: Path) -> None:
    out, theirs = tmp_path / "out.safetensors", made()
    some = {key: tensor for key, tensor in theirs.items() if "mlp" not in key}
    path = written(tmp_path, some)
    assert (
        told_of(convert, path, None, out) == f"{path}: looks like a DINOv2, but has no 'mlp.fc1.weight'; is it whole?"
    )
    written(tmp_path, theirs | {"pos_embed": theirs["pos_embed"][:, 1:]})
    assert told_of(convert, path, None, out) == (
        f"{path}: a DINOv2 has positions of a class token and a square of patches, and these are 25"
    )
    written(tmp_path, {key: tensor for key, tensor in theirs.items() if key != "blocks.1.ls2.gamma"})
    assert "without a source (1): vit.blocks.1.ls2.gamma" in told_of(convert, path, None, out)
    written(tmp_path, theirs | {"predictor.weight": torch.ones(1)})
    assert "without a rule (1): predictor.weight" in told_of(convert, path, None, out)
