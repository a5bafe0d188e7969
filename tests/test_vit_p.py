"""ViT-P: the points of masks, the namer on its published sizes, what it sees of a canvas, and its blend with another namer."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.vit import TimmViT, resize_positions
from maskfirst.build import Experiment
from maskfirst.convert import vit_p
from maskfirst.convert.rename import rename
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame
from maskfirst.namers import points
from maskfirst.namers.blend import Blend, mixed
from maskfirst.namers.class_head import ClassHead
from maskfirst.namers.given import Given
from maskfirst.namers.vit_p import ViTP, spread
from maskfirst.ops.sine_positions import code
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.types import Batch, Names, Proposals

WORDS = from_names(["sky", "road", "car"])
TINY: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def tiny(**settings: Any) -> ViTP:
    torch.manual_seed(0)
    trunk = TimmViT((32, 32), "vit_tiny_patch16_224", **TINY)
    namer = ViTP(trunk, WORDS, size=(32, 48), **settings).eval()
    for parameter in namer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return namer


def batch(pixels: Tensor, *frames: Frame) -> Batch:
    return Batch(pixels, ("semantic",) * len(frames), frames, ("",) * len(frames))


def spot(row: int, column: int, size: tuple[int, int]) -> Tensor:
    """A mask with one pixel above all others."""
    mask = torch.full((1, 1, *size), -1.0)
    mask[..., row, column] = 1
    return mask


# Points


def test_a_peak_is_the_first_of_equal_ones_row_by_row() -> None:
    masks = torch.zeros(2, 3, 4)
    masks[1, 1, 3] = masks[1, 2, 0] = 5
    assert points.peaks(masks).tolist() == [[0, 0], [1, 3]]


def test_a_center_is_the_pixel_deepest_inside() -> None:
    inside = torch.zeros(3, 7, 9, dtype=torch.bool)
    inside[0, :5, :5] = True  # a square in the corner, whose border is an edge, too
    inside[1, 6, 8] = True
    masks = torch.where(inside, 1.0, -1.0)
    masks[2, 3, 3] = -0.5
    assert points.centers(masks, inside).tolist() == [[2, 2], [6, 8], [3, 3]]


def test_random_points_lie_inside_and_are_the_same_again() -> None:
    masks = torch.randn(200, 5, 6, generator=torch.Generator().manual_seed(1))
    masks[7] = -1
    masks[7, 2, 2] = -0.5
    inside = masks > 0
    found = points.random(masks, inside)
    assert inside[torch.arange(200), found[:, 0], found[:, 1]].sum() == 199
    assert found[7].tolist() == [2, 2]
    assert torch.equal(found, points.random(masks, inside))
    assert len(found.unique(dim=0)) > 20


def test_no_masks_have_no_points() -> None:
    none = torch.zeros(0, 4, 4)
    for find in (points.centers, points.random):
        assert find(none, none > 0).shape == (0, 2)
    assert points.peaks(none).shape == (0, 2)


# Positions


@pytest.mark.parametrize("grid", [(37, 37), (37, 74), (74, 74), (27, 53)])
def test_positions_are_resized_by_the_closed_form(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 37 * 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def axis(count: int) -> Tensor:
        """Cubic convolution with a = -0.75 around (d + 0.5) * 37 / (n + 0.1) - 0.5, places clamped."""
        weights = torch.zeros(count, 37, dtype=torch.float64)
        for place in range(count):
            source = (place + 0.5) * 37 / (count + 0.1) - 0.5
            first = math.floor(source)
            for tap in range(first - 1, first + 3):
                x = abs(source - tap)
                near = 1.25 * x**3 - 2.25 * x**2 + 1
                far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                weights[place, min(max(tap, 0), 36)] += near if x <= 1 else far
        return weights

    expected = torch.einsum("ya,xb,abd->yxd", axis(grid[0]), axis(grid[1]), table[0].unflatten(0, (37, 37)))
    found = resize_positions(table, grid, offset=0.1)[0].unflatten(0, grid)
    assert (found - expected).abs().max() < 1e-12


# The namer


def published(size: tuple[int, int], classes: int, letter: str = "base", registers: bool = False) -> dict[str, Any]:
    trunk = {
        "kind": "vit",
        "model": f"vit_{letter}_patch14_{'reg4_' if registers else ''}dinov2",
        "class_token": "absent",
        "interpolate_offset": 0.1,
        "size": [518, 518],
    }
    return {
        "size": list(size),
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {"kind": "oracle"},
        "namer": {"kind": "vit_p", "trunk": trunk, "size": list(size)},
        "criterion": {"kind": "pixel"},
    }


@pytest.mark.parametrize(
    ("letter", "classes", "registers", "parameters"),
    [
        ("small", 150, False, 22_114_710),
        ("base", 19, False, 86_595_859),
        ("base", 150, False, 86_696_598),
        ("base", 150, True, 86_699_670),
        ("large", 171, False, 304_544_939),
        ("large", 365, False, 304_743_789),
        ("giant", 150, False, 1_136_712_854),
    ],
)
def test_parameters_are_the_original_s_but_for_a_token_that_it_never_reads(
    letter: str, classes: int, registers: bool, parameters: int
) -> None:
    model = Experiment(Recipe(published((518, 518), classes, letter, registers), "p.yaml")).segmenter(meta=True)
    unread = {"small": 384, "base": 768, "large": 1024, "giant": 1536}[letter]
    assert sum(each.numel() for each in model.parameters()) == parameters - unread


def filled(shapes: dict[str, torch.Size], generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of the original's fingerprints, by its own keys."""
    weights = {}
    for key in sorted(shapes):
        drawn = torch.randn(shapes[key], generator=generator)
        if key.endswith("gamma") or ("norm" in key and key.endswith("weight")):
            weights[key] = 1 + 0.1 * drawn
        elif drawn.ndim == 1:
            weights[key] = 0.1 * drawn
        elif key in ("pos_embed", "mask_token"):
            weights[key] = 0.2 * drawn
        else:
            weights[key] = drawn / math.sqrt(drawn[0].numel())
    return weights


def original_shapes(namer: ViTP) -> dict[str, torch.Size]:
    """Of the original's keys, from those of ours."""
    own = {key: tensor.shape for key, tensor in namer.state_dict().items()}
    width = own["slot"][0]
    shapes = {"cls_embeddings.weight": own["point_proj.weight"], "mask_token": torch.Size([1, width])}
    shapes |= {key: own[key] for key in ("head.weight", "head.bias")}
    for key, shape in own.items():
        if key.startswith("trunk.vit."):
            shapes[key.removeprefix("trunk.vit.")] = shape
    _, patches, _ = shapes["pos_embed"]
    shapes["pos_embed"] = torch.Size([1, patches + 1, width])
    return shapes


@pytest.mark.parametrize(
    ("letter", "size", "count", "classes", "first", "last", "names", "total"),
    [
        (
            "small", (518, 518), 7, 19,
            [1.7882, -2.3399, 0.6183, -0.7651, 0.3721, 1.3595],
            [1.7936, -0.6151, 0.0108, -0.0704, -0.5596, 0.9641],
            [0, 0, 0, 0, 0, 7, 0], 0.105,
        ),
        (
            "base", (518, 518), 7, 150,
            [-0.6531, 0.1809, -1.0045, -0.9089, -0.2035, 0.2530],
            [0.3701, 1.8223, -0.1429, -0.1370, 0.1623, 1.3472],
            [17, 17, 17, 17, 39, 39, 39], -18.381,
        ),
        (
            "base", (518, 1036), 3, 19,
            [1.2967, -0.0133, 0.3856, 0.9882, -1.0412, 0.0141],
            [-1.3882, -0.0917, 0.0286, 0.3743, -1.7183, -0.4283],
            [16, 17, 17], -7.137,
        ),
    ],
    ids=["S", "B", "B wide"],
)  # fmt: skip
def test_fingerprints_of_the_original(
    letter: str,
    size: tuple[int, int],
    count: int,
    classes: int,
    first: list[float],
    last: list[float],
    names: list[int],
    total: float,
) -> None:
    tree = published(size, classes, letter)
    # The picture comes normalised.
    tree["namer"]["trunk"] |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    model = Experiment(Recipe(tree, "p.yaml")).segmenter().eval()
    assert isinstance(model.namer, ViTP)
    generator = torch.Generator().manual_seed(1234)
    weights = filled(original_shapes(model.namer), generator)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, vit_p.rules(weights.keys()), shapes).tensors)
    picture = torch.randn(1, 3, *size, generator=generator)
    where = torch.stack([torch.linspace(-1, 0.9, count), torch.linspace(0.8, -0.7, count)], 1)[None]
    with torch.inference_mode():
        (logits,) = model.namer.classify(picture, where)
    torch.testing.assert_close(logits[0, :6], torch.tensor(first), atol=2e-4, rtol=0)
    torch.testing.assert_close(logits[-1, :6], torch.tensor(last), atol=2e-4, rtol=0)
    assert logits.argmax(1).tolist() == names
    assert logits.sum().item() == pytest.approx(total, abs=5e-3)


def test_no_points_have_an_empty_answer() -> None:
    namer = tiny()
    assert namer.classify(torch.zeros(2, 3, 32, 48), torch.zeros(2, 0, 2)).shape == (2, 0, 3)
    frame = Frame((32, 48), (32, 48), (32, 48))
    names = namer(Proposals(torch.zeros(1, 0, 8, 12)), batch(torch.zeros(1, 3, 32, 48), frame))
    assert names.logits.shape == (1, 0, 4)


def test_alone_it_takes_every_mask_for_an_object() -> None:
    frame = Frame((32, 48), (32, 48), (32, 48))
    names = tiny()(Proposals(spot(3, 4, (8, 12))), batch(torch.rand(1, 3, 32, 48) * 255, frame))
    assert names.void.tolist() == [[0.0]]
    torch.testing.assert_close(names.joint, names.given_object)
    assert not names.joint.isnan().any()


def test_a_point_is_named_as_by_its_place_in_the_picture() -> None:
    namer, picture = tiny(), torch.rand(1, 3, 32, 48) * 255
    frame = Frame((32, 48), (32, 48), (32, 48))
    names = namer(Proposals(spot(3, 5, (8, 12))), batch(picture, frame))
    expected = namer.classify(picture, torch.tensor([[[2 * 3 / 8 - 1, 2 * 5 / 12 - 1]]]))
    torch.testing.assert_close(names.logits[..., :-1], expected)


def test_padding_is_not_seen_and_moves_no_point() -> None:
    namer, picture = tiny(), torch.rand(1, 3, 32, 48) * 255
    alone = namer(Proposals(spot(3, 5, (8, 12))), batch(picture, Frame((32, 48), (32, 48), (32, 48))))
    canvas, mask = F.pad(picture, (0, 16, 0, 32)), F.pad(spot(3, 5, (8, 12)), (0, 4, 0, 8), value=9.0)
    padded = namer(Proposals(mask), batch(canvas, Frame((32, 48), (32, 48), (64, 64))))
    torch.testing.assert_close(padded.logits, alone.logits)


def test_the_published_way_sees_the_padding_and_does_not_reckon_with_it() -> None:
    namer, picture = tiny(read_at="picture", with_padding=True), torch.rand(1, 3, 32, 48) * 255
    canvas, mask = F.pad(picture, (0, 16, 0, 32)), F.pad(spot(3, 5, (32, 48)), (0, 16, 0, 32), value=9.0)
    names = namer(Proposals(mask), batch(canvas, Frame((32, 48), (32, 48), (64, 64))))
    stretched = F.interpolate(canvas, (32, 48), mode="bilinear", align_corners=False, antialias=True)
    expected = namer.classify(stretched, torch.tensor([[[2 * 3 / 32 - 1, 2 * 5 / 48 - 1]]]))
    torch.testing.assert_close(names.logits[..., :-1], expected)


@pytest.mark.parametrize("read_at", ["grid", "picture"])
def test_a_mirrored_canvas_is_seen_mirrored_with_its_points(read_at: Any) -> None:
    namer, picture = tiny(read_at=read_at), torch.rand(1, 3, 32, 48) * 255
    frame = Frame((32, 48), (32, 48), (32, 48), flipped=True)
    names = namer(Proposals(spot(3, 40, (32, 48))), batch(picture, frame))
    expected = namer.classify(picture, torch.tensor([[[2 * 3 / 32 - 1, 2 * 40 / 48 - 1]]]))
    torch.testing.assert_close(names.logits[..., :-1], expected)


def test_read_at_the_picture_is_the_peak_of_the_enlarged_mask() -> None:
    namer, picture = tiny(read_at="picture"), torch.rand(1, 3, 32, 48) * 255
    masks = torch.randn(1, 5, 8, 12, generator=torch.Generator().manual_seed(3))
    frame = Frame((200, 300), (32, 48), (32, 48))
    large = frame.restore(masks[0])
    where = 2 * points.peaks(large) / torch.tensor([200, 300]) - 1
    names = namer(Proposals(masks), batch(picture, frame))
    torch.testing.assert_close(names.logits[..., :-1], namer.classify(picture, where[None]))


def test_a_window_is_its_own_picture() -> None:
    namer, canvas = tiny(), torch.rand(2, 3, 32, 48) * 255
    whole = Frame((32, 96), (32, 96), (32, 48))
    windows = [whole, replace(whole, origin=(0, 48))]
    names = namer(Proposals(spot(3, 5, (8, 12)).repeat(2, 1, 1, 1)), batch(canvas, *windows))
    place = torch.tensor([[[2 * 3 / 8 - 1, 2 * 5 / 12 - 1]]]).repeat(2, 1, 1)
    torch.testing.assert_close(names.logits[..., :-1], namer.classify(canvas, place))
    with pytest.raises(Exception, match="read_at picture is for whole pictures"):
        tiny(read_at="picture")(Proposals(spot(3, 5, (8, 12)).repeat(2, 1, 1, 1)), batch(canvas, *windows))


@pytest.mark.parametrize(
    "trunk",
    [
        {"kind": "vit", "model": "vit_small_patch14_reg4_dinov2", "size": [28, 28], **TINY},
        {"kind": "vit", "model": "vit_small_patch14_reg4_dinov2", "size": [28, 28], "class_token": "absent", **TINY},
        {"kind": "vit", "model": "vit_small_patch16_dinov3", **TINY},
        {"kind": "beit", **TINY},
    ],
    ids=["registers", "registers alone", "dinov3", "beit"],
)
def test_points_go_before_the_tokens_of_any_trunk(trunk: dict[str, Any]) -> None:
    patch = 14 if "patch14" in trunk.get("model", "") else 16
    tree = published((2 * patch, 3 * patch), 3)
    tree["namer"] = {"kind": "vit_p", "trunk": trunk, "size": [2 * patch, 3 * patch]}
    namer = Experiment(Recipe(tree, "p.yaml")).segmenter().eval().namer
    assert isinstance(namer, ViTP)
    picture, where = torch.rand(2, 3, 2 * patch, 3 * patch) * 255, torch.rand(2, 5, 2) * 2 - 1
    with torch.inference_mode():
        logits = namer.classify(picture, where)
        swapped = namer.classify(picture, where.flip(1)).flip(1)
    assert logits.shape == (2, 5, 3)
    torch.testing.assert_close(logits, swapped, atol=1e-4, rtol=0)


def test_sizes_that_the_patch_does_not_divide_are_refused() -> None:
    tree = published((518, 520), 3)
    with pytest.raises(RecipeError, match=r"size \[518, 520\] must be multiples of .* 14 px; \[518, 518\] is near"):
        Experiment(Recipe(tree, "p.yaml")).segmenter(meta=True)


# Blend


def stages() -> tuple[Names, Names]:
    random = torch.Generator().manual_seed(0)
    first = Names(3 * torch.randn(2, 5, 4, generator=random))
    return first, Names(F.pad(3 * torch.randn(2, 5, 3, generator=random), (0, 1), value=float("-inf")))


def test_a_blend_keeps_the_first_s_word_on_objects() -> None:
    first, second = stages()
    found = mixed(first, second, 0.4, "renormalised")
    torch.testing.assert_close(found.void, first.void)
    product = first.given_object**0.6 * second.given_object**0.4
    torch.testing.assert_close(found.given_object, product / product.sum(-1, keepdim=True))


def test_a_joint_blend_weighs_a_mask_less_where_they_disagree() -> None:
    first, second = stages()
    found = mixed(first, second, 0.4, "joint")
    product = (1 - first.void)[..., None] * first.given_object**0.6 * second.given_object**0.4
    all_ = torch.cat([product, first.void[..., None]], -1)
    torch.testing.assert_close(found.logits.softmax(-1), all_ / all_.sum(-1, keepdim=True))
    assert (found.void >= first.void - 1e-6).all()


def test_weight_1_takes_the_second_s_names() -> None:
    first, second = stages()
    torch.testing.assert_close(mixed(first, second, 1.0, "renormalised").given_object, second.given_object)


def test_weight_0_is_the_first_alone() -> None:
    first, second = stages()
    blend = Blend(Given(), tiny(), weight=0.0)
    proposals = Proposals(torch.zeros(2, 5, 8, 12), names=first)
    assert blend(proposals, batch(torch.zeros(2, 3, 32, 48), *[Frame((32, 48), (32, 48), (32, 48))] * 2)) is first
    torch.testing.assert_close(mixed(first, second, 1e-9, "renormalised").joint, first.joint)


def test_a_blend_s_namers_are_told_the_queries_width() -> None:
    tree = {
        "size": [32, 32],
        "vocabulary": list(WORDS.names),
        "proposer": {"kind": "mask2former", "backbone": {"kind": "pyramid", "model": "swin_tiny_patch4_window7_224",
            "widths": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2], "window": 4}, "width": 16,
            "mask_width": 16, "heads": 2, "queries": 4},
        "namer": dict(Blend.example),
        "criterion": {"kind": "set"},
    }  # fmt: skip
    namer = Experiment(Recipe(tree, "b.yaml")).segmenter(meta=True).namer
    assert isinstance(namer, Blend)
    assert isinstance(namer.first, ClassHead)
    assert namer.first.linear.in_features == 16


def test_a_blend_s_weight_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        Blend(Given(), Given(), weight=1.4)


def test_a_point_in_sines_begins_as_the_patch_around_it() -> None:
    """The token of a point in the middle of a patch is that patch's position."""
    trunk = TimmViT((64, 64), "vit_tiny_patch16_224", width=32, depth=1, heads=2, class_token="absent", start="alike")
    words = from_names(["a", "b"])
    namer = ViTP(trunk, words, (64, 64), code="sines")
    y, x = 2, 3
    place = torch.tensor([2 * (16 * y + 8) / 64 - 1, 2 * (16 * x + 8) / 64 - 1])
    torch.testing.assert_close(namer.point_proj(code(place, 32)), trunk.vit.pos_embed[0, 4 * y + x])
    assert namer.classify(torch.rand(1, 3, 64, 64) * 255, place[None, None]).shape == (1, 1, 2)


def test_places_spread_evenly_however_many_they_are() -> None:
    for count in (10, 100):
        places = spread(count)
        assert ((places >= -1) & (places < 1)).all()
        # Every quarter has its share, give or take one in ten or two, and no two places are close.
        for sides in torch.cartesian_prod(torch.tensor([-1, 1]), torch.tensor([-1, 1])):
            inside = (places * sides > 0).all(1).sum()
            assert abs(inside - count / 4) <= max(2, count / 10)
        apart = torch.cdist(places, places).fill_diagonal_(9).min()
        assert apart > 0.6 * (4 / count) ** 0.5
        assert torch.equal(spread(count), places)
    assert torch.equal(spread(100)[:10], spread(10))


def test_few_points_are_named_among_others_that_nobody_asked_for() -> None:
    namer, pixels = tiny(at_least=6), torch.rand(2, 3, 32, 48) * 255
    asked = torch.tensor([[[0.1, 0.2], [-0.7, 0.5]], [[0.3, -0.4], [0.0, 0.0]]])
    plain = tiny()
    among = torch.cat([asked, spread(4).expand(2, -1, -1)], 1)
    torch.testing.assert_close(namer.classify(pixels, asked), plain.classify(pixels, among)[:, :2])
    assert not torch.allclose(namer.classify(pixels, asked), plain.classify(pixels, asked))
    # As many as that, or more, are left alone.
    torch.testing.assert_close(namer.classify(pixels, among), plain.classify(pixels, among))
