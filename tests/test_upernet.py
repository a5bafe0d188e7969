"""UperNet: parity with mmseg's heads, any size of map, the second head only where there is truth, and its first weights."""

import gzip
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures_dir import FIXTURES
from maskfirst.build import Experiment
from maskfirst.contracts import PerClass
from maskfirst.convert import upernet
from maskfirst.convert.rename import destinations
from maskfirst.frames import resize
from maskfirst.proposers.upernet import ConvNorm, UperNet, _averaging, resized_convolutions
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch
from parity.arrays import Given, given
from parity.rows import Row, table
from parity.runner import run
from parity.upernet import batch, on_pyramid

SUBSET = Path(__file__).parent / "fixtures" / "upernet"
CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 16, 32]
ODD = [(13, 19), (7, 10), (4, 5), (2, 3)]
"""Of a picture of 49 x 75 px: no map is half of the one before."""


def segmenter(meta: bool = False, classes: int = 3, **proposer: Any) -> Segmenter:
    tree = {
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {
            "kind": "upernet",
            "backbone": given(CHANNELS, STRIDES),
            "width": 8,
            "auxiliary_width": 4,
            **proposer,
        },
        "namer": {"kind": "given"},
        "criterion": {"kind": "pixel"},
    }
    torch.manual_seed(0)
    return Experiment(Recipe(tree, "example.yaml")).segmenter(meta=meta)


def on_maps(model: Segmenter, maps: list[Tensor]) -> Segmenter:
    assert isinstance(model.proposer, UperNet)
    assert isinstance(model.proposer.backbone, Given)
    model.proposer.backbone.maps = maps
    return model


def odd_maps(pictures: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(pictures, channels, *size, generator=random) for channels, size in zip(CHANNELS, ODD, strict=True)
    ]


def odd_batch(pictures: int = 2, truth: bool = True) -> Batch:
    labels = torch.arange(49 * 75).reshape(1, 49, 75).expand(pictures, -1, -1) // 1300
    seen = batch(torch.zeros(pictures, 3, 49, 75), labels)
    return seen if truth else Batch(seen.pixels, seen.tasks, seen.frames, seen.keys)


# ---- parity


def failing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.passed]


def test_the_subset_holds() -> None:
    rows = run(SUBSET)
    assert len(rows) == 3
    assert not failing(rows), table(rows)


@pytest.mark.parametrize(
    "key",
    [
        "decode_head.psp_modules.0.1.conv.weight",
        "decode_head.psp_modules.3.1.bn.running_var",
        "decode_head.bottleneck.conv.weight",
        "decode_head.lateral_convs.2.bn.running_mean",
        "decode_head.fpn_convs.1.bn.bias",
        "decode_head.fpn_bottleneck.conv.weight",
        "decode_head.conv_seg.bias",
        "auxiliary_head.convs.0.bn.weight",
        "auxiliary_head.conv_seg.weight",
    ],
)
def test_one_perturbed_tensor_shows(tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(SUBSET, tmp_path / "head")
    weights = load_file(folder / "state.safetensors")
    weights[key] += 0.05
    save_file(weights, folder / "state.safetensors")
    wrong = {row.name for row in failing(run(folder))}
    assert wrong
    assert wrong <= ({"aux_out"} if key.startswith("aux") else {"out", "probs"})


if FIXTURES is not None:
    MANIFESTS = sorted((FIXTURES / "vit-adapter" / "manifests").glob("*__upernet_*.json.gz"))

    def test_everything_of_mmseg_holds() -> None:
        assert FIXTURES is not None
        rows = run(FIXTURES / "proposals" / "upernet")
        assert len(rows) == 3
        assert not failing(rows), table(rows)

    @pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("variant", ["vit_upernet", "beit_upernet"])
    def test_logits_and_losses_on_recorded_pyramids_hold(variant: str, kind: torch.dtype) -> None:
        assert FIXTURES is not None
        rows = list(on_pyramid(FIXTURES / "vit-adapter" / variant, kind))
        assert len(rows) == 8
        assert not failing(rows), table(rows)

    @pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name.removesuffix(".json.gz"))
    def test_every_key_of_full_size_heads_has_its_place(path: Path) -> None:
        """And parameters are as many as they have been counted."""
        assert FIXTURES is not None
        with gzip.open(path) as file:
            keys: dict[str, Any] = json.load(file)
        theirs = {key: told for key, told in keys.items() if not key.startswith("backbone.")}
        classes = theirs["decode_head.conv_seg.weight"]["shape"][0]
        width, channels = theirs["decode_head.lateral_convs.0.conv.weight"]["shape"][:2]
        model = segmenter(True, classes, backbone=given([channels] * 4, STRIDES), width=width, auxiliary_width=256)
        ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        homes = destinations(theirs, upernet.rules())
        assert {home: theirs[key]["shape"] for key, (home,) in homes.items()} == ours
        folder, _, config = path.name.removesuffix(".json.gz").partition("__")
        counted = json.loads((path.parent / "summary.json").read_text())[f"{folder}/{config}.py"]
        assert parameters(model) == (counted["decode_head"], counted["auxiliary_head"])


def parameters(model: Segmenter) -> tuple[int, int]:
    """Of the head and of the auxiliary one."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    auxiliary = sum(count for name, count in counts.items() if name.startswith("proposer.auxiliary."))
    return sum(counts.values()) - auxiliary, auxiliary


@pytest.mark.parametrize(
    ("channels", "width", "counted"), [(192, 512, (27_614_358, 481_430)), (1024, 1024, (120_764_566, 2_398_358))]
)
def test_parameters_are_the_published_ones(channels: int, width: int, counted: tuple[int, int]) -> None:
    backbone = given([channels] * 4, STRIDES)
    assert parameters(segmenter(True, 150, backbone=backbone, width=width, auxiliary_width=256)) == counted


# ---- behaviour


@pytest.mark.parametrize("side", [1, 3])
def test_mixing_before_resizing_is_resizing_before_mixing(side: int) -> None:
    """Also maps that are larger than the size, of one pixel, or of just that size; gradients, too."""
    random = torch.Generator().manual_seed(0)
    size = (5, 9)
    maps = [
        torch.randn(2, channels, *each, generator=random, dtype=torch.float64, requires_grad=True)
        for channels, each in ((2, (3, 4)), (3, (1, 1)), (1, (8, 6)), (2, size))
    ]
    weights = [
        torch.randn(4, each.shape[1], side, side, generator=random, dtype=torch.float64, requires_grad=True)
        for each in maps
    ]
    found = resized_convolutions(tuple(maps), tuple(weights), size)
    joined = torch.cat([resize(each, size) for each in maps], 1)
    expected = F.conv2d(joined, torch.cat(weights, 1), padding=side // 2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, generator=random, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), [*maps, *weights]),
        torch.autograd.grad((expected * direction).sum(), [*maps, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_maps_need_not_double() -> None:
    model = on_maps(segmenter(), odd_maps()).eval()
    with torch.inference_mode():
        proposals, names = model(odd_batch())
    assert proposals.masks.shape == (2, 3, 13, 19)
    assert proposals.earlier[0].masks.shape == (2, 3, 4, 5)
    assert proposals.competing
    assert names is proposals.names
    assert names.logits[0].argmax(-1).tolist() == [0, 1, 2]


def test_what_the_backbone_has_padded_is_left_out() -> None:
    maps = [
        torch.randn(1, channels, 64 // stride, 96 // stride) for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    model = on_maps(segmenter(), maps).eval()
    with torch.inference_mode():
        proposals, _ = model(odd_batch(1))
    assert proposals.masks.shape == (1, 3, 13, 19)
    assert proposals.earlier[0].masks.shape == (1, 3, 4, 5)


def test_a_batch_is_its_pictures_one_by_one() -> None:
    model, maps = segmenter().eval(), odd_maps(3)
    with torch.inference_mode():
        together = on_maps(model, maps)(odd_batch(3))[0]
        for index in range(3):
            alone = on_maps(model, [each[index : index + 1] for each in maps])(odd_batch(1))[0]
            torch.testing.assert_close(together.masks[index : index + 1], alone.masks)
            torch.testing.assert_close(together.earlier[0].masks[index : index + 1], alone.earlier[0].masks)


def test_the_second_head_guesses_only_where_there_is_truth() -> None:
    model = on_maps(segmenter(auxiliary_weight=0.25), odd_maps()).eval()
    with torch.inference_mode():
        trained, bare = model(odd_batch())[0], model(odd_batch(truth=False))[0]
    assert [guess.weight for guess in trained.earlier] == [0.25]
    assert bare.earlier == ()
    torch.testing.assert_close(bare.masks, trained.masks)
    losses = model.losses(odd_batch())
    assert set(losses) == {"ce", "ce_0"}
    # Of logits that are nearly 0 at first.
    assert losses["ce_0"].item() == pytest.approx(0.25 * losses["ce"].item(), rel=0.05)


def test_there_need_not_be_a_second_head() -> None:
    model = on_maps(segmenter(auxiliary_width=None, auxiliary_tap=9), odd_maps())
    assert not [name for name, _ in model.named_parameters() if "auxiliary" in name]
    assert set(model.losses(odd_batch())) == {"ce"}


def test_one_picture_can_be_trained_on() -> None:
    """Pooled to one pixel it has one value a channel, which running statistics stand in for."""
    model = on_maps(segmenter(dropout=0.0), odd_maps(1)).train()
    torch.stack(list(model.losses(odd_batch(1)).values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    block = ConvNorm(2, 3, 1).train()
    value = torch.randn(1, 2, 1, 1)
    torch.testing.assert_close(block(value), block.eval()(value))
    assert not block.norm.running_mean.any()


def test_dropout_takes_whole_channels_before_the_classifiers() -> None:
    model = on_maps(segmenter(dropout=0.5), odd_maps()).train()
    kept: list[Tensor] = []
    for name in ("classifier", "auxiliary.2"):
        model.proposer.get_submodule(name).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model.losses(odd_batch())
    auxiliary, decode = kept
    for maps, channels in ((auxiliary, 4), (decode, 8)):
        assert maps.shape[:2] == (2, channels)
        empty = (maps == 0).flatten(2).all(-1)
        assert empty.any()
        assert not empty.all()


def test_initialisation() -> None:
    model = segmenter(width=64, auxiliary_width=64, backbone=given([64] * 4, STRIDES))
    for name, module in model.named_modules():
        if isinstance(module, ConvNorm):
            weight = module.convolution.weight
            spread = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
            assert weight.std().item() == pytest.approx(spread, rel=0.1), name
            assert module.convolution.bias is None
    classifiers = [module for module in model.modules() if isinstance(module, PerClass)]
    assert len(classifiers) == 2
    for classifier in classifiers:
        assert isinstance(classifier, nn.Conv2d)
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.25)
        assert classifier.bias is not None
        assert not classifier.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": given([8, 8], [16, 16])}, r"several maps, fine to coarse.*strides \[16, 16\].*simple_pyramid"),
        ({"backbone": given([8], [16])}, r"several maps, fine to coarse.*strides \[16\]"),
        ({"auxiliary_tap": 4}, "auxiliary_tap 4: the backbone has 4 maps"),
        ({"pools": [0, 2]}, r"pools \[0, 2\] are sides of grids, which must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as told:
        segmenter(**settings)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 16])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_averages_for_graphs_are_those_of_pooling(length: int, side: int) -> None:
    maps = torch.rand(2, 3, length, 8)
    down, across = (_averaging(count, side, maps) for count in (length, 8))
    torch.testing.assert_close(down @ maps @ across.T, F.adaptive_avg_pool2d(maps, side))
