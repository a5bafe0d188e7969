"""Objects365: two million pictures with boxes of 365 kinds of things, which are filled, for namers that learn from points.

Shao et al., "Objects365: A Large-scale, High-quality Dataset for Object Detection", ICCV 2019; numbers of version 2.
"""

from pathlib import Path

from maskfirst.data.coco import BoxFile, words_of
from maskfirst.data.folder import folder
from maskfirst.data.vocabulary import load
from maskfirst.formats import coco_boxes, dsdl
from maskfirst.formats.boxes import compact
from maskfirst.formats.coco import load as load_json


class Objects365(BoxFile):
    """From OpenDataLab's `*_samples.json`, or from a file in COCO's format such as `zhiyuan_objv2_train.json`."""

    def __init__(
        self,
        root: str = "data/objects365",
        split: str = "train",
        annotations: str = "dsdl_Det_full/set-{split}/{split}_samples.json",
        images: str = "",
        vocabulary: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """`annotations`: the file in `root`, of either form. `images`: the folder in `root` that its paths begin in. Pictures
        without a box are left out of samples files. `vocabulary`: None for the file's names, or the data set's own where the
        file has none; else as of COCOInstance. `limit`: use so many pictures. Raises DataError, FormatError or VocabularyError.
        """
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        path = place / annotations.replace("{split}", split)
        words = words_of(place, vocabulary)
        content = load_json(path, compact)
        if isinstance(content, dict) and "samples" in content:
            table = dsdl.from_content(content, path, words or load("objects365"))
        else:
            table = coco_boxes.from_content(content, path, words)
        super().__init__(table, inside, limit)
