"""Rules for ViT-Adapter's backbones: every key that mmseg's have finds its place, and lands there unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskfirst.backbones.adapter import Adapter
from maskfirst.backbones.beit import BEiT
from maskfirst.backbones.deconv_pyramid import DeconvPyramid
from maskfirst.backbones.uni_perceiver import UniPerceiver
from maskfirst.backbones.vit import Taps, TimmViT
from maskfirst.contracts import Backbone
from maskfirst.convert import vit_adapter
from maskfirst.convert.rename import RenameError, rename

D, DEPTH, HEADS, STEM, POINTS = 16, 4, 2, 4, 4
SMALL: dict[str, Any] = {"width": D, "depth": DEPTH, "heads": HEADS, "final_norm": False}


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    kept = dict.fromkeys((f"{name}.{each}" for each in ("running_mean", "running_var")), (channels,))
    return pair(name, channels) | kept | {f"{name}.num_batches_tracked": ()}


def look(name: str, levels: int) -> dict[str, tuple[int, ...]]:
    samples = HEADS * levels * POINTS
    return {
        **pair(f"{name}.query_norm", D), **pair(f"{name}.feat_norm", D),
        **pair(f"{name}.attn.sampling_offsets", 2 * samples, D), **pair(f"{name}.attn.attention_weights", samples, D),
        **pair(f"{name}.attn.value_proj", D // 2, D), **pair(f"{name}.attn.output_proj", D, D // 2),
    }  # fmt: skip


def extractor(name: str) -> dict[str, tuple[int, ...]]:
    hidden = D // 4
    return {
        **look(name, 1), **pair(f"{name}.ffn.fc1", hidden, D), **pair(f"{name}.ffn.fc2", D, hidden),
        **pair(f"{name}.ffn.dwconv.dwconv", hidden, 1, 3, 3), **pair(f"{name}.ffn_norm", D),
    }  # fmt: skip


def beside_the_trunk() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"level_embed": (3, D), **pair("up", D, D, 2, 2)}
    widths = [STEM, 2 * STEM, 4 * STEM, 4 * STEM]
    for place, inputs in ((0, 3), (3, STEM), (6, STEM)):
        shapes |= {f"spm.stem.{place}.weight": (STEM, inputs, 3, 3), **batch_norm(f"spm.stem.{place + 1}", STEM)}
    for level in range(1, 5):
        outputs = widths[level - 1]
        shapes |= {**pair(f"spm.fc{level}", D, outputs, 1, 1), **batch_norm(f"norm{level}", D)}
        if level > 1:
            shapes |= {f"spm.conv{level}.0.weight": (outputs, widths[level - 2], 3, 3)}
            shapes |= batch_norm(f"spm.conv{level}.1", outputs)
    for group in range(4):
        start = f"interactions.{group}"
        shapes |= {f"{start}.injector.gamma": (D,), **look(f"{start}.injector", 3), **extractor(f"{start}.extractor")}
    return shapes | extractor("interactions.3.extra_extractors.0") | extractor("interactions.3.extra_extractors.1")


def block(index: int, *scales: str) -> dict[str, tuple[int, ...]]:
    name = f"blocks.{index}"
    return {
        **pair(f"{name}.norm1", D), **pair(f"{name}.norm2", D), **pair(f"{name}.attn.proj", D, D),
        **pair(f"{name}.mlp.fc1", 4 * D, D), **pair(f"{name}.mlp.fc2", D, 4 * D), f"{name}.attn.qkv.weight": (3 * D, D),
        **{f"{name}.{scale}": (D,) for scale in scales},
    }  # fmt: skip


def plain() -> dict[str, tuple[int, ...]]:
    shapes = {"pos_embed": (1, 1 + 9, D), **pair("patch_embed.proj", D, 3, 16, 16)}
    for index in range(DEPTH):
        shapes |= {**block(index, "gamma1", "gamma2"), f"blocks.{index}.attn.qkv.bias": (3 * D,)}
    return shapes


def beit() -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, D), **pair("patch_embed.proj", D, 3, 16, 16)}
    for index in range(DEPTH):
        own = block(index, "gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")
        start = f"blocks.{index}.attn.relative_position"
        shapes |= {**own, f"{start}_bias_table": (5 * 7 + 3, HEADS), f"{start}_index": (13, 13)}
    return shapes


def uni_perceiver() -> dict[str, tuple[int, ...]]:
    embed, patch = "visual_embed.", "visual_embed.patch_embed."
    shapes = {**pair(f"{embed}embeddings_norm", D), **pair(f"{patch}proj", D, 3, 16, 16)}
    shapes |= {f"{patch}spatial_pos_embed.weight": (9, D), f"{patch}temporal_pos_embed.weight": (8, D)}
    for index in range(DEPTH):
        name = f"layers.{index}"
        shapes |= {
            **pair(f"{name}.norm1", D), **pair(f"{name}.norm2", D), **pair(f"{name}.self_attn.in_proj", 3 * D, D),
            **pair(f"{name}.self_attn.out_proj", D, D), **pair(f"{name}.linear1", 4 * D, D),
            **pair(f"{name}.linear2", D, 4 * D), f"{name}.gamma_1": (D,), f"{name}.gamma_2": (D,),
        }  # fmt: skip
    return shapes


def baseline() -> dict[str, tuple[int, ...]]:
    ups = {**pair("fpn1.0", D, D, 2, 2), **pair("fpn1.3", D, D, 2, 2), **pair("fpn2.0", D, D, 2, 2)}
    return beit() | ups | batch_norm("fpn1.1", D)


def backbone(kind: str) -> tuple[Backbone, dict[str, Tensor]]:
    """Ours, and random tensors by the keys of the same one there."""
    beside = {"heads": HEADS, "value_ratio": 0.5, "stem": STEM}
    if kind == "plain":
        trunk = TimmViT((48, 48), **SMALL, class_token="absent", layer_scale=1.0)
        made, shapes = Adapter(trunk, **beside), beside_the_trunk() | plain()
    elif kind == "uni-perceiver":
        made, shapes = Adapter(UniPerceiver((48, 48), D, DEPTH, HEADS), **beside), beside_the_trunk() | uni_perceiver()
    elif kind == "beit":
        made, shapes = Adapter(BEiT((48, 64), **SMALL), **beside), beside_the_trunk() | beit()
    else:
        made, shapes = DeconvPyramid(Taps(BEiT((48, 64), **SMALL), (0, 1, 2, 3))), baseline()
    return made, {f"backbone.{key}": torch.rand(shape) for key, shape in shapes.items()}


def brought(module: nn.Module, foreign: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    shapes = {f"proposer.backbone.{key}": tensor.shape for key, tensor in module.state_dict().items()}
    renamed = rename(foreign, vit_adapter.rules(foreign), shapes)
    return {key.removeprefix("proposer.backbone."): each for key, each in renamed.tensors.items()}, renamed.left


@pytest.mark.parametrize("kind", ["plain", "beit", "uni-perceiver", "baseline"])
def test_every_key_has_its_place(kind: str) -> None:
    module, foreign = backbone(kind)
    ours, left = brought(module, foreign)
    assert ours.keys() == module.state_dict().keys()
    assert set(left) == {key for key in foreign if key.endswith("relative_position_index")}
    # No two of theirs became one of ours, and no values were lost but the class token's position and the moments of films.
    lost = {"plain": D, "uni-perceiver": 7 * D}.get(kind, 0)
    indices = sum(foreign[key].numel() for key in left)
    assert (
        sum(each.numel() for each in ours.values()) == sum(each.numel() for each in foreign.values()) - indices - lost
    )
    # The released files lack what is computed.
    again, _ = brought(module, {key: each for key, each in foreign.items() if key not in left})
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def test_tensors_land_where_they_belong() -> None:
    module, foreign = backbone("plain")
    ours, _ = brought(module, foreign)
    for theirs, own in {
        "interactions.2.injector.gamma": "injectors.2.gate",
        "interactions.1.injector.feat_norm.bias": "injectors.1.token_norm.bias",
        "interactions.1.extractor.query_norm.bias": "extractors.1.query_norm.bias",
        "interactions.3.extra_extractors.1.ffn.fc2.weight": "extra_extractors.1.feedforward.contract.weight",
        "interactions.0.extractor.ffn.dwconv.dwconv.weight": "extractors.0.feedforward.mix.weight",
        "interactions.0.extractor.attn.sampling_offsets.weight": "extractors.0.attention.offsets.weight",
        "spm.conv3.1.running_var": "prior.down.1.1.running_var",
        "spm.stem.6.weight": "prior.stem.6.weight",
        "blocks.1.gamma2": "trunk.vit.blocks.1.ls2.gamma",
        "blocks.3.mlp.fc1.bias": "trunk.vit.blocks.3.mlp.fc1.bias",
        "norm4.running_mean": "norms.3.running_mean",
        "up.weight": "enlarge.weight",
    }.items():
        assert torch.equal(ours[own], foreign[f"backbone.{theirs}"]), theirs
    assert torch.equal(ours["prior.project.2.weight"], foreign["backbone.spm.fc3.weight"][:, :, 0, 0])
    assert torch.equal(ours["trunk.vit.pos_embed"], foreign["backbone.pos_embed"][:, 1:])


def test_other_networks_are_told() -> None:
    """Such as detection's copies, which have no class token."""
    module, foreign = backbone("beit")
    foreign["backbone.norm.weight"] = torch.rand(D)
    # By the keys alone it is a BEiT; what then lacks is told.
    rules = vit_adapter.rules(foreign)
    foreign.pop("backbone.cls_token")
    shapes = {f"proposer.backbone.{key}": tensor.shape for key, tensor in module.state_dict().items()}
    with pytest.raises(RenameError) as error:
        rename(foreign, rules, shapes)
    assert error.value.missing == ("proposer.backbone.trunk.vit.cls_token",)
    assert error.value.unknown == ("backbone.norm.weight",)


ADAPTED = dict.fromkeys(("spm.stem.0.weight", *(f"interactions.{group}.injector.gamma" for group in range(4))), (1,))
KERNEL = "patch_embed.proj.weight"


def of_beit(rows: int) -> dict[str, tuple[int, ...]]:
    """What tells a BEiT-L with tables of so many rows."""
    tables = {"blocks.0.attn.relative_position_bias_table": (rows, 16)}
    return {"cls_token": (1, 1, 1024), KERNEL: (1024, 3, 16, 16), **tables}


@pytest.mark.parametrize(
    ("trunk", "head", "recipe", "told"),
    [
        (
            {KERNEL: (384, 3, 16, 16), "pos_embed": (1, 197, 384), **ADAPTED},
            {"conv_seg.weight": (150, 512, 1, 1)},
            "adapter-deit-s-upernet-ade20k",
            "a ViT-Adapter of 4 interactions on a ViT 384 wide, of 224 px, with UperNet for 150 classes",
        ),
        (
            {f"visual_embed.{KERNEL}": (1024, 3, 16, 16), **ADAPTED}
            | {"visual_embed.patch_embed.spatial_pos_embed.weight": (196, 1024)},
            {"conv_seg.weight": (150, 512, 1, 1)},
            "adapter-uni-perceiver-l-upernet-ade20k",
            "a ViT-Adapter of 4 interactions on a Uni-Perceiver 1024 wide, of 224 px, with UperNet for 150 classes",
        ),
        (
            {**of_beit(3972), "fpn1.0.weight": (1024, 1024, 2, 2)},
            {"conv_seg.weight": (150, 1024, 1, 1)},
            "beit-l-upernet-ade20k",
            "a pyramid on a BEiT 1024 wide, of 512 px, with UperNet for 150 classes",
        ),
        (
            {**of_beit(3972), **ADAPTED},
            {"cls_embed.weight": (7, 256)},
            "adapter-beit-l-mask2former-potsdam",
            "a ViT-Adapter of 4 interactions on a BEiT 1024 wide, of 512 px, with Mask2Former for 6 classes",
        ),
        (
            {**of_beit(228), **ADAPTED},
            {"cls_embed.weight": (3, 256)},
            "adapter-beit-l-mask2former-chase-db1",
            "a ViT-Adapter of 4 interactions on a BEiT 1024 wide, of 128 px, with Mask2Former for 2 classes",
        ),
        (
            {**of_beit(6244), **ADAPTED},
            {"cls_embed.weight": (151, 1024)},
            "adapter-beit-l-mask2former-ade20k-640",
            "a ViT-Adapter of 4 interactions on a BEiT 1024 wide, of 640 px, with Mask2Former for 150 classes",
        ),
        (
            {**of_beit(3484), **ADAPTED},
            {"cls_embed.weight": (151, 1024)},
            None,
            "a ViT-Adapter of 4 interactions on a BEiT 1024 wide, of 480 px, with Mask2Former for 150 classes",
        ),
    ],
    ids=["deit", "uni-perceiver", "baseline", "potsdam", "chase", "640", "none"],
)
def test_shapes_ask_for_their_recipe(
    trunk: dict[str, tuple[int, ...]], head: dict[str, tuple[int, ...]], recipe: str | None, told: str
) -> None:
    shapes = {f"backbone.{key}": shape for key, shape in trunk.items()}
    shapes |= {f"decode_head.{key}": shape for key, shape in head.items()}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert vit_adapter.recognises(tensors)
    assert str(vit_adapter.facts(tensors)) == told
    assert vit_adapter.plan(tensors) == (None if recipe is None else (recipe, ()))
