"""COCO: everyday scenes with 80 things and 53 stuff classes; and any other pictures with files in its two formats.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from maskfirst.data.annotated import Annotated, Layers, Picture, check_size
from maskfirst.data.coding import DataError
from maskfirst.data.folder import folder
from maskfirst.data.vocabulary import from_names, load
from maskfirst.formats import FormatError, coco_boxes
from maskfirst.formats.boxes import BoxTable
from maskfirst.formats.coco import Image, Key
from maskfirst.formats.coco_instances import CocoInstances
from maskfirst.formats.coco_panoptic import CocoPanoptic
from maskfirst.frames import Size
from maskfirst.types import Vocabulary


class InstanceFile(Annotated):
    """The pictures of a COCO instance file. Abstract but for the places."""

    def __init__(
        self, annotations: Path, images: Path, vocabulary: Vocabulary | None = None, limit: int | None = None
    ) -> None:
        """`images`: the folder of the pictures. `vocabulary`: by default the file's. `limit`: use so many pictures.

        Raises FormatError or DataError.
        """
        self.file = CocoInstances(annotations, vocabulary)
        self.warnings = self.file.warnings
        self._keys, pictures = _pictures(annotations, _names(self.file.images), images, limit)
        super().__init__(_familiar(self.file.vocabulary), pictures, annotations)

    def segments(self, index: int, size: Size) -> Layers:
        found = self.file.read(self._keys[index])
        check_size(self.pictures[index].path, size, found.size, self.file.path)
        return Layers.of(found)

    def shown(self, index: int) -> frozenset[int]:
        return self.file.shown(self._keys[index])


class PanopticFile(Annotated):
    """The pictures of a COCO panoptic file, whose segments do not overlap. Abstract but for the places."""

    def __init__(
        self,
        annotations: Path,
        images: Path,
        maps: Path | None = None,
        vocabulary: Vocabulary | None = None,
        limit: int | None = None,
    ) -> None:
        """`maps`: the folder of the PNGs, by default what the file is called without its ending. Else as InstanceFile."""
        self.file = CocoPanoptic(annotations, maps, vocabulary)
        self.warnings = self.file.warnings
        self._keys, pictures = _pictures(annotations, _names(self.file.images), images, limit)
        super().__init__(_familiar(self.file.vocabulary), pictures, annotations)

    def segments(self, index: int, size: Size) -> Layers:
        found = self.file.read(self._keys[index])
        check_size(self.pictures[index].path, size, (found.ids.shape[0], found.ids.shape[1]), self.file.path)
        return Layers(found.ids[None], found.classes, found.crowd)

    def shown(self, index: int) -> frozenset[int]:
        return self.file.shown(self._keys[index])


class BoxFile(Annotated):
    """The pictures of a file of boxes, which are filled, in place of masks. Abstract but for the places."""

    def __init__(self, file: BoxTable, images: Path, limit: int | None = None) -> None:
        """See InstanceFile."""
        self.file = file
        self.warnings = file.warnings
        self._keys, pictures = _pictures(file.path, file.names, images, limit)
        super().__init__(_familiar(file.vocabulary), pictures, file.path)

    def segments(self, index: int, size: Size) -> Layers:
        key = self._keys[index]
        check_size(self.pictures[index].path, size, self.file.sizes.get(key, size), self.file.path)
        return Layers.of_boxes(self.file.read(key, size), size)


class COCOInstance(InstanceFile):
    """COCO 2017 with its 80 things, crowds marked (118,287 and 5,000 pictures); or any instance file of this format."""

    def __init__(
        self,
        root: str = "data/coco",
        split: str = "train",
        annotations: str = "annotations/instances_{split}2017.json",
        images: str = "{split}2017",
        vocabulary: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """`annotations`, `images`: the file and the folder of pictures in `root`, `{split}` being the split's name.

        `vocabulary`: a bundled name, a YAML or text file in `root`, a list of names, or None for the file's categories. A
        category counts by its name, or by its number where the file does not contradict. `limit`: use so many pictures.
        Raises DataError, FormatError or VocabularyError.
        """
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        super().__init__(place / annotations.replace("{split}", split), inside, words_of(place, vocabulary), limit)


class COCOPanoptic(PanopticFile):
    """COCO 2017 with 80 things and 53 stuff classes, crowds marked; or any panoptic file of this format."""

    def __init__(
        self,
        root: str = "data/coco",
        split: str = "train",
        annotations: str = "annotations/panoptic_{split}2017.json",
        images: str = "{split}2017",
        maps: str | None = None,
        vocabulary: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """`maps`: the folder of the PNGs in `root`, by default what the file is called without its ending. See COCOInstance."""
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        painted = None if maps is None else folder(place, maps.replace("{split}", split))
        words = words_of(place, vocabulary)
        super().__init__(place / annotations.replace("{split}", split), inside, painted, words, limit)


class COCOBoxes(BoxFile):
    """The boxes of COCO 2017 or of any file of this format, filled, for namers that learn from points."""

    def __init__(
        self,
        root: str = "data/coco",
        split: str = "train",
        annotations: str = "annotations/instances_{split}2017.json",
        images: str = "{split}2017",
        vocabulary: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """See COCOInstance."""
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        words = words_of(place, vocabulary)
        super().__init__(coco_boxes.read(place / annotations.replace("{split}", split), words), inside, limit)


def words_of(root: Path, vocabulary: str | list[str] | None) -> Vocabulary | None:
    """What the key `vocabulary` of a data set says: a bundled name, a file in `root`, names, or nothing."""
    return load(vocabulary, root) if isinstance(vocabulary, str) else from_names(vocabulary) if vocabulary else None


def _familiar(words: Vocabulary) -> Vocabulary:
    """COCO's own vocabulary, which has colours that instance files do not tell, if these are its names and numbers."""
    for own in (load("coco_80"), load("coco_133")):
        if (words.names, words.ids, words.things) == (own.names, own.ids, own.things):
            return own
    return words


def _names(listed: Mapping[Key, Image]) -> dict[Key, str]:
    return {key: image.file_name for key, image in listed.items()}


def _pictures(
    annotations: Path, listed: Mapping[Key, str], images: Path, limit: int | None
) -> tuple[list[Key], list[Picture]]:
    """The first `limit` pictures of a file: what the file calls them, and their places in a folder."""
    if not listed:
        raise DataError(f"{annotations}: lists no `images`, so that there is nothing to learn from")
    keys = list(listed)[:limit]
    pictures: dict[str, Picture] = {}
    for key in keys:
        name = PurePosixPath(listed[key])
        if name.is_absolute() or ".." in name.parts:
            raise FormatError(f"{annotations}: file_name '{name}' leads out of the folder of pictures")
        stem = name.with_suffix("").as_posix()
        if stem in pictures:
            raise FormatError(
                f"{annotations}: two pictures are called '{stem}'; keys must differ in more than their endings"
            )
        pictures[stem] = Picture(stem, images / name)
    return keys, list(pictures.values())
