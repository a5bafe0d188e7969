"""Weights of DINOv2s alone, in the keys of their own releases and of timm's, with registers and without.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023; Darcet et al., "Vision Transformers Need
Registers", 2023.
"""

import re
from collections.abc import Collection, Mapping
from math import isqrt

import torch
from torch import Tensor, nn

from maskfirst.backbones.vit import TimmViT
from maskfirst.convert.rename import Leave, Move, Rule, count
from maskfirst.convert.vit import NO_HEAD
from maskfirst.errors import UserError

BEFORE = r"(?:teacher\.|module\.|backbone\.)*"
"""What a training adds before the names."""
_BLOCK = r"blocks\.(?:\d+\.)?(\d+)"
"""Blocks may lie in chunks, and are numbered through all of them."""


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names without what stands before them."""
    return {re.sub(rf"^{BEFORE}", "", key): tensor for key, tensor in tensors.items()}


def depth(keys: Collection[str]) -> int:
    """How many blocks the plain names have."""
    return count(keys, rf"{_BLOCK}\..*")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a plain ViT whose branches are scaled, which of all those known here only DINOv2s are."""
    names = {re.sub(rf"^{BEFORE}", "", key) for key in keys}
    return {"patch_embed.proj.weight", "pos_embed"} <= names and any(
        re.fullmatch(r"blocks\.(0\.)?0\.ls1\.gamma", name) for name in names
    )


def build(tensors: Mapping[str, Tensor]) -> TimmViT:
    """A DINOv2 of that size, without memory, whose table of positions has a row for the class token where theirs has.

    Raises LookupError where a key or an axis of every DINOv2 is missing, UserError for positions of another kind.
    """
    found = plain(tensors)
    width, _, _, patch = found["patch_embed.proj.weight"].shape
    rows = found["pos_embed"].shape[1]
    registers = "register_tokens" in found or "reg_token" in found
    side = isqrt(rows)
    if rows - side * side not in ((0, 1) if registers else (1,)):
        raise UserError(f"a DINOv2 has positions of a class token and a square of patches, and these are {rows}")
    with torch.device("meta"):
        # The number of heads does not show in the tensors.
        trunk = TimmViT(
            (side * patch, side * patch),
            f"vit_{'giant' if _gated(found) else 'base'}_patch14_{'reg4_' if registers else ''}dinov2",
            width=width,
            depth=depth(found),
            heads=1,
            patch=patch,
        )
        # Beside registers a release has a row for the class token, too, and timm's table has none.
        trunk.vit.pos_embed = nn.Parameter(torch.empty(1, rows, width))
    return trunk


def _gated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether its MLP multiplies two branches, as that of the largest does: both come from one layer."""
    first = next((name for name in tensors if name.endswith((".mlp.w12.weight", ".mlp.fc1.weight"))), "mlp.fc1.weight")
    second = first.replace("w12", "w3").replace("fc1", "fc2")
    return tensors[first].shape[0] == 2 * tensors[second].shape[1]


def rules(ours: str = "") -> list[Rule]:
    """To `TimmViT`, tables of positions as they are. `ours`: what stands before its keys, with its dot."""
    here = f"{ours}vit."
    return [
        Move(rf"{BEFORE}(cls_token|pos_embed)", rf"{here}\1"),
        Move(rf"{BEFORE}(?:register_tokens|reg_token)", f"{here}reg_token"),
        Move(rf"{BEFORE}{_BLOCK}\.mlp\.w12\.(weight|bias)", rf"{here}blocks.\1.mlp.fc1.\2"),
        Move(rf"{BEFORE}{_BLOCK}\.mlp\.w3\.(weight|bias)", rf"{here}blocks.\1.mlp.fc2.\2"),
        Move(rf"{BEFORE}{_BLOCK}\.(.*)", rf"{here}blocks.\1.\2"),
        Move(rf"{BEFORE}(patch_embed|norm)\.(.*)", rf"{here}\1.\2"),
        Leave(rf"{BEFORE}mask_token", "the mask token of its pretraining, which nothing reads"),
        Leave(rf"{BEFORE}(dino_head|ibot_head)\..*", "the heads of its pretraining"),
        Leave(rf"{BEFORE}head\.(weight|bias)", NO_HEAD),
    ]
