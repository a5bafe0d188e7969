"""Mapillary Vistas v1.2: streets all over the world in 65 classes, 37 of them things.

Neuhold et al., "The Mapillary Vistas Dataset for Semantic Understanding of Street Scenes", ICCV 2017.
"""

from pathlib import Path

from maskfirst.data.coco import PanopticFile
from maskfirst.data.coding import UNKNOWN, Coding, Numbered
from maskfirst.data.folder import Paired, choose, match
from maskfirst.data.vocabulary import load
from maskfirst.types import VOID

_PARTS = {"train": "training", "val": "validation"}
_UNLABELLED = 65
_INSTANCES = 256
"""An instance map holds label * 256 + instance, of stuff always instance 0."""


class Mapillary(Paired):
    """The semantic task: `{training,validation}/{images,labels}` (18,000 and 2,000 pictures)."""

    def __init__(self, root: str = "data/mapillary_vistas", split: str = "train", limit: int | None = None) -> None:
        """`split`: train or val. The truth may also lie in `training/v1.2`. `limit`: use so many. Raises DataError."""
        place, part = Path(root), choose(split, _PARTS, "mapillary")
        listing = match(place, f"{part}/images", f"{_truth(place, part)}/labels", limit=limit)
        super().__init__(listing, Coding(load("mapillary_vistas"), ignore=_UNLABELLED))


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


def _truth(root: Path, part: str) -> str:
    return f"{part}/v1.2" if (root / part / "v1.2").is_dir() else part
