"""Weights of BEiTs alone, BEiTv2's among them, as their authors release them and as timm keeps them.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022; Peng et al., "BEiT v2", 2022.
"""

from collections.abc import Collection, Mapping
from math import isqrt

import torch
from torch import Tensor

from maskfirst.backbones.beit import BEiT
from maskfirst.convert.rename import Copy, Leave, Move, Rule, count
from maskfirst.convert.vit import NO_HEAD
from maskfirst.errors import UserError

_TABLE = "attn.relative_position_bias_table"
_SHARED = "rel_pos_bias.relative_position_bias_table"
_KERNEL = "patch_embed.proj.weight"
_BLOCK = r"blocks\.(\d+)\..*"
_INDEX = "a table of the places in a window, which is computed"
_PRETRAINING = "what only its pretraining has: the token of hidden patches, and layers behind the trunk"
_OUTSIDE = 3
"""Rows of a table for the pairs in which the class token is, behind those for pairs of patches."""


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a BEiT: queries and values have biases of their own, and positions are learned.

    DINOv3's have the biases too, and positions that are computed.
    """
    return {"blocks.0.attn.q_bias", _KERNEL} <= set(keys) and (
        "pos_embed" in keys or any(key.endswith("relative_position_bias_table") for key in keys)
    )


def build(tensors: Mapping[str, Tensor]) -> BEiT:
    """A BEiT of that size, without memory.

    Raises LookupError where a key or an axis of every BEiT is missing, UserError for positions of another kind.
    """
    if "pos_embed" in tensors:
        raise UserError(
            "has absolute positions (pos_embed), and a BEiT here has relative ones, by a table in every block; "
            "take a release with such tables"
        )
    width, patch = tensors[_KERNEL].shape[0], tensors[_KERNEL].shape[2]
    table = tensors[_SHARED if _SHARED in tensors else f"blocks.0.{_TABLE}"]
    rows, heads = table.shape[0], table.shape[1]
    side = (isqrt(max(rows - _OUTSIDE, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + _OUTSIDE != rows:
        raise UserError(f"its tables of relative positions have {rows} rows, as for no square picture; is it a BEiT's?")
    with torch.device("meta"):
        return BEiT(
            (side * patch, side * patch),
            width=width,
            depth=count(tensors, _BLOCK),
            heads=heads,
            patch=patch,
            final_norm="norm.weight" in tensors,
        )


def rules(keys: Collection[str]) -> list[Rule]:
    """From unilm's BEiT or timm's to the trunk `beit`."""
    tables = tuple(f"vit.blocks.{index}.{_TABLE}" for index in range(count(keys, _BLOCK)))
    return [
        Leave(r"(rel_pos_bias|.*\.attn)\.relative_position_index", _INDEX),
        Leave(r"mask_token|(lm_head|cls_pt_\w+)\..*", _PRETRAINING),
        Leave(r"(head|fc_norm)\..*", NO_HEAD),
        Copy(_SHARED.replace(".", r"\."), tables),
        Move(r"(cls_token|(patch_embed|blocks|norm)\..*)", r"vit.\1"),
    ]
