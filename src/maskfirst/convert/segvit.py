"""SegViT's released checkpoints: the ATM cascade and the Shrunk structure, told apart and measured by their tensors.

Zhang et al., "SegViT: Semantic Segmentation with Plain Vision Transformers", NeurIPS 2022.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor

from maskfirst.convert.rename import Leave, Move, Rule, Split, count
from maskfirst.convert.vit import mmseg_rules

Structure = Literal["cascade", "shrunk"]


@dataclass(frozen=True)
class Facts:
    """What the tensors say. Not in them: the number of heads, the tapped blocks and the place where tokens shrink.

    `side`: of the square pictures it was made for, px. `width` and `depth` of the ViT; `stages` decoders of `layers`
    layers of `head_width`.
    """

    structure: Structure
    classes: int
    side: int
    patch: int
    width: int
    depth: int
    head_width: int
    stages: int
    layers: int

    def __str__(self) -> str:
        name = "SegViT-Shrunk" if self.structure == "shrunk" else "SegViT"
        return f"a {name} for {self.classes} classes at {self.side} px on a ViT of {self.depth} blocks of {self.width}"


_BACKGROUND = ("vocabulary=pascal_context_60", "data.train.classes=60", "data.val.classes=60")
_NO_BACKGROUND = ("vocabulary=pascal_context_59", "data.train.classes=59", "data.val.classes=59")
RECIPES: Mapping[tuple[Structure, int, int, int], tuple[str, tuple[str, ...]]] = {
    ("cascade", 768, 150, 512): ("segvit-vit-b-ade20k", ()),
    ("cascade", 1024, 150, 640): ("segvit-vit-l-ade20k", ()),
    ("shrunk", 1024, 150, 640): ("segvit-vit-l-shrunk-ade20k", ()),
    ("cascade", 1024, 171, 512): ("segvit-vit-l-coco-stuff-10k", ()),
    ("shrunk", 1024, 171, 512): ("segvit-vit-l-shrunk-coco-stuff-10k", ()),
    ("cascade", 1024, 59, 480): ("segvit-vit-l-pascal-context", ()),
    ("cascade", 1024, 60, 480): ("segvit-vit-l-pascal-context", _BACKGROUND),
    ("shrunk", 1024, 59, 480): ("segvit-vit-l-shrunk-pascal-context", _NO_BACKGROUND),
    ("shrunk", 1024, 60, 480): ("segvit-vit-l-shrunk-pascal-context", ()),
}
"""Structure, width of the ViT, classes and side -> the recipe of a published row, and what must be overridden in it.

PASCAL-Context has 59 classes, or 60 with the background; the released configs, checkpoints and tables do not agree on which.
"""


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe whose model these tensors are, with its overrides; None for models of no published row."""
    found = facts(tensors)
    return RECIPES.get((found.structure, found.width, found.classes, found.side))


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole SegViT."""
    return any(key.startswith("decode_head.decoder_1.layers.") for key in keys)


def structure(keys: Collection[str]) -> Structure:
    """Which of the two these keys belong to; the single head's are the cascade's."""
    return "shrunk" if any(key.startswith("decode_head.atm.") for key in keys) else "cascade"


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that every SegViT has is missing."""
    kind = structure(tensors)
    head = "decode_head.atm." if kind == "shrunk" else "decode_head."
    projection = tensors["backbone.patch_embed.projection.weight"]
    return Facts(
        kind,
        classes=tensors[f"{head}class_embed.weight"].shape[0] - 1,
        side=isqrt(tensors["backbone.pos_embed"].shape[1] - 1) * projection.shape[-1],
        patch=projection.shape[-1],
        width=projection.shape[0],
        depth=count(tensors, r"backbone\.layers\.(\d+)\..*"),
        head_width=tensors["decode_head.q.weight"].shape[1],
        stages=count(tensors, r"decode_head\.decoder_(\d+)\..*"),
        layers=count(tensors, rf"{re.escape(head)}decoder_1\.layers\.(\d+)\..*"),
    )


def rules(keys: Collection[str]) -> list[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `atm` (or `atm_single`) or `atm_shrunk`."""
    head, stage, kind = r"decode_head\.", r"(?P<stage>\d+)", "(?P<kind>weight|bias)"
    table: list[Rule] = [
        *mmseg_rules(final_norm=False, foreign="backbone.", ours="proposer.backbone.trunk."),
        Move(rf"{head}input_proj_{stage}\.{kind}", _filled("proposer.entrances.{stage}.proj.{kind}")),
        Move(rf"{head}proj_norm_{stage}\.{kind}", _filled("proposer.entrances.{stage}.norm.{kind}")),
        *_decoder(rf"{head}decoder_{stage}", "proposer.decoders.{stage}"),
        Move(rf"{head}loss_decode\.criterion\.empty_weight", "criterion.class_weights"),
        Leave(rf"{head}(conv_[01]|syncbn_fc_0)\..*", "a branch of an older revision, used in training alone"),
    ]
    if structure(keys) == "cascade":
        return [
            *table,
            Move(rf"{head}q\.weight", "proposer.queries.weight"),
            Move(rf"{head}class_embed\.(weight|bias)", r"namer.linear.\1"),
        ]
    unread = "the inner head's copy of the loss's weights, which nothing reads"
    return [
        *table,
        Move(rf"{head}q\.weight", "proposer.grid_queries.weight"),
        Move(rf"{head}atm\.q\.weight", "proposer.queries.weight"),
        Move(rf"{head}atm\.class_embed\.(weight|bias)", r"namer.linear.\1"),
        *_decoder(rf"{head}atm\.decoder_1", "proposer.masks"),
        Leave(rf"{head}atm\.loss_decode\.criterion\.empty_weight", unread),
    ]


def _filled(template: str) -> Callable[[re.Match[str]], str]:
    """`template` with the groups of a match; stages are counted from 1 there and from 0 here."""

    def fill(match: re.Match[str]) -> str:
        groups = match.groupdict()
        stage = {"stage": int(groups["stage"]) - 1} if "stage" in groups else {}
        return template.format_map(groups | stage)

    return fill


def _decoder(foreign: str, ours: str) -> list[Rule]:
    """One stack of decoder layers. Self-attentions, and the vanilla layers' cross-attentions, are packed there."""
    layer, kind, home = rf"{foreign}\.layers\.(?P<layer>\d+)", "(?P<kind>weight|bias)", f"{ours}.layers.{{layer}}"
    table: list[Rule] = [
        Move(
            rf"{layer}\.multihead_attn\.(?P<name>[qkv]|proj)\.{kind}", _filled(home + ".cross_attention.{name}.{kind}")
        ),
        Move(rf"{layer}\.linear1\.{kind}", _filled(home + ".expand.{kind}")),
        Move(rf"{layer}\.linear2\.{kind}", _filled(home + ".contract.{kind}")),
        Move(rf"{layer}\.(?P<name>norm[123])\.{kind}", _filled(home + ".{name}.{kind}")),
    ]
    for name, attention in (("self_attn", "self_attention"), ("multihead_attn", "cross_attention")):
        parts = tuple(_filled(f"{home}.{attention}.{part}.{{kind}}") for part in "qkv")
        table.append(Split(rf"{layer}\.{name}\.in_proj_{kind}", parts))
        table.append(Move(rf"{layer}\.{name}\.out_proj\.{kind}", _filled(f"{home}.{attention}.proj.{{kind}}")))
    return table
