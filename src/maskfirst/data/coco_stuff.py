"""COCO-Stuff: 80 things and 91 stuff classes on COCO pictures, in its releases of 10 and of 164 thousand.

Caesar et al., "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018.
"""

from pathlib import Path
from typing import Literal

from maskfirst.data.coding import Coding, DataError
from maskfirst.data.folder import Paired, choose, match, opened
from maskfirst.data.vocabulary import chosen, load
from maskfirst.errors import listed

_PARTS_10K = {"train": "train2014", "val": "test2014", "test": "test2014"}
_PARTS_164K = {"train": "train2017", "val": "val2017"}
_TRAIN_IDS = "_labelTrainIds.png"
WORDS = "coco_stuff_171"
"""The vocabulary, in the data set's own order."""


class COCOStuff10K(Paired):
    """`images` and `annotations`, each with `train2014` (9,000) and `test2014` (1,000).

    Label maps end in `_labelTrainIds.png`; 0 is unlabelled, 1..171 are the classes. Val and test are the same pictures.
    """

    def __init__(
        self,
        root: str = "data/coco_stuff10k",
        split: str = "train",
        instances: Literal["components"] | None = None,
        smallest: int = 1,
        limit: int | None = None,
    ) -> None:
        """`split`: train, val or test. `instances`, `smallest`: see Folder. `limit`: use so many pairs. Raises DataError."""
        part = choose(split, _PARTS_10K, "coco_stuff_10k")
        listing = match(Path(root), f"images/{part}", f"annotations/{part}", _TRAIN_IDS, limit)
        words = load(WORDS)
        super().__init__(listing, Coding(words, shift=-1), opened(words, instances, smallest))


class COCOStuff164K(Paired):
    """Pictures in `train2017` (118,287) and `val2017` (5,000), or in these folders of `images`.

    Label maps lie in the same folders of `stuffthingmaps`, as released, or of `annotations`. Those as released hold the
    category less one, 255 being unlabelled; those that end in `_labelTrainIds.png`, which are taken where there are some,
    hold the class.
    """

    def __init__(
        self,
        root: str = "data/coco",
        split: str = "train",
        vocabulary: str | list[str] = WORDS,
        instances: Literal["components"] | None = None,
        smallest: int = 1,
        limit: int | None = None,
    ) -> None:
        """`split`: train or val. `vocabulary`: the 171 names in another order. `instances`, `smallest`: see Folder. `limit`:
        use so many pairs. Raises DataError.
        """
        part, place = choose(split, _PARTS_164K, "coco_stuff_164k"), Path(root)
        images = f"images/{part}" if (place / "images" / part).is_dir() else part
        labels = f"{'annotations' if (place / 'annotations' / part).is_dir() else 'stuffthingmaps'}/{part}"
        prepared = next((place / labels).glob(f"*{_TRAIN_IDS}"), None) is not None
        listing = match(place, images, labels, _TRAIN_IDS if prepared else ".png", limit)
        own = load(WORDS)
        names = load(vocabulary).names if isinstance(vocabulary, str) else vocabulary
        strange = sorted({*own.names} ^ {*names})
        if strange:
            raise DataError(
                f"coco_stuff_164k: vocabulary: it should have the names of {WORDS}, in any order, and differs by "
                f"{listed(map(repr, strange), 3)}; `seen_names` around the data takes out unseen ones"
            )
        words = chosen(own, [own.names.index(name) for name in names])
        numbers = range(len(own)) if prepared else [category - 1 for category in own.ids]
        coding = Coding(words, ids=dict(zip(numbers, own.names, strict=True)))
        super().__init__(listing, coding, opened(words, instances, smallest))
