"""COCO's files of annotations, of which the boxes alone are read: those for detection have no masks at all.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014; https://cocodataset.org/#format-data
"""

from pathlib import Path
from typing import Any

from maskfirst.formats import FormatError
from maskfirst.formats.boxes import Boxes, BoxTable, Row, compact
from maskfirst.formats.coco import Key, categories, class_of, images, load, rows
from maskfirst.types import Vocabulary


class CocoBoxes:
    """A file read once. `vocabulary`: the names, by default the file's own. `images`: its pictures, with and without boxes."""

    def __init__(self, path: Path | str, vocabulary: Vocabulary | None = None, content: Any = None) -> None:
        """With `vocabulary`, classes are its indices, found as `coco.categories` says. `content`: what `compact` left of
        the file, where it has been read already. Raises FormatError.
        """
        content = load(path, compact) if content is None else content
        self.path = Path(path)
        self.vocabulary, index = categories(content, path, vocabulary)
        self.images = images(content, path)
        self._boxes = BoxTable(self.images)
        self.warnings = self._boxes.warnings
        for position, row in enumerate(rows(content, "annotations", path)):
            where = f"{path}: annotations[{position}]"
            if not isinstance(row, Row):
                raise FormatError(f"{where}: should be an object with `image_id`, `category_id` and `bbox`")
            if type(row.picture) not in (int, str) or row.picture not in self.images:
                raise FormatError(f"{where}: image_id {row.picture!r} is none of the {len(self.images)} pictures")
            self._boxes.add(row.picture, row, class_of(row.category, index, where), where)

    def read(self, key: Key) -> Boxes:
        """The boxes of a picture. Raises KeyError."""
        picture = self.images[key]
        return self._boxes.read(key, (picture.height, picture.width))
