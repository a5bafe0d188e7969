"""ViT-Adapter around any trunk: its groups, its switches, pictures of any size, its gradients, and its published sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.backbones.adapter import Adapter, Extractor, Geometry
from maskfirst.backbones.beit import BEiT
from maskfirst.backbones.uni_perceiver import UniPerceiver
from maskfirst.backbones.vit import Taps, TimmViT
from maskfirst.contracts import Trunk
from maskfirst.ops import cpu

PLAIN = "vit_tiny_patch16_224"
DINOV2 = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_small_patch16_dinov3"
TRUNKS = ("plain", "class token", "beit", "uni-perceiver", "dinov2", "dinov3")
SIZES = [(32, 32), (48, 80), (70, 33), (64, 96)]


def trunk(kind: str = "plain", depth: int = 4, **settings: Any) -> Trunk:
    small: dict[str, Any] = {"width": 32, "depth": depth, "heads": 2, "final_norm": False, **settings}
    if kind == "beit":
        return BEiT((64, 64), **{"layer_scale": 1.0, **small})
    if kind == "uni-perceiver":
        small.pop("final_norm")
        return UniPerceiver((64, 64), **{"layer_scale": 1.0, **small})
    if kind == "dinov2":
        return TimmViT((64, 64), DINOV2, **{"patch": 16, "layer_scale": 1.0, **small})
    if kind == "dinov3":
        return TimmViT((64, 64), DINOV3, **{"layer_scale": 1.0, **small})
    return TimmViT((64, 64), PLAIN, class_token=True if kind == "class token" else "absent", **small)


def adapter(kind: str = "plain", depth: int = 4, **settings: Any) -> Adapter:
    """One that is not as it begins, where gates are closed and all places looked at are alike."""
    torch.manual_seed(0)
    made = Adapter(trunk(kind, depth), **{"heads": 2, "stem": 4, **settings})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith((".gate", ".offsets.weight", ".weights.weight", ".bias", "gamma")):
                parameter.normal_(std=0.3)
    return made.eval()


def pictures(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)) * 255


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_picture_on_any_trunk(kind: str, size: tuple[int, int]) -> None:
    made = adapter(kind)
    pixels = pictures(size)
    height, width = (-(-side // 32) * 32 for side in size)
    mean = torch.tensor(made.mean).view(1, 3, 1, 1)
    filled = torch.cat([pixels, mean.expand(2, -1, size[0], width - size[1])], 3)
    filled = torch.cat([filled, mean.expand(2, -1, height - size[0], width)], 2)
    with torch.inference_mode():
        maps, whole = made(pixels), made(filled)
    assert (made.channels, made.strides, made.multiple) == ((32,) * 4, (4, 8, 16, 32), 32)
    for found, same, stride in zip(maps, whole, made.strides, strict=True):
        assert found.shape == (2, 32, height // stride, width // stride)
        assert found.isfinite().all()
        assert torch.equal(found, same)


def test_both_branches_see_the_same_normalised_pixels() -> None:
    """Padding with the trunk's mean is nothing to either."""
    settings: dict[str, Any] = {"mean": (10.0, 20.0, 30.0), "std": (2.0, 3.0, 4.0)}
    made = Adapter(trunk(**settings), heads=2, stem=4).eval()
    bare = Adapter(trunk(mean=(0.0,) * 3, std=(1.0,) * 3), heads=2, stem=4).eval()
    bare.load_state_dict(made.state_dict())
    pixels = pictures((40, 64), 1)
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        for ours, same in zip(made(pixels), bare((pixels - mean) / std), strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TRUNKS)
def test_closed_gates_leave_the_trunk_as_it_is(kind: str) -> None:
    """At first, with gates of 0, the patches after each group are those of the trunk alone, class token and registers too."""
    made = Adapter(trunk(kind), heads=2, stem=4, gate=0.0).eval()
    noted: list[Tensor] = []
    for extractor in made.extractors:
        extractor.register_forward_pre_hook(lambda module, given: noted.append(given[1]))
    pixels = pictures((64, 96))
    with torch.inference_mode():
        made(pixels)
        taps = Taps(made.trunk, (0, 1, 2, 3))(pixels)
    for patches, tapped in zip(noted, taps, strict=True):
        torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (4, 6)), tapped)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("plain", 0), ("class token", 1), ("beit", 1), ("uni-perceiver", 0), ("dinov2", 5), ("dinov3", 5)],
)
def test_tokens_before_the_patches_go_through_the_blocks_alone(kind: str, prefix: int) -> None:
    made = adapter(kind)
    assert made.trunk.prefix == prefix
    counts: list[int] = []
    for part in (*made.injectors, *made.extractors, *made.extra_extractors):
        place = 1 if isinstance(part, Extractor) else 0
        part.register_forward_pre_hook(lambda module, given, place=place: counts.append(given[place].shape[1]))
    run, through = made.trunk.block, []

    def block(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        through.append((index, tokens.shape[1]))
        return run(index, tokens, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.trunk, "block", block)
        made(pictures((64, 96)))
    assert counts == [24] * 10
    assert through == [(index, prefix + 24) for index in range(4)]


@pytest.mark.parametrize(
    ("depth", "groups"),
    [
        (6, ((0, 1), (2, 2), (3, 4), (5, 5))),
        (5, ((0, 4),)),
        (3, ((0, 0), (1, 2))),
        (6, tuple((i, i) for i in range(6))),
    ],
)
def test_groups_may_be_uneven(depth: int, groups: tuple[tuple[int, int], ...]) -> None:
    made = adapter(depth=depth, interactions=groups, add_trunk=len(groups) == 4)
    assert len(made.injectors) == len(made.extractors) == len(groups)
    order: list[str] = []
    for index, (injector, extractor) in enumerate(zip(made.injectors, made.extractors, strict=True)):
        injector.register_forward_hook(lambda *_, index=index: order.append(f"in {index}"))
        extractor.register_forward_hook(lambda *_, index=index: order.append(f"out {index}"))
    run = made.trunk.block

    def block(index: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        order.append(f"block {index}")
        return run(index, tokens, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.trunk, "block", block)
        made(pictures((32, 64)))
    expected = []
    for index, (first, last) in enumerate(groups):
        expected += [f"in {index}", *(f"block {each}" for each in range(first, last + 1)), f"out {index}"]
    assert order == expected


def test_groups_are_four_of_one_length_unless_told() -> None:
    assert adapter(depth=8).groups == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_each_part_can_be_left_out() -> None:
    whole = set(adapter().state_dict())
    for settings, gone in (
        ({"convolution_ffn": False}, (".feedforward.", ".norm.")),
        ({"extra_extractors": 0}, ("extra_extractors.",)),
        ({"add_trunk": False}, ()),
    ):
        made = adapter(**settings)
        assert whole - set(made.state_dict()) == {
            name for name in whole if "extractors." in name and any(each in name for each in gone)
        }
        with torch.inference_mode():
            assert all(each.isfinite().all() for each in made(pictures((32, 64))))


def test_the_trunk_s_patches_are_added_map_by_map() -> None:
    made = adapter()
    bare = adapter(add_trunk=False)
    bare.load_state_dict(made.state_dict())
    for each in (made, bare):
        each.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    noted: list[Tensor] = []
    for extractor in made.extractors:
        extractor.register_forward_pre_hook(lambda module, given: noted.append(given[1]))
    with torch.inference_mode():
        with_trunk, without = made(pictures((64, 96))), bare(pictures((64, 96)))
    for index, (patches, factor) in enumerate(zip(noted, (4, 2, 1, 0.5), strict=True)):
        maps = patches.transpose(1, 2).unflatten(2, (4, 6))
        resized = F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
        torch.testing.assert_close(with_trunk[index] - without[index], resized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("size", [(64, 96), (40, 50)], ids=str)
def test_every_parameter_learns(kind: str, size: tuple[int, int]) -> None:
    made = adapter(kind, drop_path=0.2).train()
    torch.stack([each.square().mean() for each in made(pictures(size))]).sum().backward()
    assert not [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", ["plain", "beit", "dinov3"])
def test_what_is_made_anew_has_the_same_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that layers as small as these are run as large ones are.
    monkeypatch.setattr(cpu, "WORTH", 1)
    found = []
    for checkpointing in (False, True):
        made = adapter(kind, drop_path=0.5, checkpointing=checkpointing).train()
        # Rates of the trunk's own, too, which draw from the same stream.
        torch.manual_seed(3)
        with cpu.fast_on_cpu():
            loss = torch.stack([each.square().mean() for each in made(pictures((64, 96)))]).sum()
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in made.named_parameters()}))
    (kept, gradients), (anew, same) = found
    assert torch.equal(kept, anew)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_made_anew_is_not_kept() -> None:
    kept = []
    for checkpointing in (False, True):
        made, size = adapter(checkpointing=checkpointing).train(), 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made(pictures((64, 96)))
        kept.append(size)
    assert kept[1] < 0.6 * kept[0]


def test_extractors_drop_their_feed_forward_part_at_the_full_rate() -> None:
    made = adapter(drop_path=0.3)
    rates = [each.drop_path.drop_prob for each in (*made.extractors, *made.extra_extractors)]  # type: ignore[union-attr]
    assert rates == [0.3] * 6
    torch.manual_seed(0)
    lonely = Extractor(32, 2, 4, 1.0, 8, 1.0, 1e-6).train()
    geometry = Geometry.of((2, 2), torch.device("cpu"))
    tokens, patches = torch.randn(3, 21, 32), torch.randn(3, 4, 32)
    seen = lonely.attention(
        lonely.query_norm(tokens), lonely.token_norm(patches), [geometry.patches], geometry.onto_patches
    )
    torch.testing.assert_close(lonely(tokens, patches, geometry), tokens + seen)


def test_first_weights() -> None:
    torch.manual_seed(0)
    made = Adapter(trunk("beit", width=64), heads=2, stem=16, gate=1e-6)
    assert all((gate == 1e-6).all() for name, gate in made.named_parameters() if name.endswith(".gate"))
    spreads = {
        "level_embed": 1.0,
        "prior.stem.3.weight": (2 / (9 * 16)) ** 0.5,
        "prior.down.1.0.weight": (2 / (9 * 64)) ** 0.5,
        "prior.project.2.weight": (2 / 64) ** 0.5,
        "enlarge.weight": (2 / (4 * 64)) ** 0.5,
        "extractors.0.feedforward.mix.weight": (2 / 9) ** 0.5,
        "extractors.0.feedforward.expand.weight": 0.02,
        "extra_extractors.1.feedforward.contract.weight": 0.02,
    }
    state = made.state_dict()
    for name, spread in spreads.items():
        assert state[name].std().item() == pytest.approx(spread, rel=0.2), name
        bias = name.replace("weight", "bias")
        assert name == "level_embed" or bias not in state or not state[bias].any()
    assert not made.injectors[0].attention.offsets.weight.any()  # type: ignore[union-attr]


def test_places_lie_at_the_centres_of_tokens() -> None:
    geometry = Geometry.of((4, 6), torch.device("cpu"))
    assert geometry.maps == ((8, 12), (4, 6), (2, 3))
    assert geometry.onto_maps[0].tolist() == [[0.5, 0.5], [0.0, 0.0], [-0.25, -0.25]]
    assert geometry.onto_patches[0].tolist() == [[-0.25, -0.25]]
    assert geometry.onto_patches[-1].tolist() == [[4.5, 2.5]]
    assert geometry.onto_patches.dtype == torch.float32
    tokens = torch.arange(126.0).view(1, 126, 1)
    maps = geometry.split(tokens)
    assert [each[0, 0, -1, -1].item() for each in maps] == [95, 119, 125]


def test_it_runs_in_mixed_precision() -> None:
    made = adapter("beit")
    plain = made(pictures((64, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made(pictures((64, 64)))
    for found, expected in zip(mixed, plain, strict=True):
        assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interactions": ((0, 1), (2, 2))}, r"interactions \[\[0, 1\], \[2, 2\]\] should be groups .* blocks 0\.\.3"),
        ({"interactions": ((0, 1), (1, 3))}, r"should be groups in a row"),
        ({"interactions": ((0, 1), (3, 2), (2, 3))}, r"should be groups in a row"),
        ({"interactions": ()}, r"should be groups in a row"),
        ({"interactions": ((0, 3),)}, r"interactions has 1; set add_trunk to false"),
        ({"heads": 5}, "width 32 is not divisible by 5 heads"),
        ({"heads": 16, "value_ratio": 0.25}, "are not divisible by 16 heads"),
        ({"feedforward_ratio": 0.01}, "feedforward_ratio 0.01 of width 32 leaves no channel"),
    ],
)
def test_what_cannot_be_is_a_sentence(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        adapter(**settings)
    assert "\n" not in str(error.value)


def test_trunks_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="its trunk has 14 px; give the trunk `patch: 16`, to which kernels"):
        Adapter(TimmViT((70, 70), DINOV2, width=32, depth=4, heads=2), heads=2)
    with pytest.raises(ValueError, match=r"a trunk of 6 blocks does not fall into four groups .*give `interactions`"):
        adapter(depth=6)


PUBLISHED = [
    ("vit", 224, 192, 3, 6, 1.0, 12, {}, 7_966_640),
    ("vit", 224, 384, 6, 6, 1.0, 12, {}, 27_503_888),
    ("vit", 224, 768, 12, 12, 0.5, 12, {}, 99_495_392),
    ("vit", 384, 768, 12, 12, 0.5, 12, {}, 99_787_232),
    ("vit", 384, 1024, 16, 16, 0.5, 24, {}, 326_973_632),
    (
        "vit", 224, 768, 12, 12, 0.5, 12,
        {"interactions": ((0, 11),), "convolution_ffn": False, "extra_extractors": 0, "add_trunk": False}, 91_394_432,
    ),
    ("beit", 480, 768, 12, 12, 0.5, 12, {}, 99_837_344),
    ("beit", 512, 768, 12, 12, 0.5, 12, {}, 99_907_616),
    ("beit", 128, 1024, 16, 16, 0.5, 24, {}, 326_446_784),
    ("beit", 480, 1024, 16, 16, 0.5, 24, {}, 327_697_088),
    ("beit", 512, 1024, 16, 16, 0.5, 24, {}, 327_884_480),
    ("beit", 640, 1024, 16, 16, 0.5, 24, {}, 328_756_928),
    ("beit", 896, 1024, 16, 16, 0.5, 24, {}, 331_091_648),
    ("uni-perceiver", 224, 1024, 16, 16, 0.5, 24, {}, 326_593_728),
]  # fmt: skip
"""Trunk, its size, width and heads, those of deformable attention, their value ratio, blocks, settings and parameters."""


@pytest.mark.parametrize(
    ("kind", "size", "width", "heads", "looking", "ratio", "depth", "settings", "count"), PUBLISHED
)
def test_parameters_are_as_many_as_published(
    kind: str, size: int, width: int, heads: int, looking: int, ratio: float, depth: int, settings: dict[str, Any],
    count: int,
) -> None:  # fmt: skip
    with torch.device("meta"):
        inside: Trunk
        if kind == "beit":
            inside = BEiT((size, size), width=width, heads=heads, depth=depth)
        elif kind == "uni-perceiver":
            inside = UniPerceiver((size, size), width, depth, heads)
        else:
            inside = TimmViT(
                (size, size),
                width=width,
                heads=heads,
                depth=depth,
                final_norm=False,
                class_token="absent",
                layer_scale=1.0,
            )
        made = Adapter(inside, heads=looking, value_ratio=ratio, **settings)
    # A plain ViT's position table has a row for a class token there, which nothing reads, and none here; Uni-Perceiver's table
    # of moments has 8 there, of which a picture has the first.
    unread = {"vit": width, "uni-perceiver": 7 * width}.get(kind, 0)
    assert sum(parameter.numel() for parameter in made.parameters()) == count - unread


def test_it_needs_no_more_than_the_contract_of_a_trunk() -> None:
    """Nothing of timm's is read: a trunk of two lines is enough."""

    class Two(Trunk):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.depth, self.patch, self.prefix = 8, 4, 16, 2
            self.mean, self.std = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)
            self.project = nn.Conv2d(3, 8, 16, 16)

        def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
            maps = self.project(pixels / 255)
            tokens = maps.flatten(2).transpose(1, 2)
            return torch.cat([tokens.mean(1, keepdim=True).expand(-1, 2, -1), tokens], 1), (
                maps.shape[2],
                maps.shape[3],
            )

        def block(self, index: int, tokens: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
            return tokens + tokens[:, :1]

        def shrink_block(self, index: int, queries: Tensor, tokens: Tensor) -> Tensor:
            return queries

        def norm(self, tokens: Tensor) -> Tensor:
            return tokens

    maps = Adapter(Two(), heads=2, stem=4).eval()(pictures((33, 65)))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3)]
