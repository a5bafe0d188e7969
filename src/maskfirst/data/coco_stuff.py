"""COCO-Stuff-10K: 80 things and 91 stuff classes on COCO pictures.

Caesar et al., "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018.
"""

from pathlib import Path

from maskfirst.data.folder import Coding, Paired, choose, match
from maskfirst.data.vocabulary import load

_PARTS = {"train": "train2014", "val": "test2014", "test": "test2014"}


class COCOStuff10K(Paired):
    """`images` and `annotations`, each with `train2014` (9,000) and `test2014` (1,000).

    Label maps end in `_labelTrainIds.png`; 0 is unlabelled, 1..171 are the classes. Val and test are the same pictures.
    """

    def __init__(self, root: str = "data/coco_stuff10k", split: str = "train", limit: int | None = None) -> None:
        """`split`: train, val or test. `limit`: use so many pairs. Raises DataError."""
        part = choose(split, _PARTS, "coco_stuff_10k")
        listing = match(Path(root), f"images/{part}", f"annotations/{part}", "_labelTrainIds.png", limit)
        super().__init__(listing, Coding(load("coco_stuff_171"), shift=-1))
