"""Score: predictions that lie in files against truth that lies in files, counted as the reference evaluators count."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from maskfirst.ahead import ahead
from maskfirst.data.cityscapes import instance_ids
from maskfirst.data.images import read_label_map
from maskfirst.data.vocabulary import from_names, load
from maskfirst.errors import UserError, nearest
from maskfirst.evaluate import Evaluation, measure_of
from maskfirst.formats import rle
from maskfirst.formats.coco import Key
from maskfirst.formats.coco_instances import CocoInstances, Results
from maskfirst.formats.coco_panoptic import CocoPanoptic
from maskfirst.formats.instances import Instances
from maskfirst.frames import Size
from maskfirst.metrics.seen import Split
from maskfirst.tasks import check_known
from maskfirst.types import VOID, SegmentMap, Vocabulary

Values = Literal["index", "ids"]
"""What a label map holds: indices of classes, or the vocabulary's own numbers for them."""
Seen = Tensor | SegmentMap | Instances
"""A picture's truth, or what was predicted for it."""

LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif")
FRAME = re.compile(r"[^_/]+_\d{6}_\d{6}")
"""What Cityscapes calls a picture: city, sequence, frame."""
STREETS = re.compile(r"_gt(?:Fine|Coarse)_(labelIds|labelTrainIds|instanceIds)$")
STREET_LABELS = 34
"""Cityscapes' label ids are 0.., most of them scored as no class."""
LARGEST = 65535
"""The most that 16 bits hold; void in label maps of more than 254 classes."""
LOOK = 50
"""Label maps that are looked into to tell what their values mean."""
MISSING = "pictures without a prediction: all that is in them counts as missed"


class ScoreError(UserError):
    """Truth and predictions that cannot be compared."""


@dataclass(frozen=True)
class Score:
    """What came out; and, a sentence each, what was odd on the way but can be counted in one way only."""

    found: Evaluation
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As `Evaluation.as_json`, with `warnings`."""
        return {**self.found.as_json(), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Side:
    """The truth, or the predictions, in `place`: `pictures` by what it calls them, with their names, without endings.

    `read` gives what is known of one, None where that is nothing. `warnings` counts what is odd, as pictures are read.
    """

    place: Path
    pictures: Mapping[Any, str]
    read: Callable[[Any], Seen | None]
    warnings: Counter[str]


def score(
    truth: Path | str,
    prediction: Path | str,
    task: str,
    vocabulary: Vocabulary | None = None,
    *,
    ignore: int | None = None,
    truth_values: Values | None = None,
    prediction_values: Values | None = None,
    boundary: bool = False,
    split: Split | None = None,
    worst: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Compares the predictions in `prediction` with the truth in `truth`.

    Semantic: folders of label maps. Panoptic: files in COCO's panoptic format. Instance: COCO's file of truth, and a list of
    results, a file of the truth's form or a folder in Cityscapes' format of results. In place of a truth: Cityscapes'
    `gtFine`, or a folder in it. `vocabulary`: by default that of the truth's file; without any, the classes of label maps are
    numbered. `ignore`: the value of pixels without a class in label maps; 255 by default, but 65535 with more than 254
    classes. `truth_values` and `prediction_values`: see Values; by default what the values, or Cityscapes' names, show.
    `boundary`: by boundary IoU, too. `split`: for seen and unseen classes, see `measure_of`.

    Pictures are paired by name, or by number where COCO's files have no names. One without a prediction counts as one in
    which nothing was found, and is warned of; predictions for other pictures are an error. `progress` is told (done, all).
    Raises UserError.
    """
    start = time.perf_counter()
    check_known(task)
    truth, prediction = (_there(Path(path)) for path in (truth, prediction))
    if task == "semantic":
        vocabulary, known, guessed = _label_maps(truth, prediction, vocabulary, ignore, truth_values, prediction_values)
    elif task == "panoptic":
        vocabulary, known, guessed = _panoptic(truth, prediction, vocabulary)
    else:
        vocabulary, known, guessed = _instances(truth, prediction, vocabulary)
    metric = measure_of(task, vocabulary, boundary, split).metric(vocabulary)
    partner, keys = _paired(known, guessed), list(known.pictures)

    def read(key: Key | Path) -> tuple[Seen, Seen]:
        seen = known.read(key)
        assert seen is not None
        guess = guessed.read(partner[key]) if key in partner else None
        if guess is None:
            known.warnings[MISSING] += not (isinstance(seen, Instances) and len(seen) == 0)
            return seen, _nothing(seen)
        if _size(guess) != _size(seen):
            raise ScoreError(
                f"{guessed.place}: {guessed.pictures[partner[key]]}: {_size(guess)} px (height, width), "
                f"the truth has {_size(seen)}; predictions must have the size of the truth"
            )
        return seen, guess

    least: list[tuple[float, int]] = []
    # One thread, as the readers count what they warn of.
    for index, (_, reading) in enumerate(ahead(read, keys, 1)):
        own = metric.update(*reading.result(), index)
        if own is not None:
            least = sorted([*least, (own, index)])[:worst]
        if progress is not None:
            progress(index + 1, len(keys))
    names = list(known.pictures.values())
    found = Evaluation(
        metric.scores(), [(names[index], own) for own, index in least], [], len(keys), time.perf_counter() - start
    )
    told = known.warnings + guessed.warnings
    return Score(found, tuple(f"{count} {what}" for what, count in told.items()))


def _label_maps(
    truth: Path,
    prediction: Path,
    vocabulary: Vocabulary | None,
    ignore: int | None,
    truth_values: Values | None,
    prediction_values: Values | None,
) -> tuple[Vocabulary, Side, Side]:
    known, kind = _truth_files(truth, ("labelIds", "labelTrainIds"))
    guessed = _files(prediction, LOSSLESS)
    if kind is not None:
        vocabulary = vocabulary or load("cityscapes")
        truth_values = truth_values or ("ids" if kind == "labelIds" else "index")
    if vocabulary is None:
        largest = max(_largest(file, {255 if ignore is None else ignore, LARGEST}) for file in (*known, *guessed))
        vocabulary = from_names([str(number) for number in range(largest + 1)])
    words = vocabulary
    if ignore is None:
        ignore = LARGEST if 255 in (*words.ids, *range(len(words))) else 255
    # Numbers that a data set has for what is no class: all the other labels of Cityscapes, or those before the first class.
    spare = frozenset(range(STREET_LABELS if kind == "labelIds" else min(words.ids)))
    code = _Code(words, ignore, spare)
    return (
        words,
        code.side("truth", truth, known, truth_values or code.shown(list(known), spare)),
        # A prediction of no class would be odd: there 0 is the class of that index.
        code.side(
            "prediction", prediction, guessed, prediction_values or code.shown(list(guessed)[:LOOK], frozenset())
        ),
    )


@dataclass(frozen=True)
class _Code:
    """What the numbers in label maps mean. `ignore`: no class. `spare`: ids that are known to be no class's."""

    vocabulary: Vocabulary
    ignore: int
    spare: frozenset[int]

    def shown(self, files: Sequence[Path], spare: frozenset[int]) -> Values | None:
        """Whether the numbers are indices or ids, by the first map that can only be one of both; None where none says it."""
        K, ids = len(self.vocabulary), set(self.vocabulary.ids)
        if self.vocabulary.ids == tuple(range(K)):
            return "index"
        for file in files:
            held = {int(number) for number in np.unique(read_label_map(file))}
            if any(number >= K for number in held & ids - {self.ignore}):
                return "ids"
            # Maps of ids have a number of their own for what is no class, those of indices `ignore`.
            if any(number < K for number in held - ids - spare) or self.ignore in held - ids:
                return "index"
        return None

    def side(self, which: str, place: Path, files: Mapping[Path, str], values: Values | None) -> Side:
        """Label maps, read as classes by index, VOID for none; of values None, as indices, with a warning."""
        warnings: Counter[str] = Counter()
        if values is None:
            warnings[
                f"label maps ({which}) that could hold indices of classes as well as the vocabulary's ids: taken as indices; "
                f"--{which}-values says which"
            ] = len(files)
        unknown = VOID - 1
        table = np.full(LARGEST + 1, unknown, np.int32)
        if values == "ids":
            table[list(self.spare)] = VOID
        if which == "prediction":
            table[255] = VOID  # as `predict` writes it, whatever the truth has
        for index, number in enumerate(self.vocabulary.ids if values == "ids" else range(len(self.vocabulary))):
            if 0 <= number <= LARGEST:
                table[number] = index
        table[[self.ignore, LARGEST]] = VOID

        def read(file: Path) -> Int32[Tensor, "H W"]:
            held = read_label_map(file)
            labels = table[held]
            strange = labels == unknown
            if strange.any():
                if values != "ids":
                    y, x = (int(place) for place in np.argwhere(strange)[0])
                    raise ScoreError(
                        f"{file}: value {held[y, x]} at (y {y}, x {x}) is none of the classes "
                        f"0..{len(self.vocabulary) - 1}; name it with --ignore if it is void, or say --{which}-values ids "
                        "if these are the vocabulary's ids"
                    )
                for number, count in zip(*np.unique(held[strange], return_counts=True), strict=True):
                    told = f"pixels ({which}) that hold {number}, which is the id of no class: taken as void"
                    warnings[told] += int(count)
                labels[strange] = VOID
            return torch.from_numpy(labels)

        return Side(place, files, read, warnings)


def _largest(file: Path, void: set[int]) -> int:
    """The largest class of a label map, 0 where it has none."""
    held = read_label_map(file)
    return max((int(number) for number in np.unique(held) if number not in void), default=0)


def _panoptic(truth: Path, prediction: Path, vocabulary: Vocabulary | None) -> tuple[Vocabulary, Side, Side]:
    if truth.is_dir():
        words = vocabulary or load("cityscapes")
        known = _streets(truth, words, lambda found: found)
    else:
        told = CocoPanoptic(_json(truth), vocabulary=vocabulary)
        words, known = told.vocabulary, _panoptic_side(told)
    return words, known, _panoptic_side(CocoPanoptic(_json(prediction), vocabulary=words))


def _panoptic_side(file: CocoPanoptic) -> Side:
    keys = file.keys()
    pictures = {key: _name(file.images[key].file_name) if key in file.images else str(key) for key in keys}
    return Side(file.path, pictures, file.read, file.warnings)


def _instances(truth: Path, prediction: Path, vocabulary: Vocabulary | None) -> tuple[Vocabulary, Side, Side]:
    if vocabulary is not None and not vocabulary.things:
        # What a file of instances holds are things, whether a plain list of names says so or not.
        vocabulary = replace(vocabulary, things=frozenset(range(len(vocabulary))))
    if truth.is_dir():
        words = vocabulary or load("cityscapes_things")
        known = _streets(truth, words, lambda found: Instances.of(found.segments))
        if prediction.is_dir():
            return words, known, _street_results(prediction, words)
        if _is_list(prediction):
            raise ScoreError(
                f"{prediction}: a bare list of results, which numbers pictures by a COCO file of truth, and {truth} is a "
                "folder; give a file that lists its `images`, too, or that file of truth"
            )
        return words, known, _instances_side(CocoInstances(prediction, words, scored=True))
    told = CocoInstances(_json(truth), vocabulary)
    known = _instances_side(told)
    if not _is_list(_json(prediction)):
        return told.vocabulary, known, _instances_side(CocoInstances(prediction, told.vocabulary, scored=True))
    results = Results(prediction, told)
    return told.vocabulary, known, Side(prediction, known.pictures, lambda key: results[key] or None, results.warnings)


def _instances_side(file: CocoInstances) -> Side:
    return Side(
        file.path, {key: _name(image.file_name) for key, image in file.images.items()}, file.read, file.warnings
    )


def _name(file: str) -> str:
    return PurePosixPath(file).with_suffix("").as_posix()


def _is_list(path: Path) -> bool:
    """Whether a JSON file is a list, as COCO's results are."""
    with open(path, "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _streets(folder: Path, vocabulary: Vocabulary, form: Callable[[SegmentMap], Seen]) -> Side:
    """Cityscapes' truth, from its maps of instances."""
    files, kind = _truth_files(folder, ("instanceIds",))
    if kind is None:
        raise ScoreError(
            f"{folder}: no *_gtFine_instanceIds.png here; give Cityscapes' gtFine, or a JSON file of COCO's"
        )
    code = instance_ids(vocabulary)

    def read(file: Path) -> Seen:
        found = code.decode(read_label_map(file), file)
        classes = torch.from_numpy(found.classes)
        return form(
            SegmentMap(torch.from_numpy(found.ids), classes, torch.ones(len(classes)), torch.from_numpy(found.crowd))
        )

    return Side(folder, files, read, Counter())


def _street_results(folder: Path, vocabulary: Vocabulary) -> Side:
    """Cityscapes' format of instances: a text file a picture, each line the PNG of a mask, a label id and a score."""
    classes = {number: index for index, number in enumerate(vocabulary.ids)}

    def read(file: Path) -> Instances | None:
        masks, found, scores = [], [], []
        size: Size | None = None
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            place, words = f"{file}: line {number}", line.split()
            if not words:
                continue
            try:
                name, label, confidence = words[0], int(words[1]), float(words[2])
            except (IndexError, ValueError):
                raise ScoreError(
                    f"{place}: should be the path of a mask, a label id and a score, got {line!r}"
                ) from None
            if PurePosixPath(name).is_absolute() or not (file.parent / name).resolve().is_relative_to(folder.resolve()):
                raise ScoreError(f"{place}: {name} leads out of {folder}")
            if label not in classes or not math.isfinite(confidence):
                known = ", ".join(map(str, classes))
                raise ScoreError(f"{place}: label {label} with score {confidence}; labels are {known}")
            mask = torch.from_numpy(read_label_map(file.parent / name) != 0)
            size = size or (mask.shape[0], mask.shape[1])
            if mask.shape != size:
                raise ScoreError(
                    f"{place}: {name} has {list(mask.shape)} px (height, width), the mask before {list(size)}"
                )
            masks += rle.encode(mask[None])
            found.append(classes[label])
            scores.append(confidence)
        if size is None:
            return None
        values = torch.tensor(scores, dtype=torch.float64)
        return Instances(masks, torch.tensor(found), values, torch.zeros(len(found), dtype=torch.bool), size)

    return Side(folder, _files(folder, (".txt",)), read, Counter())


def _there(path: Path) -> Path:
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ScoreError(f"{path}: no such file or folder.{nearest(path.name, beside)}")
    return path


def _json(path: Path) -> Path:
    """A file, as COCO's formats have it."""
    if path.is_dir():
        near = [file for file in (path.with_name(f"{path.name}.json"), *sorted(path.glob("*.json"))) if file.is_file()]
        meant = f" Did you mean '{near[0]}'?" if near else ""
        raise ScoreError(f"{path}: a folder, where a JSON file in COCO's format is wanted.{meant}")
    return path


def _truth_files(truth: Path, kinds: Sequence[str]) -> tuple[dict[Path, str], str | None]:
    """The label maps of a truth; in Cityscapes' layout those of the first of `kinds` that is there, and which it is."""
    files = _files(truth, LOSSLESS)
    by_kind = {kind: {} for kind in kinds}
    for file, name in files.items():
        found = STREETS.search(name)
        if found is not None and found[1] in by_kind:
            by_kind[found[1]][file] = name
    kind = next((kind for kind in kinds if by_kind[kind]), None)
    return (files, None) if kind is None else (by_kind[kind], kind)


def _files(place: Path, endings: Sequence[str]) -> dict[Path, str]:
    """The files with these endings in a folder and those below, by name; or the one that `place` is."""
    if place.is_file():
        return {place: place.stem}
    found = [
        file for file in sorted(place.rglob("*")) if file.suffix.lower() in endings and not file.name.startswith(".")
    ]
    if not found:
        raise ScoreError(f"{place}: nothing here that ends in {', '.join(endings)}")
    return {file: _name(file.relative_to(place).as_posix()) for file in found}


def _paired(truth: Side, prediction: Side) -> dict[Any, Any]:
    """The prediction of every picture of the truth that has one. Raises ScoreError where others have, or none."""
    partner: dict[Any, Any] = {}
    for name_of in _namings(truth):
        ours = {name_of(name): key for key, name in truth.pictures.items()}
        theirs: dict[str, Any] = {}
        for key, name in prediction.pictures.items():
            other = theirs.setdefault(name_of(name), key)
            if other != key and name_of(name) in ours:
                raise ScoreError(
                    f"{prediction.place}: {prediction.pictures[other]} and {name} are both of {name_of(name)}; "
                    "leave one of them"
                )
        partner = {ours[name]: key for name, key in theirs.items() if name in ours}
        if partner and len(ours) == len(truth.pictures):
            break
    else:
        partner = {key: key for key in truth.pictures if key in prediction.pictures}
    strangers = [name for key, name in prediction.pictures.items() if key not in set(partner.values())]
    if strangers:
        wanted = next(iter(truth.pictures.values()), "none")
        raise ScoreError(
            f"{prediction.place}: {len(strangers)} of {len(prediction.pictures)} predictions are of pictures that "
            f"{truth.place} does not have ({', '.join(strangers[:3])}{', ...' if len(strangers) > 3 else ''}); "
            f"it has {wanted}, ...: score the pictures that were predicted, or leave these out"
        )
    return partner


def _namings(truth: Side) -> list[Callable[[str], str]]:
    """Ways to tell by its name which picture a file is of, the strictest first."""

    def frame(name: str) -> str:
        found = FRAME.search(PurePosixPath(name).name)
        return name if found is None else found[0]

    if truth.pictures and all(FRAME.search(PurePosixPath(name).name) for name in truth.pictures.values()):
        return [frame]
    return [lambda name: name, lambda name: PurePosixPath(name).name]


def _size(seen: Seen) -> Size:
    if isinstance(seen, Instances):
        return seen.size
    height, width = (seen.ids if isinstance(seen, SegmentMap) else seen).shape
    return height, width


def _nothing(seen: Seen) -> Seen:
    """A prediction in which nothing was found."""
    none = torch.zeros(0)
    if isinstance(seen, Instances):
        return Instances([], none.long(), none, none.bool(), seen.size)
    if isinstance(seen, SegmentMap):
        return SegmentMap(torch.full_like(seen.ids, VOID), none.long(), none, none.bool())
    return torch.full_like(seen, VOID)
