"""Mask2Former's released checkpoints, in the three spellings that there are of one network.

The original's (detectron2), mmseg's as in the trees of InternImage and ViT-Adapter, and transformers'. Told apart by names
alone, never by what a file says of itself. Cheng et al., "Mask2Former", CVPR 2022.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.convert import pyramids
from maskfirst.convert.rename import Leave, Move, Rule, Split

HEAD = "proposer."
PIXELS = f"{HEAD}pixel_decoder."
KIND = r"\.(?P<kind>weight|bias)"
LOSS = "the weights of its loss, which the recipe has"
NORMALISATION = "the picture's normalisation, which the recipe has"


@dataclass(frozen=True)
class Spelling:
    """One project's names. `classifier`, `features`: regular expressions of the keys whose shapes tell a model."""

    name: str
    classifier: str
    features: str
    rules: Callable[[], list[Rule]]


def moves(table: Mapping[str, str]) -> list[Rule]:
    """Rules for pairs of weight and bias; their foreign names are regular expressions."""
    return [Move(match + KIND, rf"{to}.\g<kind>") for match, to in table.items()]


def packed(match: str, to: str) -> list[Rule]:
    """An attention of torch's, whose projections of queries, keys and values are one tensor."""
    parts = tuple(rf"{to}.{part}.\g<kind>" for part in "qkv")
    return [
        Split(rf"{match}\.in_proj_(?P<kind>weight|bias)", parts),
        *moves({rf"{match}\.out_proj": rf"{to}.proj"}),
    ]


def deformable(match: str, to: str) -> list[Rule]:
    """A deformable attention, which all call alike."""
    parts = {
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "value_proj": "value",
        "output_proj": "output",
    }
    return moves({rf"{match}\.{theirs}": f"{to}.{own}" for theirs, own in parts.items()})


def every_other(match: re.Match[str]) -> str:
    """Layers are counted alone there, and with the ReLUs between them here."""
    return f"{HEAD}mask_embed.{2 * int(match[1])}.{match['kind']}"


def original_head() -> list[Rule]:
    """The original's head, without what its queries begin as."""
    # Early files lack "pixel_decoder.", and loading them the original's way puts it before names that have it.
    pixels, predictor = r"sem_seg_head\.(?:pixel_decoder\.)*", r"sem_seg_head\.predictor\."
    layer, home = rf"{pixels}transformer\.encoder\.layers\.(\d+)\.", rf"{PIXELS}layers.\1."
    crosses, selves, feeds = (
        rf"{predictor}transformer_{name}_layers\.(\d+)\." for name in ("cross_attention", "self_attention", "ffn")
    )
    own = rf"{HEAD}layers.\1."
    return [
        *moves(
            {
                rf"{predictor}decoder_norm": f"{HEAD}norm",
                rf"{predictor}class_embed": "namer.linear",
                rf"{predictor}input_proj\.(\d)": rf"{HEAD}entrances.\1",
                rf"{crosses}norm": f"{own}norm1",
                rf"{selves}norm": f"{own}norm2",
                rf"{feeds}norm": f"{own}norm3",
                rf"{feeds}linear1": f"{own}expand",
                rf"{feeds}linear2": f"{own}contract",
                rf"{pixels}input_proj\.(\d)\.([01])": rf"{PIXELS}entrances.\1.\2",
                rf"{pixels}adapter_1\.norm": f"{PIXELS}lateral.1",
                rf"{pixels}adapter_1": f"{PIXELS}lateral.0",
                rf"{pixels}layer_1\.norm": f"{PIXELS}smooth.1",
                rf"{pixels}layer_1": f"{PIXELS}smooth.0",
                rf"{pixels}mask_features": f"{PIXELS}masks",
                rf"{layer}(norm[12])": rf"{home}\2",
                rf"{layer}linear1": f"{home}expand",
                rf"{layer}linear2": f"{home}contract",
            }
        ),
        *deformable(rf"{layer}self_attn", f"{home}attention"),
        *packed(rf"{crosses}multihead_attn", f"{own}cross_attention"),
        *packed(rf"{selves}self_attn", f"{own}self_attention"),
        Move(rf"{predictor}mask_embed\.layers\.(\d){KIND}", every_other),
        Move(rf"{predictor}query_embed\.weight", f"{HEAD}positions"),
        Move(rf"{predictor}level_embed\.weight", f"{HEAD}level_embed"),
        Move(rf"{pixels}transformer\.level_embed", f"{PIXELS}level_embed"),
    ]


def _original() -> list[Rule]:
    return [
        *original_head(),
        # The first releases called them "static".
        Move(r"sem_seg_head\.predictor\.(?:query_feat|static_query)\.weight", f"{HEAD}queries"),
        Leave(r"criterion\..*", LOSS),
        Leave(r"pixel_(mean|std)", NORMALISATION),
    ]


def mmseg_head() -> list[Rule]:
    """mmseg's head, without what its mask embeddings stand on."""
    head, pixels = r"decode_head\.", r"decode_head\.pixel_decoder\."
    layer, home = rf"{pixels}encoder\.layers\.(\d+)\.", rf"{PIXELS}layers.\1."
    decoder, own = rf"{head}transformer_decoder\.layers\.(\d+)\.", rf"{HEAD}layers.\1."
    return [
        *moves(
            {
                rf"{head}transformer_decoder\.post_norm": f"{HEAD}norm",
                rf"{head}cls_embed": "namer.linear",
                rf"{head}mask_embed\.(\d)": rf"{HEAD}mask_embed.\1",
                rf"{head}decoder_input_projs\.(\d)": rf"{HEAD}entrances.\1",
                rf"{decoder}norms\.0": f"{own}norm1",
                rf"{decoder}norms\.1": f"{own}norm2",
                rf"{decoder}norms\.2": f"{own}norm3",
                rf"{decoder}ffns\.0\.layers\.0\.0": f"{own}expand",
                rf"{decoder}ffns\.0\.layers\.1": f"{own}contract",
                rf"{pixels}input_convs\.(\d)\.conv": rf"{PIXELS}entrances.\1.0",
                rf"{pixels}input_convs\.(\d)\.gn": rf"{PIXELS}entrances.\1.1",
                rf"{pixels}lateral_convs\.0\.conv": f"{PIXELS}lateral.0",
                rf"{pixels}lateral_convs\.0\.gn": f"{PIXELS}lateral.1",
                rf"{pixels}output_convs\.0\.conv": f"{PIXELS}smooth.0",
                rf"{pixels}output_convs\.0\.gn": f"{PIXELS}smooth.1",
                rf"{pixels}mask_feature": f"{PIXELS}masks",
                rf"{layer}norms\.0": f"{home}norm1",
                rf"{layer}norms\.1": f"{home}norm2",
                rf"{layer}ffns\.0\.layers\.0\.0": f"{home}expand",
                rf"{layer}ffns\.0\.layers\.1": f"{home}contract",
            }
        ),
        *deformable(rf"{layer}attentions\.0", f"{home}attention"),
        *packed(rf"{decoder}attentions\.0\.attn", f"{own}cross_attention"),
        *packed(rf"{decoder}attentions\.1\.attn", f"{own}self_attention"),
        Move(rf"{head}query_feat\.weight", f"{HEAD}queries"),
        Move(rf"{head}query_embed\.weight", f"{HEAD}positions"),
        Move(rf"{head}level_embed\.weight", f"{HEAD}level_embed"),
        Move(rf"{pixels}level_encoding\.weight", f"{PIXELS}level_embed"),
        Leave(rf"{head}(loss_cls|loss_mask|loss_dice)\..*", LOSS),
    ]


def transformers_pixels() -> list[Rule]:
    """transformers' pixel decoder."""
    pixels = r"model\.pixel_level_module\.decoder\."
    layer, home = rf"{pixels}encoder\.layers\.(\d+)\.", rf"{PIXELS}layers.\1."
    return [
        *moves(
            {
                rf"{pixels}input_projections\.(\d)\.([01])": rf"{PIXELS}entrances.\1.\2",
                rf"{pixels}adapter_1\.([01])": rf"{PIXELS}lateral.\1",
                rf"{pixels}layer_1\.([01])": rf"{PIXELS}smooth.\1",
                rf"{pixels}mask_projection": f"{PIXELS}masks",
                rf"{layer}self_attn_layer_norm": f"{home}norm1",
                rf"{layer}final_layer_norm": f"{home}norm2",
                rf"{layer}fc1": f"{home}expand",
                rf"{layer}fc2": f"{home}contract",
            }
        ),
        *deformable(rf"{layer}self_attn", f"{home}attention"),
        Move(rf"{pixels}level_embed", f"{PIXELS}level_embed"),
    ]


def _transformers() -> list[Rule]:
    module = r"model\.transformer_module\."
    decoder, own = rf"{module}decoder\.layers\.(\d+)\.", rf"{HEAD}layers.\1."
    return [
        *transformers_pixels(),
        *moves(
            {
                rf"{module}decoder\.layernorm": f"{HEAD}norm",
                r"class_predictor": "namer.linear",
                rf"{module}input_projections\.(\d)": rf"{HEAD}entrances.\1",
                rf"{decoder}cross_attn_layer_norm": f"{own}norm1",
                rf"{decoder}self_attn_layer_norm": f"{own}norm2",
                rf"{decoder}final_layer_norm": f"{own}norm3",
                rf"{decoder}fc1": f"{own}expand",
                rf"{decoder}fc2": f"{own}contract",
                rf"{decoder}self_attn\.([qkv])_proj": rf"{own}self_attention.\2",
                rf"{decoder}self_attn\.out_proj": f"{own}self_attention.proj",
            }
        ),
        *packed(rf"{decoder}cross_attn", f"{own}cross_attention"),
        Move(rf"{module}decoder\.mask_predictor\.mask_embedder\.(\d)\.0{KIND}", every_other),
        Move(rf"{module}queries_features\.weight", f"{HEAD}queries"),
        Move(rf"{module}queries_embedder\.weight", f"{HEAD}positions"),
        Move(rf"{module}level_embed\.weight", f"{HEAD}level_embed"),
        Leave(r"criterion\..*", LOSS),
    ]


SPELLINGS = (
    Spelling(
        "Mask2Former",
        r"sem_seg_head\.predictor\.class_embed\.weight",
        r"sem_seg_head\.predictor\.(query_feat|static_query)\.weight",
        _original,
    ),
    Spelling("mmseg's Mask2Former", r"decode_head\.cls_embed\.weight", r"decode_head\.query_feat\.weight", mmseg_head),
    Spelling(
        "transformers' Mask2Former",
        r"class_predictor\.weight",
        r"model\.transformer_module\.queries_features\.weight",
        _transformers,
    ),
)
_DATA: Mapping[int, tuple[str, ...]] = {
    133: ("coco-panoptic",),
    80: ("coco-instance",),
    150: ("ade20k-panoptic", "ade20k-semantic"),
    100: ("ade20k-instance",),
    19: ("cityscapes-panoptic", "cityscapes-semantic"),
    8: ("cityscapes-instance",),
    65: ("mapillary-panoptic", "mapillary-semantic"),
}
"""Classes -> what has so many. Models of one data set for two tasks may be of the same shapes; the first then counts."""


@dataclass(frozen=True)
class Facts:
    """What the tensors say."""

    backbone: str
    queries: int
    classes: int
    width: int

    def __str__(self) -> str:
        return (
            f"a Mask2Former of {self.queries} queries {self.width} wide for {self.classes} classes on {self.backbone}"
        )


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole Mask2Former, in any spelling."""
    return _spelling(keys) is not None


def _spelling(keys: Collection[str]) -> Spelling | None:
    # OneFormer's files have the classifier, and no queries of their own.
    return next((each for each in SPELLINGS if _only(keys, each.classifier) and _only(keys, each.features)), None)


def _only(keys: Collection[str], match: str) -> str | None:
    return next((key for key in keys if re.fullmatch(match, key)), None)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that every Mask2Former has is missing."""
    found = _spelling(tensors)
    if found is None:
        raise KeyError("query features")
    backbone = pyramids.spelling(tensors)
    features = tensors[_only(tensors, found.features) or ""].shape
    classes = tensors[_only(tensors, found.classifier) or ""].shape[0] - 1
    return Facts(
        "a backbone of another kind" if backbone is None else backbone.name(tensors), features[0], classes, features[1]
    )


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes; None for models of no published row."""
    found = facts(tensors)
    for data in _DATA.get(found.classes, ()):
        # What a backbone was pretrained on shows in no shape.
        for backbone in (found.backbone, f"{found.backbone}-22k"):
            name = f"mask2former-{backbone}-{data}"
            if name in recipes.names() and _proposer(name).get("queries", 100) == found.queries:
                return name, ()
    return None


def _proposer(name: str) -> Mapping[str, Any]:
    return recipes.load(name).tree["proposer"]


def rules(keys: Collection[str]) -> Sequence[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `mask2former`, `class_head` and a `pyramid` or `dinat`."""
    found, backbone = _spelling(keys), pyramids.spelling(keys)
    return [*(found.rules() if found else ()), *(backbone.rules() if backbone else ())]
