"""Points in a table: pictures of which single places have been named, one a line, as clicks or field notes give them."""

from collections import Counter
from pathlib import Path

import torch

from maskfirst.data.annotated import Annotated, Layers, Picture
from maskfirst.data.coding import DataError
from maskfirst.data.folder import folder
from maskfirst.data.vocabulary import from_names, load, of_folder
from maskfirst.errors import nearest
from maskfirst.formats import FormatError
from maskfirst.formats import points as tables
from maskfirst.formats.boxes import Boxes
from maskfirst.frames import Size


class PointsCSV(Annotated):
    """Pictures with points, each a square of one class; all else has none."""

    def __init__(
        self,
        root: str,
        points: str = "points_{split}.csv",
        images: str = "images/{split}",
        split: str = "train",
        vocabulary: str | list[str] | None = None,
        radius: int = 0,
        limit: int | None = None,
    ) -> None:
        """`points`: a CSV file in `root`, whose first line names the columns image, y, x and class: a path in the folder
        `images`, a place in px, (0, 0) being the centre of the first pixel, rounded, and a name. `radius`: px around a point
        that count as it. `vocabulary`: as of Folder. `limit`: use so many pictures. Raises DataError or VocabularyError.
        """
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        if radius < 0:
            raise DataError(f"radius: {radius} must not be negative, as px around a point")
        if vocabulary is None:
            words = of_folder(place)
        else:
            words = load(vocabulary, place) if isinstance(vocabulary, str) else from_names(vocabulary)
        self.file, self.radius = place / points.replace("{split}", split), radius
        try:
            found = tables.read(self.file, named=True)
        except FormatError as error:
            raise DataError(str(error)) from error
        for point in (point for each in found.values() for point in each):
            if point.name not in words.names:
                where = f"{self.file}: line {point.line}"
                raise DataError(f"{where}: unknown class '{point.name}'.{nearest(point.name, words.names)}")
        self._points = list(found.values())
        self.warnings: Counter[str] = Counter()
        pictures = [Picture(name.with_suffix("").as_posix(), inside / name) for name in found][:limit]
        super().__init__(words, pictures, self.file)

    def segments(self, index: int, size: Size) -> Layers:
        corners, classes = [], []
        for line, y, x, name in self._points[index]:
            row, column = round(y), round(x)
            if not (0 <= row < size[0] and 0 <= column < size[1]):
                raise DataError(
                    f"{self.file}: line {line}: y {y:g}, x {x:g} lies outside of {self.pictures[index].path.name}, which has "
                    f"{size[0]} rows and {size[1]} columns"
                )
            top, left = max(row - self.radius, 0), max(column - self.radius, 0)
            corners.append([left, top, min(column + self.radius + 1, size[1]), min(row + self.radius + 1, size[0])])
            classes.append(self.vocabulary.names.index(name))
        found = Boxes(torch.tensor(corners), torch.tensor(classes), torch.zeros(len(classes), dtype=torch.bool))
        return Layers.of_boxes(found, size)
