"""PADing's released checkpoints: a Mask2Former, the classifier that takes its class head's place, and what taught it.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation", CVPR 2023.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from maskfirst import recipe as recipes
from maskfirst.convert import mask2former
from maskfirst.convert.mask2former import moves, packed
from maskfirst.convert.rename import Move, Rule

SYNTHESIS = "namer.synthesis."
CLASSIFIER = "new_fc.weight"
PRIMITIVES = "dict_feature.weight"
_RECIPES: Mapping[tuple[int, int], str] = {
    (171, 512): "pading-semantic-coco-stuff",
    (65, 300): "pading-instance-coco-48-17",
    (80, 300): "pading-instance-coco-65-15",
    (133, 512): "pading-panoptic-coco",
}
"""Classes and numbers a class vector -> the recipe."""
_WITHOUT_VECTORS = ("namer.synthesis.vectors=null", "namer.synthesis.kept=false")


@dataclass(frozen=True)
class Facts:
    """What the tensors say. `length`: numbers of a class vector, which are not in the file."""

    stage: mask2former.Facts
    primitives: int
    length: int

    def __str__(self) -> str:
        vectors = f"class vectors of {self.length} numbers, which it lacks"
        return f"a PADing of {self.primitives} primitives for {vectors}, on {self.stage}"


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a whole PADing."""
    return CLASSIFIER in keys and PRIMITIVES in keys and mask2former.recognises(keys)


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Read from shapes. Raises LookupError where a key or an axis that every PADing has is missing."""
    return Facts(mask2former.facts(tensors), tensors[PRIMITIVES].shape[0], tensors["fc_projection.weight"].shape[1])


def plan(tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]] | None:
    """The bundled recipe of a model of these shapes, without class vectors; None where there is none."""
    found = facts(tensors)
    name = _RECIPES.get((found.stage.classes, found.length))
    return (name, _WITHOUT_VECTORS) if name in recipes.names() and found.stage.backbone == "r50" else None


def generator_rules() -> list[Rule]:
    """What makes queries, of class vectors."""
    layer, own = r"generator\.layers\.(\d+)\.", rf"{SYNTHESIS}generator.layers.\1."
    return [
        Move(r"dict_feature\.weight", f"{SYNTHESIS}generator.primitives"),
        *packed(rf"{layer}self_attn", f"{own}self_attention"),
        *packed(rf"{layer}multihead_attn", f"{own}cross_attention"),
        *moves(
            {
                r"fc_projection": f"{SYNTHESIS}project",
                r"generator\.norm": f"{SYNTHESIS}generator.norm",
                rf"{layer}(norm[123])": rf"{own}\2",
                rf"{layer}linear1": f"{own}expand",
                rf"{layer}linear2": f"{own}contract",
            }
        ),
    ]


def net_rules() -> list[Rule]:
    """What takes made queries apart."""
    return moves(
        {
            r"projection_(related|unrelated)\.encoder\.(\d)": rf"{SYNTHESIS}\1.\2",
            r"decoder\.decoder\.(\d)": rf"{SYNTHESIS}rebuild.layers.\1",
            r"relation\.fc1": f"{SYNTHESIS}relation.layers.0",
            r"relation\.fc2": f"{SYNTHESIS}relation.layers.2",
        }
    )


def rules(keys: Collection[str]) -> Sequence[Rule]:
    """From the keys of a whole checkpoint to those of a Segmenter of `mask2former` and `pading` on a `pyramid`."""
    return [
        *moves({r"new_fc": "namer.linear", r"sem_seg_head\.predictor\.class_embed": f"{SYNTHESIS}head"}),
        *generator_rules(),
        *net_rules(),
        *mask2former.rules(keys),
    ]
