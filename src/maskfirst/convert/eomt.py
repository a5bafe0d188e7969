"""EoMT's released checkpoints, in the original's keys and in those of transformers, on DINOv2 and on DINOv3.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from maskfirst.convert.rename import Join, Leave, Move, Rule, count
from maskfirst.errors import UserError

ORIGINAL = "network.encoder.backbone."
_TRUNK = "proposer.trunk.vit."
_TINY = 0.05
"""Mean size of a norm's weights below which they are differences: those of a trained ViT are some tenths or more."""


@dataclass(frozen=True)
class Facts:
    """What the tensors say; the number of heads is not in them. `side`: px of the square pictures, None on a DINOv3.

    `width` and `depth` of the ViT, the last `blocks` blocks of which `queries` join.
    """

    rotary: bool
    classes: int
    side: int | None
    width: int
    depth: int
    queries: int
    blocks: int

    def __str__(self) -> str:
        size = "" if self.side is None else f" at {self.side} px"
        trunk = f"a {'DINOv3' if self.rotary else 'DINOv2'} of {self.depth} blocks of {self.width}"
        return f"an EoMT of {self.queries} queries in {self.blocks} blocks for {self.classes} classes{size} on {trunk}"


RECIPES: Mapping[tuple[bool, int, int, int, int | None], str] = {
    (False, 384, 133, 200, 640): "eomt-s-coco-panoptic",
    (False, 768, 133, 200, 640): "eomt-b-coco-panoptic",
    (False, 1024, 133, 200, 640): "eomt-l-coco-panoptic",
    (False, 1024, 133, 200, 1280): "eomt-l-coco-panoptic-1280",
    (False, 1536, 133, 200, 640): "eomt-g-coco-panoptic",
    (False, 1536, 133, 200, 1280): "eomt-g-coco-panoptic-1280",
    (False, 1024, 80, 200, 640): "eomt-l-coco-instance",
    (False, 1024, 80, 200, 1280): "eomt-l-coco-instance-1280",
    (False, 1024, 150, 200, 640): "eomt-l-ade20k-panoptic",
    (False, 1024, 150, 200, 1280): "eomt-l-ade20k-panoptic-1280",
    (False, 1536, 150, 200, 640): "eomt-g-ade20k-panoptic",
    (False, 1536, 150, 200, 1280): "eomt-g-ade20k-panoptic-1280",
    (False, 1024, 150, 100, 512): "eomt-l-ade20k",
    (False, 1024, 19, 100, 1024): "eomt-l-cityscapes",
    (True, 384, 133, 200, None): "eomt-s-dinov3-coco-panoptic",
    (True, 768, 133, 200, None): "eomt-b-dinov3-coco-panoptic",
    (True, 1024, 150, 100, None): "eomt-l-dinov3-ade20k",
}
"""On a DINOv3 or not, width, classes, queries and side -> the recipe of a published row.

EoMT-L on DINOv3 for COCO is not among them: its models for 640 and for 1280 px have the same tensors, so that its user must
say which one it is.
"""


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole EoMT."""
    return ("network.q.weight" in keys and f"{ORIGINAL}norm.weight" in keys) or (
        {"query.weight", "class_predictor.weight", "layernorm.weight"} <= set(keys)
        and any(key.startswith("upscale_block.") for key in keys)
    )


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key of every EoMT is missing, UserError for differences to a DINOv3."""
    if "network.q.weight" in tensors:
        queries, names = tensors["network.q.weight"], tensors["network.class_head.weight"]
        chances, block = tensors["network.attn_mask_probs"], rf"{re.escape(ORIGINAL)}blocks\.(\d+)\..*"
        rotary = f"{ORIGINAL}patch_embed.cls_token" in tensors
        kernel = None if rotary else tensors[f"{ORIGINAL}patch_embed.proj.weight"]
        table = None if rotary else tensors[f"{ORIGINAL}pos_embed"][0]
        if rotary:
            _check_whole(tensors)
    else:
        queries, names = tensors["query.weight"], tensors["class_predictor.weight"]
        chances, block = tensors["attn_mask_probs"], r"layers\.(\d+)\..*"
        rotary = "embeddings.patch_embeddings.weight" in tensors
        kernel = None if rotary else tensors["embeddings.patch_embeddings.projection.weight"]
        table = None if rotary else tensors["embeddings.position_embeddings.weight"]
    return Facts(
        rotary,
        classes=names.shape[0] - 1,
        side=None if table is None or kernel is None else isqrt(table.shape[0]) * kernel.shape[-1],
        width=queries.shape[1],
        depth=count(tensors, block),
        queries=queries.shape[0],
        blocks=chances.shape[0],
    )


def _check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for the trunk of the original's releases on DINOv3, whose licence lets them hold differences only."""
    norms = [tensor for key, tensor in tensors.items() if re.fullmatch(rf"{re.escape(ORIGINAL)}.*norm\d?\.weight", key)]
    if torch.stack([norm.float().abs().mean() for norm in norms]).mean() < _TINY:
        raise UserError(
            "its trunk holds differences to the weights of a DINOv3 instead of weights; add those of the same DINOv3 in "
            "transformers' form, key by key, first, or take the release in the form of transformers, which is whole"
        )


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe whose model these tensors are; None for models of no published row."""
    found = facts(tensors)
    name = RECIPES.get((found.rotary, found.width, found.classes, found.queries, found.side))
    return None if name is None else (name, ())


def rules(keys: Collection[str]) -> list[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `eomt`, `class_head` and `set`."""
    kind = "(weight|bias)"
    doubling = r"(?:network\.upscale|upscale_block\.block)\.(\d+)"
    head: list[Rule] = [
        Move(r"(?:network\.q|query)\.weight", "proposer.queries.weight"),
        Move(rf"(?:network\.class_head|class_predictor)\.{kind}", r"namer.linear.\1"),
        Move(rf"{doubling}\.conv1\.weight", r"proposer.upscale.\1.open.weight", _opened),
        Move(rf"{doubling}\.conv1\.bias", r"proposer.upscale.\1.bias"),
        Move(rf"{doubling}\.conv2\.weight", r"proposer.upscale.\1.mix.weight"),
        Move(rf"{doubling}\.(?:norm|layernorm2d)\.{kind}", r"proposer.upscale.\1.norm.\2"),
        Move(rf"network\.mask_head\.([024])\.{kind}", r"proposer.mask_head.\1.\2"),
        Move(rf"mask_head\.fc([123])\.{kind}", lambda match: f"proposer.mask_head.{2 * int(match[1]) - 2}.{match[2]}"),
        Leave(r"criterion\.empty_weight", "the weights of the names in the loss, which are told in the recipe"),
        Leave(r"(network\.)?attn_mask_probs", "the chances of masking, which only training has"),
        Leave(r"network\.encoder\.pixel_(mean|std)", "the normalisation, which is told in the recipe"),
    ]
    if "network.q.weight" not in keys:
        gated = any(key.endswith(".mlp.gate_proj.weight") for key in keys)
        rotary = "embeddings.patch_embeddings.weight" in keys
        return [*head, *_transformers(r"embeddings\.", r"layers\.", r"layernorm\.", rotary, gated)]
    backbone = re.escape(ORIGINAL)
    if f"{ORIGINAL}patch_embed.cls_token" in keys:
        parts = (rf"{backbone}patch_embed\.", rf"{backbone}blocks\.", rf"{backbone}norm\.")
        return [*head, *_transformers(*parts, rotary=True, gated=False)]
    # The original's DINOv2 is timm's, as is ours.
    return [*head, Move(rf"{backbone}(cls_token|reg_token|pos_embed|(patch_embed|blocks|norm)\..*)", rf"{_TRUNK}\1")]


def _transformers(embeddings: str, blocks: str, norm: str, rotary: bool, gated: bool) -> list[Rule]:
    """From transformers' DINOv2 or, with `rotary`, DINOv3 to timm's. `gated`: its MLP multiplies two branches."""
    block, here, kind = rf"{blocks}(\d+)", rf"{_TRUNK}blocks.\1", "(weight|bias)"
    table: list[Rule] = [
        Move(rf"{embeddings}cls_token", f"{_TRUNK}cls_token"),
        Move(rf"{embeddings}register_tokens", f"{_TRUNK}reg_token"),
        Move(rf"{embeddings}patch_embeddings\.(?:projection\.)?{kind}", rf"{_TRUNK}patch_embed.proj.\1"),
        Move(rf"{embeddings}position_embeddings\.weight", f"{_TRUNK}pos_embed", lambda rows: rows[None]),
        Leave(rf"{embeddings}mask_token", "the token of hidden patches, which only its pretraining has"),
        Move(rf"{norm}{kind}", rf"{_TRUNK}norm.\1"),
        Move(rf"{block}\.norm([12])\.{kind}", rf"{here}.norm\2.\3"),
        Move(rf"{block}\.attention\.(?:out|o)_proj\.{kind}", rf"{here}.attn.proj.\2"),
        Move(rf"{block}\.layer_scale([12])\.lambda1", rf"{here}.gamma_\2" if rotary else rf"{here}.ls\2.gamma"),
        Move(rf"{block}\.mlp\.(?:fc1|weights_in)\.{kind}", rf"{here}.mlp.fc1.\2"),
        Move(rf"{block}\.mlp\.(?:fc2|weights_out|down_proj)\.{kind}", rf"{here}.mlp.fc2.\2"),
    ]
    for part, name in enumerate("qkv"):
        table.append(Join(rf"{block}\.attention\.{name}_proj\.weight", f"{here}.attn.qkv.weight", part, 3))
        if rotary:
            table.append(Move(rf"{block}\.attention\.{name}_proj\.bias", f"{here}.attn.{name}_bias"))
        else:
            table.append(Join(rf"{block}\.attention\.{name}_proj\.bias", f"{here}.attn.qkv.bias", part, 3))
    if not gated:
        return [*table, Move(rf"{block}\.mlp\.up_proj\.{kind}", rf"{here}.mlp.fc1.\2")]
    branches = enumerate(("gate_proj", "up_proj"))
    return [
        *table,
        *(Join(rf"{block}\.mlp\.{name}\.{kind}", rf"{here}.mlp.fc1.\2", part, 2) for part, name in branches),
    ]


def _opened(kernel: Tensor) -> Tensor:
    """A transposed convolution's kernel (in, out, 2, 2) as a linear layer's weights (2 * 2 * out, in)."""
    return kernel.permute(2, 3, 1, 0).flatten(0, 2)
