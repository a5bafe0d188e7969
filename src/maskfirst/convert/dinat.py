"""DiNAT's released weights: the backbone in a segmenter's checkpoint, and alone, as classification leaves it.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022. NAT, of the same authors, has the same names.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from maskfirst.backbones.dinat import DiNAT
from maskfirst.convert.rename import Copy, Join, Leave, Move, Rule, count
from maskfirst.errors import UserError

BACKBONE = "proposer.backbone."
STEM = "patch_embed.proj.1.weight"
BLOCK = r"levels\.(\d+)\.blocks\.(\d+)\."
BEGUN = r"norms\.\d\.(weight|bias)"
"""What a segmenter adds to a backbone of classification: norms of its maps, which begin with doing nothing more."""
_TABLE = "levels.0.blocks.0.attn.rpb"
_NO_HEAD = "what classification has behind the backbone"


def backbone(theirs: str = r"backbone\.", to: str = BACKBONE) -> list[Rule]:
    """To the backbone `dinat` at `to`; the keys begin with what the regular expression `theirs` fits."""
    block, home = rf"{theirs}{BLOCK}", rf"{to}stages.\1.blocks.\2."
    kind = "(weight|bias)"

    return [
        Move(rf"{block}(norm[12])\.{kind}", rf"{home}\3.\4"),
        Move(rf"{block}attn\.(qkv|proj)\.{kind}", rf"{home}attention.\3.\4"),
        Move(rf"{block}attn\.rpb", rf"{home}attention.bias"),
        Move(rf"{block}mlp\.fc1\.{kind}", rf"{home}expand.\3"),
        Move(rf"{block}mlp\.fc2\.{kind}", rf"{home}contract.\3"),
        Move(rf"{block}gamma([12])", rf"{home}scale\3"),
        _halving(rf"{theirs}levels", to),
        Move(rf"{theirs}patch_embed\.proj\.([01])\.{kind}", rf"{to}stages.0.entrance.convolutions.\1.\2"),
        Move(rf"{theirs}patch_embed\.norm\.{kind}", rf"{to}stages.0.entrance.norm.\1"),
        Move(rf"{theirs}norm(\d)\.{kind}", rf"{to}norms.\1.\2"),
    ]


def _halving(levels: str, to: str) -> Rule:
    """A map is halved at the end of a stage there, and at the beginning of the next one here."""

    def entrance(match: re.Match[str]) -> str:
        part = "convolutions.0" if match[2] == "reduction" else "norm"
        return f"{to}stages.{int(match[1]) + 1}.entrance.{part}.{match[3]}"

    return Move(rf"{levels}\.(\d+)\.downsample\.(reduction|norm)\.(weight|bias)", entrance)


def transformers(theirs: str, to: str = BACKBONE) -> list[Rule]:
    """As `backbone`, from the names of the library `transformers`, which keeps queries, keys and values apart."""
    kind = "(weight|bias)"
    block, home = rf"{theirs}encoder\.levels\.(\d+)\.layers\.(\d+)\.", rf"{to}stages.\1.blocks.\2."

    return [
        Move(rf"{block}layernorm_before\.{kind}", rf"{home}norm1.\3"),
        Move(rf"{block}layernorm_after\.{kind}", rf"{home}norm2.\3"),
        *(
            Join(rf"{block}attention\.self\.{name}\.{kind}", rf"{home}attention.qkv.\3", part, 3)
            for part, name in enumerate(("query", "key", "value"))
        ),
        Move(rf"{block}attention\.self\.rpb", rf"{home}attention.bias"),
        Move(rf"{block}attention\.output\.dense\.{kind}", rf"{home}attention.proj.\3"),
        Move(rf"{block}intermediate\.dense\.{kind}", rf"{home}expand.\3"),
        Move(rf"{block}output\.dense\.{kind}", rf"{home}contract.\3"),
        Copy(
            rf"{block}layer_scale_parameters",
            (rf"{home}scale1", rf"{home}scale2"),
            (lambda both: both[0].clone(), lambda both: both[1].clone()),
        ),
        _halving(rf"{theirs}encoder\.levels", to),
        Move(
            rf"{theirs}embeddings\.patch_embeddings\.projection\.([01])\.{kind}",
            rf"{to}stages.0.entrance.convolutions.\1.\2",
        ),
        Move(rf"{theirs}embeddings\.norm\.{kind}", rf"{to}stages.0.entrance.norm.\1"),
        Move(rf"{theirs}hidden_states_norms\.stage(\d)\.{kind}", lambda m: f"{to}norms.{int(m[1]) - 1}.{m[2]}"),
        Leave(rf"{theirs}layernorm\.{kind}", _NO_HEAD),
    ]


def is_alone(keys: Collection[str]) -> bool:
    """Whether these are the keys of a backbone as classification names it."""
    return {_TABLE, STEM} <= set(keys)


def build(tensors: Mapping[str, Tensor]) -> DiNAT:
    """A backbone of that size, without memory, its dilations 1, as they show in no tensor.

    Raises LookupError where a key or an axis of every DiNAT is missing, UserError for windows of no odd side.
    """
    width, first = tensors[STEM].shape[0], "levels.0.blocks.0."
    stages = count(tensors, r"levels\.(\d+)\..*")
    depths = tuple(count(tensors, rf"levels\.{stage}\.blocks\.(\d+)\..*") for stage in range(stages))
    side = tensors[_TABLE].shape[1]
    if side % 4 != 1:
        raise UserError(f"a DiNAT's windows have an odd side, and its tables of biases would be of {(side + 1) / 2:g}")
    with torch.device("meta"):
        made = DiNAT(
            "t",
            width,
            depths,
            tuple(tensors[f"levels.{stage}.blocks.0.attn.rpb"].shape[0] for stage in range(stages)),
            (side + 1) // 2,
            tuple((1,) * depth for depth in depths),
            tensors[f"{first}mlp.fc1.bias"].shape[0] / width,
            1.0 if f"{first}gamma1" in tensors else None,
        )
    if "norm0.weight" not in tensors:
        del made.norms
    return made


def part_rules() -> list[Rule]:
    """From a backbone of classification, without its head."""
    return [*backbone("", ""), Leave(r"(norm|head)\.(weight|bias)", _NO_HEAD)]
