"""YOLO: pictures with a text file each of polygons, one a line, as many annotation tools write them.

https://docs.ultralytics.com/datasets/segment/: `class x0 y0 x1 y1 ...`, in fractions of the picture's width and height.
"""

from collections import Counter
from pathlib import Path

import yaml

from maskfirst.data.annotated import Annotated, Layers, Picture
from maskfirst.data.coding import DataError
from maskfirst.data.folder import files, folder
from maskfirst.data.images import IMAGE_ENDINGS
from maskfirst.data.vocabulary import from_names, load
from maskfirst.formats import yolo
from maskfirst.frames import Size
from maskfirst.types import Vocabulary

_NAMES = ("data.yaml", "dataset.yaml")


class Yolo(Annotated):
    """Pictures in `images` and text files in `labels`, each class a thing. A picture without a text file shows nothing."""

    def __init__(
        self,
        root: str,
        images: str = "images/{split}",
        labels: str = "labels/{split}",
        split: str = "train",
        vocabulary: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        """`images`, `labels`: folders in `root`, searched with all folders inside, `{split}` being the split's name.

        `vocabulary`: a bundled name, a YAML or text file in `root`, a list of names, or None for the `names` in `data.yaml`,
        of which nothing else is read. `limit`: use so many pictures. Raises DataError or VocabularyError.
        """
        place = Path(root)
        inside = folder(place, images.replace("{split}", split))
        texts = folder(place, labels.replace("{split}", split))
        found = files(inside, IMAGE_ENDINGS)
        self.texts = {key: path for key, path in files(texts, (".txt",)).items() if key in found}
        if found and not self.texts:
            raise DataError(f"{texts}: none of the {len(found)} pictures of {inside} has a text file here")
        self.warnings: Counter[str] = Counter()
        words = _words(place, vocabulary)
        super().__init__(words, [Picture(key, path) for key, path in found.items()][:limit], inside)

    def segments(self, index: int, size: Size) -> Layers:
        text = self.texts.get(self.pictures[index].key)
        return Layers.none(size) if text is None else Layers.of(yolo.read(text, size, self.vocabulary.names))


def _words(root: Path, vocabulary: str | list[str] | None) -> Vocabulary:
    if vocabulary is not None:
        return load(vocabulary, root) if isinstance(vocabulary, str) else from_names(vocabulary)
    path = next((root / name for name in _NAMES if (root / name).is_file()), None)
    if path is None:
        raise DataError(f"{root}: no {' or '.join(_NAMES)} with `names` in this folder; add one, or set `vocabulary:`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(
                f"{path}: names: the numbers should be 0..{len(names) - 1}, got {', '.join(map(str, names))}"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{path}: `names` should be a list of names, or the names by their numbers; quote those like no"
        )
    return from_names(names, things=names)
