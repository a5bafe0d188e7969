"""Mask2Former: masked attention, guesses only where there is truth, any size of canvas, its first weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskfirst.backbones.deformable import DeformableAttention
from maskfirst.build import Experiment
from maskfirst.contracts import Backbone
from maskfirst.frames import Frame, resize
from maskfirst.proposers.mask2former import DecoderLayer, Mask2Former, may_see
from maskfirst.proposers.pixel_decoder import PixelDecoder
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch, Segments

NAMES = ["sky", "road", "car"]
VIT = {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2, "final_norm": False}


def segmenter(**proposer: Any) -> Segmenter:
    tree = {
        "size": [64, 64],
        "vocabulary": NAMES,
        "proposer": {**Mask2Former.example, **proposer},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set", "points": 32},
    }
    torch.manual_seed(0)
    return Experiment(Recipe(tree, "example.yaml")).segmenter()


def mask2former(**arguments: Any) -> Mask2Former:
    found = segmenter(**arguments).proposer
    assert isinstance(found, Mask2Former)
    return found


def batch(height: int = 64, width: int = 64, pictures: int = 2, truth: bool = True) -> Batch:
    random = torch.Generator().manual_seed(height + width)
    frame = Frame((height, width), (height, width), (height, width))
    pixels = torch.rand(pictures, 3, height, width, generator=random) * 255
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, : height // 2] = masks[1, height // 2 :, : width // 2] = True
    one = Segments(masks, torch.tensor([0, 2]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    return Batch(
        pixels, ("panoptic",) * pictures, (frame,) * pictures, ("",) * pictures, (one,) * pictures if truth else None
    )


def test_earlier_guesses_are_made_only_where_there_is_truth() -> None:
    model = segmenter(decoder_layers=4).eval()
    with torch.inference_mode():
        trained, names = model(batch())
        bare, same = model(batch(truth=False))
    assert len(trained.earlier) == 4
    assert bare.earlier == ()
    torch.testing.assert_close(bare.masks, trained.masks)
    torch.testing.assert_close(same.logits, names.logits)
    first = trained.earlier[0]
    assert first.queries is not None
    # Before the first layer no query has seen the picture.
    torch.testing.assert_close(first.queries[0], first.queries[1])
    assert not torch.equal(first.masks[0], first.masks[1])


def test_losses_of_every_stage_reach_every_parameter() -> None:
    model = segmenter(decoder_layers=4, pixel_width=8).train()
    losses = model.losses(batch())
    assert sorted(losses) == sorted(
        [f"{name}{stage}" for name in ("ce", "mask", "dice") for stage in ("", "_0", "_1", "_2", "_3")]
    )
    torch.stack(list(losses.values())).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_queries_look_inside_of_their_masks_and_everywhere_where_these_are_empty() -> None:
    shrunk = torch.zeros(1, 16, 4)
    shrunk[0, 0] = torch.tensor([1.0, -1.0, 0.0, -1e-6])
    embedded = torch.zeros(1, 3, 16)
    embedded[0, :, 0] = torch.tensor([1.0, -1.0, 0.0])
    embedded[0, 2, 1] = 1.0
    shrunk[0, 1] = -1.0
    seen = may_see(embedded, shrunk)[:, 0]
    # A probability of one half counts as inside.
    assert seen[0].tolist() == [[True, False, True, False], [False, True, True, True], [True] * 4]


def test_a_blocked_place_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(16, 2, 16).eval()
    queries, memory, positions = torch.randn(1, 3, 16), torch.randn(1, 5, 16), torch.randn(3, 16)
    seen = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    seen[..., 2] = False
    other = memory.clone()
    other[:, 2] += 9.0
    torch.testing.assert_close(
        layer(queries, positions, memory, memory, seen), layer(queries, positions, other, other, seen)
    )
    seen[..., 2] = True
    changed = layer(queries, positions, other, other, seen) - layer(queries, positions, memory, memory, seen)
    assert changed.abs().max() > 1e-3


def test_a_layer_is_torch_s_attention_twice_and_a_feedforward() -> None:
    """Against torch's own modules: the picture first, the queries among themselves then."""
    torch.manual_seed(0)
    layer = DecoderLayer(16, 2, 24).eval()
    queries, values, positions = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(3, 16)
    keys = values + 0.5
    seen = torch.rand(2, 1, 3, 5) > 0.4
    seen[..., 0] = True

    def torch_s(ours: nn.Module, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
        parts = dict(ours.named_parameters())
        theirs = nn.MultiheadAttention(16, 2, batch_first=True).eval()
        packed = {f"in_proj_{kind}": torch.cat([parts[f"{p}.{kind}"] for p in "qkv"]) for kind in ("weight", "bias")}
        theirs.load_state_dict(packed | {f"out_proj.{kind}": parts[f"proj.{kind}"] for kind in ("weight", "bias")})
        return theirs(query, key, value, attn_mask=blocked, need_weights=False)[0]

    blocked = (~seen).expand(-1, 2, -1, -1).flatten(0, 1)
    x = layer.norm1(queries + torch_s(layer.cross_attention, queries + positions, keys, values, blocked))
    x = layer.norm2(x + torch_s(layer.self_attention, x + positions, x + positions, x, None))
    x = layer.norm3(x + layer.contract(layer.expand(x).relu()))
    torch.testing.assert_close(layer(queries, positions, keys, values, seen), x)


def test_masks_of_shrunk_maps_are_shrunk_masks() -> None:
    """What saves making every mask whole for attention."""
    head = mask2former().eval()
    with torch.inference_mode():
        features, encoded = head.pixel_decoder(head.backbone(batch().pixels))
        queries, masks = head.decode(features, encoded, every=True)[1]
        for each in encoded:
            size = (each.shape[-2], each.shape[-1])
            seen = may_see(head.mask_embed(queries), resize(features, size).flatten(2))[:, 0]
            expected = (resize(masks, size).sigmoid() >= 0.5).flatten(2)
            assert torch.equal(seen, expected | ~expected.any(-1, keepdim=True))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (45, 70), (33, 130)])
def test_masks_cover_the_canvas_and_not_its_padding(height: int, width: int) -> None:
    head = mask2former().eval()
    given = batch(height, width, truth=True)
    padded = Frame((height, width), (height, width), (-(-height // 32) * 32, -(-width // 32) * 32))
    pixels = torch.stack([padded.apply(picture, head.mean) for picture in given.pixels])
    with torch.inference_mode():
        found = head(given)
        whole = head(Batch(pixels, given.tasks, (padded,) * 2, given.keys))
    assert found.masks.shape[-2:] == (-(-height // 4), -(-width // 4))
    assert found.earlier[0].masks.shape == found.masks.shape
    torch.testing.assert_close(found.masks, whole.masks[..., : found.masks.shape[-2], : found.masks.shape[-1]])


def test_the_pixel_decoder_stays_in_single_precision() -> None:
    model = segmenter().eval()
    head = model.proposer
    assert isinstance(head, Mask2Former)
    maps = head.backbone(batch().pixels)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features, encoded = head.pixel_decoder([each.bfloat16() for each in maps])
        assert {features.dtype, *(each.dtype for each in encoded)} == {torch.float32}
        assert model(batch(truth=False))[0].masks.isfinite().all()


def test_first_weights_look_around() -> None:
    """Head m looks in its own direction, point p at p + 1 px, all points alike."""
    attention = DeformableAttention(16, 4, 3, 2)
    offsets = attention.offsets.bias.view(4, 3, 2, 2)
    right, down, left, up = (torch.tensor(step) for step in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]))
    for head, direction in enumerate((right, down, left, up)):
        for point in range(2):
            expected = (direction * (point + 1)).expand(3, -1)
            torch.testing.assert_close(offsets[head, :, point], expected, atol=1e-6, rtol=0)
    for parameter in (attention.offsets.weight, attention.weights.weight, attention.weights.bias):
        assert not parameter.any()


def test_a_token_that_looks_nowhere_else_reads_itself() -> None:
    """Places are where tokens lie: with no offset, and maps of one value a token, each reads its own map's token there."""
    decoder = PixelDecoder([4, 4, 4, 4], width=4, mask_width=4, heads=1, layers=1, feedforward=4, points=1).eval()
    attention = next(iter(decoder.layers)).attention
    assert isinstance(attention, DeformableAttention)
    noted: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, given: noted.extend([given[2], given[3]]))
    decoder([torch.zeros(1, 4, 16, 24), torch.zeros(1, 4, 8, 12), torch.zeros(1, 4, 4, 6), torch.zeros(1, 4, 2, 3)])
    sizes, places = noted
    assert [tuple(size) for size in sizes] == [(2, 3), (4, 6), (8, 12)]
    # The first token of the coarsest map lies at its own centre, and amid four of the next map and sixteen of the finest.
    assert places[0].tolist() == [[0.0, 0.0], [0.5, 0.5], [1.5, 1.5]]
    # The last of the finest.
    torch.testing.assert_close(places[-1], torch.tensor([[2.375, 1.375], [5.25, 3.25], [11.0, 7.0]]))


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ({"kind": "taps", "trunk": VIT, "depths": [0, 1]}, "needs four maps, fine to coarse"),
        ({"kind": "taps", "trunk": VIT, "depths": [0, 1]}, "`simple_pyramid` makes them of others"),
    ],
)
def test_backbones_without_a_pyramid_are_refused_with_the_remedy(backbone: Mapping[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        segmenter(backbone=backbone)


@pytest.mark.parametrize(
    "backbone",
    [
        {"kind": "simple_pyramid", "width": 8, "backbone": {"kind": "taps", "trunk": VIT, "depths": [1]}},
        {
            "kind": "simple_pyramid",
            "width": 8,
            "backbone": {
                "kind": "stem_vit", "channels": [4, 8, 16], "residuals": [1, 1], "width": 16, "depth": 1, "heads": 2,
                "channels_out": 8,
            },
        },
    ],
)  # fmt: skip
def test_it_finds_masks_on_plain_trunks(backbone: Mapping[str, Any]) -> None:
    model = segmenter(backbone=backbone).train()
    torch.stack(list(model.losses(batch()).values())).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.eval().segment(torch.zeros(3, 40, 50, dtype=torch.uint8), "panoptic").masks.shape[-2:] == (40, 50)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match="width 16 is not divisible by 3 heads"):
        segmenter(heads=3)


def test_every_backbone_s_maps_reach_it_in_order() -> None:
    """The finest map makes masks and is encoded by none; the others come coarse to fine."""
    head = mask2former()
    assert isinstance(head.backbone, Backbone)
    shapes = [entrance[0].in_channels for entrance in head.pixel_decoder.entrances]
    assert shapes == [64, 32, 16]
    assert head.pixel_decoder.lateral[0].in_channels == 8
