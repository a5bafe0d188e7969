"""PASCAL-Context: whole scenes of PASCAL VOC 2010 in its 59 most frequent classes, with or without background.

Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR 2014.
"""

from pathlib import Path
from typing import Literal

from maskfirst.data.coding import Coding
from maskfirst.data.folder import Paired, match_list, opened
from maskfirst.data.vocabulary import load


class PascalContext(Paired):
    """`JPEGImages` and `SegmentationClassContext`, by the lists in `ImageSets/SegmentationContext` (4,998 / 5,105)."""

    def __init__(
        self,
        root: str = "data/VOCdevkit/VOC2010",
        split: str = "train",
        classes: Literal[59, 60] = 59,
        instances: Literal["components"] | None = None,
        smallest: int = 1,
        limit: int | None = None,
    ) -> None:
        """`split`: the list's name, train or val. `classes`: 59, where background is unlabelled, or 60, where it is class 0.

        `instances`, `smallest`: see Folder. `limit`: use so many pairs. Raises DataError.
        """
        names = f"ImageSets/SegmentationContext/{split}.txt"
        listing = match_list(Path(root), "JPEGImages", "SegmentationClassContext", names, limit)
        words = load(f"pascal_context_{classes}")
        coding = Coding(words, shift=-1 if classes == 59 else 0)
        super().__init__(listing, coding, opened(words, instances, smallest))
