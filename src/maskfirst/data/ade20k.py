"""ADE20K in its SceneParse150 release: 150 classes of indoor and outdoor scenes.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

from pathlib import Path

from maskfirst.data.folder import Coding, Paired, choose, match
from maskfirst.data.vocabulary import load

_PARTS = {"train": "training", "val": "validation"}


class ADE20K(Paired):
    """`images` and `annotations`, each with `training` (20,210) and `validation` (2,000); 0 is unlabelled."""

    def __init__(self, root: str = "data/ADEChallengeData2016", split: str = "train", limit: int | None = None) -> None:
        """`split`: train or val. `limit`: use so many pairs. Raises DataError."""
        part = choose(split, _PARTS, "ade20k")
        listing = match(Path(root), f"images/{part}", f"annotations/{part}", limit=limit)
        super().__init__(listing, Coding(load("ade20k"), shift=-1))
