"""Mapillary Vistas v1.2: streets all over the world in 65 classes, 37 of them things.

Neuhold et al., "The Mapillary Vistas Dataset for Semantic Understanding of Street Scenes", ICCV 2017.
"""

from dataclasses import replace
from pathlib import Path

from maskfirst.data.coco import PanopticFile
from maskfirst.data.coding import UNKNOWN, Coding, Numbered
from maskfirst.data.folder import Listing, Paired, choose, match
from maskfirst.data.vocabulary import load
from maskfirst.types import VOID

_PARTS = {"train": "training", "val": "validation"}
_WHOLE = {"train": ("training",), "val": ("validation",), "trainval": ("training", "validation")}
_UNLABELLED = 65
_INSTANCES = 256
"""An instance map holds label * 256 + instance, of stuff always instance 0."""


_AS_CITYSCAPES = {
    "road": ("Road", "Lane Marking - General", "Manhole"),
    "sidewalk": ("Sidewalk", "Curb"),
    "building": ("Building",),
    "wall": ("Wall",),
    "fence": ("Fence",),
    "pole": ("Pole", "Utility Pole"),
    "traffic light": ("Traffic Light",),
    "traffic sign": ("Traffic Sign (Front)",),
    "vegetation": ("Vegetation",),
    "terrain": ("Terrain",),
    "sky": ("Sky",),
    "person": ("Person",),
    "rider": ("Bicyclist", "Motorcyclist", "Other Rider"),
    "car": ("Car",),
    "truck": ("Truck",),
    "bus": ("Bus",),
    "train": ("On Rails",),
    "motorcycle": ("Motorcycle",),
    "bicycle": ("Bicycle",),
}
"""Cityscapes' name -> Mapillary's that count as it, as in ViT-Adapter's pre-training; the other 38 are no class."""


class Mapillary(Paired):
    """The semantic task: `{training,validation}/{images,labels}` (18,000 and 2,000 pictures)."""

    def __init__(self, root: str = "data/mapillary_vistas", split: str = "train", limit: int | None = None) -> None:
        """`split`: train, val, or trainval for both. The truth may also lie in `training/v1.2`. `limit`: use so many.

        Raises DataError.
        """
        listing = _labelled(Path(root), split, "mapillary", limit)
        super().__init__(listing, Coding(load("mapillary_vistas"), ignore=_UNLABELLED))


class MapillaryAsCityscapes(Paired):
    """The semantic task in Cityscapes' 19 classes, to train on before Cityscapes itself."""

    def __init__(self, root: str = "data/mapillary_vistas", split: str = "train", limit: int | None = None) -> None:
        """See Mapillary."""
        listing = _labelled(Path(root), split, "mapillary_cityscapes", limit)
        meant = {fine: name for name, members in _AS_CITYSCAPES.items() for fine in members}
        ids = {number: meant.get(fine) for number, fine in enumerate(load("mapillary_vistas").names)}
        super().__init__(listing, Coding(load("cityscapes"), ignore=_UNLABELLED, ids=ids))


class MapillaryInstance(Paired):
    """All 65 classes with their things told apart, from the 16-bit maps in `instances`; these know of no crowds."""

    def __init__(self, root: str = "data/mapillary_vistas", split: str = "train", limit: int | None = None) -> None:
        """See Mapillary."""
        place, part = Path(root), choose(split, _PARTS, "mapillary_instance")
        listing = match(place, f"{part}/images", f"{_truth(place, part)}/instances", limit=limit)
        super().__init__(listing, Numbered(load("mapillary_vistas"), _split, f"label * {_INSTANCES} + instance"))


class MapillaryPanoptic(PanopticFile):
    """The panoptic task: `panoptic/panoptic_2018.json` with the maps beside it."""

    def __init__(self, root: str = "data/mapillary_vistas", split: str = "train", limit: int | None = None) -> None:
        """See Mapillary. Raises FormatError, too."""
        place, part = Path(root), choose(split, _PARTS, "mapillary_panoptic")
        maps = place / _truth(place, part) / "panoptic"
        words = load("mapillary_vistas")
        super().__init__(maps / "panoptic_2018.json", place / part / "images", maps, words, limit)


def _split(number: int) -> tuple[int, int | None]:
    label, instance = divmod(number, _INSTANCES)
    return (label if label < _UNLABELLED else VOID if label == _UNLABELLED else UNKNOWN), instance


def _labelled(root: Path, split: str, kind: str, limit: int | None) -> Listing:
    """The pairs of a split's label maps; of several parts, each key begins with its part."""
    parts = choose(split, _WHOLE, kind)
    found = [match(root, f"{part}/images", f"{_truth(root, part)}/labels") for part in parts]
    if len(found) > 1:
        found = [
            replace(each, pairs=tuple(replace(pair, key=f"{part}/{pair.key}") for pair in each.pairs))
            for part, each in zip(parts, found, strict=True)
        ]
    return Listing(
        ", ".join(each.place for each in found),
        tuple(pair for each in found for pair in each.pairs)[:limit],
        tuple(path for each in found for path in each.images),
        tuple(path for each in found for path in each.labels),
    )


def _truth(root: Path, part: str) -> str:
    return f"{part}/v1.2" if (root / part / "v1.2").is_dir() else part
