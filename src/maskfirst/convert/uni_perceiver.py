"""Weights of Uni-Perceivers alone, as ViT-Adapter's authors release them for their trunk.

Zhu et al., "Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks", 2022.
"""

from collections.abc import Collection, Mapping
from math import isqrt

import torch
from torch import Tensor

from maskfirst.backbones.uni_perceiver import UniPerceiver
from maskfirst.convert.mask2former import moves
from maskfirst.convert.rename import Move, Rule, count

_EMBED = "visual_embed.patch_embed."
KERNEL = f"{_EMBED}proj.weight"
PLACES = f"{_EMBED}spatial_pos_embed.weight"
_MOMENTS = f"{_EMBED}temporal_pos_embed.weight"


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a Uni-Perceiver: places in pictures and in time, and the kernel of the patches."""
    return {KERNEL, PLACES, _MOMENTS} <= set(keys)


def build(tensors: Mapping[str, Tensor]) -> UniPerceiver:
    """A Uni-Perceiver of that size, without memory. Raises LookupError where an axis of every one is missing."""
    width, patch = tensors[KERNEL].shape[0], tensors[KERNEL].shape[2]
    side = isqrt(tensors[PLACES].shape[0]) * patch
    with torch.device("meta"):
        # The number of heads does not show in the tensors.
        return UniPerceiver((side, side), width, depth=count(tensors, r"layers\.(\d+)\..*"), heads=1, patch=patch)


def _in_a_batch(table: Tensor) -> Tensor:
    """Positions (N, D) as (1, N, D)."""
    return table.unsqueeze(0)


def _first(table: Tensor) -> Tensor:
    """A table of moments (M, D) without all but the first, which is the one of a picture that is no film."""
    return table[:1]


def rules(foreign: str = "", ours: str = "") -> list[Rule]:
    """To the trunk `uni_perceiver`. `foreign`, `ours`: what stands before the keys, with its dot."""
    there, home = foreign.replace(".", r"\."), f"{ours}plain.vit."
    embed, layer, block = rf"{there}visual_embed\.", rf"{there}layers\.(\d+)\.", rf"{home}blocks.\1."
    return [
        Move(rf"{embed}patch_embed\.spatial_pos_embed\.weight", f"{home}pos_embed", _in_a_batch),
        Move(rf"{embed}patch_embed\.temporal_pos_embed\.weight", f"{ours}moment", _first),
        Move(rf"{layer}gamma_([12])", rf"{block}ls\2.gamma"),
        *moves(
            {
                rf"{embed}embeddings_norm": f"{ours}embedding_norm",
                rf"{embed}patch_embed\.proj": f"{home}patch_embed.proj",
                rf"{layer}(norm[12])": rf"{block}\2",
                rf"{layer}self_attn\.in_proj": f"{block}attn.qkv",
                rf"{layer}self_attn\.out_proj": f"{block}attn.proj",
                rf"{layer}linear([12])": rf"{block}mlp.fc\2",
            }
        ),
    ]
