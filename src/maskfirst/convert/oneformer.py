"""OneFormer's released checkpoints, as the original names them and as transformers does, on any backbone that is known here.

Jain et al., "OneFormer: One Transformer to Rule Universal Image Segmentation", CVPR 2023.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.backbones.internimage import DESIGNS
from maskfirst.convert import internimage, pyramids
from maskfirst.convert.mask2former import (
    HEAD,
    KIND,
    LOSS,
    NORMALISATION,
    every_other,
    moves,
    original_head,
    packed,
    transformers_pixels,
)
from maskfirst.convert.rename import Leave, Move, Rule

TEXTS = f"{HEAD}texts."
_TEXTLESS = "a part of what it was trained with, of which not all is there"
_CLASS, _LAYER, _TEXT = rf"{HEAD}class_layers.\1.", rf"{HEAD}layers.\1.", rf"{TEXTS}encoder.layers.\1."


@dataclass(frozen=True)
class Spelling:
    """One project's names. All but `rules` are regular expressions of keys: of the task's token, the classifier, the
    queries' positions, what is of texts, and each without which texts are none."""

    name: str
    task: str
    classifier: str
    positions: str
    texts: str
    whole: tuple[str, ...]
    rules: Callable[[], list[Rule]]


def _class_transformer(match: str, norm: str) -> list[Rule]:
    """The layers that look at the whole map, which are torch's in both."""
    layer = rf"{match}layers\.(\d+)\."
    return [
        *packed(rf"{layer}self_attn", f"{_CLASS}self_attention"),
        *packed(rf"{layer}multihead_attn", f"{_CLASS}cross_attention"),
        *moves(
            {
                rf"{layer}linear1": f"{_CLASS}expand",
                rf"{layer}linear2": f"{_CLASS}contract",
                rf"{layer}(norm[123])": rf"{_CLASS}\2",
                norm: f"{HEAD}class_norm",
            }
        ),
    ]


def text_rules() -> list[Rule]:
    """The original's text encoder, which is CLIP's, and what stands behind it."""
    layer = r"text_encoder\.transformer\.resblocks\.(\d+)\."
    return [
        *packed(rf"{layer}attn", f"{_TEXT}attention"),
        *moves(
            {
                rf"{layer}ln_1": f"{_TEXT}norm1",
                rf"{layer}ln_2": f"{_TEXT}norm2",
                rf"{layer}mlp\.c_fc": f"{_TEXT}expand",
                rf"{layer}mlp\.c_proj": f"{_TEXT}contract",
                r"text_encoder\.ln_final": f"{TEXTS}encoder.norm",
                r"text_projector\.layers\.0": f"{TEXTS}project.0",
                r"text_projector\.layers\.1": f"{TEXTS}project.2",
            }
        ),
        Move(r"text_encoder\.token_embedding\.weight", f"{TEXTS}encoder.embed.weight"),
        Move(r"text_encoder\.positional_embedding", f"{TEXTS}encoder.positions"),
        Move(r"prompt_ctx\.weight", f"{TEXTS}context"),
        Move(r"criterion\.logit_scale", f"{TEXTS}log_scale"),
    ]


def _original() -> list[Rule]:
    predictor = r"sem_seg_head\.predictor\."
    inner = rf"{predictor}class_transformer\.decoder\."
    return [
        *original_head(),
        *_class_transformer(inner, rf"{inner}norm"),
        *moves(
            {
                rf"{predictor}class_input_proj": f"{HEAD}entrance",
                r"task_mlp\.layers\.0": f"{HEAD}task.expand",
                r"task_mlp\.layers\.1": f"{HEAD}task.contract",
            }
        ),
        *text_rules(),
        Leave(r"criterion\.empty_weight", LOSS),
        Leave(r"pixel_(mean|std)", NORMALISATION),
    ]


def _transformers() -> list[Rule]:
    module = r"model\.transformer_module\."
    inner = rf"{module}decoder\.query_transformer\.decoder\."
    layer = rf"{module}decoder\.layers\.(\d+)\."
    texts = r"model\.text_mapper\."
    text = rf"{texts}text_encoder\.transformer\.layers\.(\d+)\."
    return [
        *transformers_pixels(),
        *_class_transformer(inner, rf"{inner}norm"),
        *moves(
            {
                rf"{module}decoder\.decoder_norm": f"{HEAD}norm",
                rf"{module}decoder\.class_embed": "namer.linear",
                rf"{module}decoder\.query_input_projection": f"{HEAD}entrance",
                rf"{layer}cross_attn\.norm": f"{_LAYER}norm1",
                rf"{layer}self_attn\.norm": f"{_LAYER}norm2",
                rf"{layer}ffn\.norm": f"{_LAYER}norm3",
                rf"{layer}ffn\.linear1": f"{_LAYER}expand",
                rf"{layer}ffn\.linear2": f"{_LAYER}contract",
                rf"{layer}self_attn\.self_attn\.([qkv])_proj": rf"{_LAYER}self_attention.\2",
                rf"{layer}self_attn\.self_attn\.out_proj": f"{_LAYER}self_attention.proj",
                r"model\.task_encoder\.task_mlp\.layers\.0\.0": f"{HEAD}task.expand",
                r"model\.task_encoder\.task_mlp\.layers\.1\.0": f"{HEAD}task.contract",
                rf"{text}layer_norm1": f"{_TEXT}norm1",
                rf"{text}layer_norm2": f"{_TEXT}norm2",
                rf"{text}mlp\.fc1": f"{_TEXT}expand",
                rf"{text}mlp\.fc2": f"{_TEXT}contract",
                rf"{texts}text_encoder\.ln_final": f"{TEXTS}encoder.norm",
                rf"{texts}text_projector\.layers\.0\.0": f"{TEXTS}project.0",
                rf"{texts}text_projector\.layers\.1\.0": f"{TEXTS}project.2",
            }
        ),
        *packed(rf"{layer}cross_attn\.multihead_attn", f"{_LAYER}cross_attention"),
        *packed(rf"{text}self_attn", f"{_TEXT}attention"),
        Move(rf"{module}decoder\.mask_embed\.layers\.(\d)\.0{KIND}", every_other),
        Move(rf"{module}queries_embedder\.weight", f"{HEAD}positions"),
        Move(rf"{module}level_embed\.weight", f"{HEAD}level_embed"),
        Move(rf"{texts}text_encoder\.token_embedding\.weight", f"{TEXTS}encoder.embed.weight"),
        Move(rf"{texts}text_encoder\.positional_embedding", f"{TEXTS}encoder.positions"),
        Move(rf"{texts}prompt_ctx\.weight", f"{TEXTS}context"),
        Move(r"criterion\.logit_scale", f"{TEXTS}log_scale"),
        Leave(r"criterion\.empty_weight", LOSS),
    ]


@dataclass(frozen=True)
class Base:
    """A family of backbones. Its functions are given the foreign keys, or the tensors by them; `name` is as in recipes."""

    recognises: Callable[[Collection[str]], bool]
    name: Callable[[Mapping[str, Tensor]], str]
    rules: Callable[[Collection[str]], Sequence[Rule]]


def _pyramid(keys: Collection[str]) -> pyramids.Spelling:
    found = pyramids.spelling(keys)
    if found is None:
        raise KeyError("the stem of a pyramid")
    return found


def _internimage(tensors: Mapping[str, Tensor]) -> str:
    width = tensors["backbone.patch_embed.conv2.weight"].shape[0]
    letters = [letter for letter, design in DESIGNS.items() if design.width == width]
    return f"internimage-{letters[0]}" if letters else f"an InternImage {width} wide"


BASES = (
    Base(
        lambda keys: pyramids.spelling(keys) is not None,
        lambda tensors: _pyramid(tensors).name(tensors),
        lambda keys: _pyramid(keys).rules(),
    ),
    Base(lambda keys: "backbone.levels.0.blocks.0.dcn.offset.weight" in keys, _internimage, internimage.backbone),
)
"""The first that recognises a checkpoint's keys counts. A new family needs its line here."""


SPELLINGS = (
    Spelling(
        "OneFormer",
        r"task_mlp\.layers\.0\.weight",
        r"sem_seg_head\.predictor\.class_embed\.weight",
        r"sem_seg_head\.predictor\.query_embed\.weight",
        r"(text_encoder|text_projector|prompt_ctx)\..*|criterion\.logit_scale",
        (r"text_encoder\.ln_final\.weight", r"prompt_ctx\.weight", r"criterion\.logit_scale"),
        _original,
    ),
    Spelling(
        "transformers' OneFormer",
        r"model\.task_encoder\.task_mlp\.layers\.0\.0\.weight",
        r"model\.transformer_module\.decoder\.class_embed\.weight",
        r"model\.transformer_module\.queries_embedder\.weight",
        r"model\.text_mapper\..*|criterion\.logit_scale",
        (
            r"model\.text_mapper\.text_encoder\.ln_final\.weight",
            r"model\.text_mapper\.prompt_ctx\.weight",
            r"criterion\.logit_scale",
        ),
        _transformers,
    ),
)
_DATA: Mapping[int, str] = {133: "coco", 150: "ade20k", 19: "cityscapes", 65: "mapillary"}
"""Classes -> what has so many. The first recipe of a data set counts, where files do not tell by their names."""


@dataclass(frozen=True)
class Facts:
    """What the tensors say. `texts`: whether what it was trained with besides is there."""

    backbone: str
    queries: int
    classes: int
    width: int
    texts: bool

    def __str__(self) -> str:
        return (
            f"a OneFormer of {self.queries} queries {self.width} wide for {self.classes} classes on {self.backbone}, "
            f"{'with' if self.texts else 'without'} texts"
        )


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole OneFormer, in any spelling."""
    return _spelling(keys) is not None


def _spelling(keys: Collection[str]) -> Spelling | None:
    return next((each for each in SPELLINGS if _only(keys, each.task) and _only(keys, each.classifier)), None)


def _only(keys: Collection[str], match: str) -> str | None:
    return next((key for key in keys if re.fullmatch(match, key)), None)


def _with_texts(keys: Collection[str], spelt: Spelling) -> bool:
    return all(_only(keys, match) for match in spelt.whole)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that every OneFormer has is missing."""
    spelt = _spelling(tensors)
    if spelt is None:
        raise KeyError("the token of the task")
    positions = tensors[_only(tensors, spelt.positions) or spelt.positions].shape
    classes = tensors[_only(tensors, spelt.classifier) or ""].shape[0] - 1
    base = _base(tensors)
    backbone = "a backbone of another kind" if base is None else base.name(tensors)
    return Facts(backbone, positions[0], classes, positions[1], _with_texts(tensors, spelt))


def _base(keys: Collection[str]) -> Base | None:
    return next((each for each in BASES if each.recognises(keys)), None)


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes, without texts where the file has none; None where there is none."""
    found = facts(tensors)
    first = f"oneformer-{found.backbone}-{_DATA.get(found.classes)}"
    for name in recipes.names():
        if name == first or name.startswith(f"{first}-"):
            proposer = recipes.load(name).tree["proposer"]
            if (proposer.get("queries", 150), proposer.get("width", 256)) == (found.queries, found.width):
                return name, () if found.texts else ("proposer.texts=null",)
    return None


def rules(keys: Collection[str]) -> Sequence[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `oneformer` and `class_head` on the backbone's kind."""
    spelt, base = _spelling(keys), _base(keys)
    if spelt is None:
        return []
    textless = [] if _with_texts(keys, spelt) else [Leave(spelt.texts, _TEXTLESS)]
    return [*textless, *spelt.rules(), *(base.rules(keys) if base else ())]
