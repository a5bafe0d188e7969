"""ADE20K in its SceneParse150 release: 150 classes of indoor and outdoor scenes, 100 of them things.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

from pathlib import Path

from maskfirst.data.coco import PanopticFile
from maskfirst.data.coding import UNKNOWN, Coding, Numbered
from maskfirst.data.folder import Paired, choose, match
from maskfirst.data.vocabulary import load
from maskfirst.types import VOID

_PARTS = {"train": "training", "val": "validation"}


class ADE20K(Paired):
    """The semantic task: `images` and `annotations`, each with `training` (20,210) and `validation` (2,000).

    0 is unlabelled.
    """

    def __init__(self, root: str = "data/ADEChallengeData2016", split: str = "train", limit: int | None = None) -> None:
        """`split`: train or val. `limit`: use so many pairs. Raises DataError."""
        part = choose(split, _PARTS, "ade20k")
        listing = match(Path(root), f"images/{part}", f"annotations/{part}", limit=limit)
        super().__init__(listing, Coding(load("ade20k"), shift=-1))


class ADE20KInstance(Paired):
    """The instance task of 2017: maps in `annotations_instance` whose red is the class, 1..100, and green the instance.

    0 in either is no instance. Classes are the things of the 150, in their order.
    """

    def __init__(self, root: str = "data/ADEChallengeData2016", split: str = "train", limit: int | None = None) -> None:
        """`split`: train or val. `limit`: use so many pairs. Raises DataError."""
        part = choose(split, _PARTS, "ade20k_instance")
        listing = match(Path(root), f"images/{part}", f"annotations_instance/{part}", limit=limit)
        words = load("ade20k_things")

        def split_color(number: int) -> tuple[int, int | None]:
            red, green = number >> 16, number >> 8 & 255
            return (UNKNOWN if red > len(words) else red - 1 if red and green else VOID), green

        super().__init__(listing, Numbered(words, split_color, "red for the class and green for the instance", True))


class ADE20KPanoptic(PanopticFile):
    """The panoptic task as Mask2Former's scripts put it together: `ade20k_panoptic_{train,val}.json` and their folders."""

    def __init__(self, root: str = "data/ADEChallengeData2016", split: str = "train", limit: int | None = None) -> None:
        """`split`: train or val. `limit`: use so many pictures. Raises DataError or FormatError."""
        place, part = Path(root), choose(split, _PARTS, "ade20k_panoptic")
        annotations = place / f"ade20k_panoptic_{split}.json"
        super().__init__(annotations, place / "images" / part, vocabulary=load("ade20k_panoptic"), limit=limit)
