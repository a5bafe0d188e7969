"""Data sets and augmentations, by the `kind` that a recipe calls them."""

from collections.abc import Mapping

from maskfirst.contracts import Augmentation, Dataset
from maskfirst.data.ade20k import ADE20K
from maskfirst.data.augment import Pad, Photometric, RandomCrop, RandomFlip, RandomScale
from maskfirst.data.coco_stuff import COCOStuff10K
from maskfirst.data.folder import Folder
from maskfirst.data.pascal_context import PascalContext
from maskfirst.data.shapes import Shapes

DATASETS: Mapping[str, type[Dataset]] = {
    "folder": Folder,
    "shapes": Shapes,
    "ade20k": ADE20K,
    "coco_stuff_10k": COCOStuff10K,
    "pascal_context": PascalContext,
}
AUGMENTATIONS: Mapping[str, type[Augmentation]] = {
    "scale": RandomScale,
    "crop": RandomCrop,
    "flip": RandomFlip,
    "photometric": Photometric,
    "pad": Pad,
}
