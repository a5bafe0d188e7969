"""Zero-shot splits of any data set: its labels of unseen classes ignored, or the pictures that have some left out.

He et al., "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation" (PADing), CVPR 2023.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch

from maskfirst.contracts import Dataset
from maskfirst.data.coding import DataError
from maskfirst.data.vocabulary import chosen
from maskfirst.errors import listed, nearest
from maskfirst.types import VOID, Sample, Vocabulary

_BUNDLED = resources.files("maskfirst.data") / "unseen"


def bundled() -> tuple[str, ...]:
    """The names of the lists of unseen classes in the package."""
    return tuple(sorted(entry.name.removesuffix(".txt") for entry in _BUNDLED.iterdir() if entry.name.endswith(".txt")))


def names_of(said: str | Sequence[str]) -> tuple[str, ...]:
    """The unseen names that a recipe or a command says: a list of them, a bundled list, or a text file with one a line.

    Raises DataError where there is no such list, or nothing in it.
    """
    if isinstance(said, str):
        file = _BUNDLED / f"{said}.txt" if said in bundled() else Path(said)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"unseen: '{said}' is no list of names and no text file of some; for one class say [{said}]."
                f"{nearest(said, bundled())} Bundled: {', '.join(bundled())}."
            ) from error
        said = [line.strip() for line in lines if line.strip()]
    if not said:
        raise DataError("unseen: no names; leave the key out where all classes are seen")
    return tuple(dict.fromkeys(said))


def unseen_of(said: str | Sequence[str], vocabulary: Vocabulary) -> frozenset[int]:
    """Which classes of a vocabulary are unseen. Raises DataError for names that it lacks, and where nothing is seen."""
    found = names_of(said)
    strange = [name for name in found if name not in vocabulary.names]
    if strange:
        raise DataError(f"unseen: no class '{strange[0]}'.{nearest(strange[0], vocabulary.names)}")
    if len(found) == len(vocabulary):
        raise DataError(f"unseen: all {len(vocabulary)} classes, so that nothing is left to learn from")
    return frozenset(vocabulary.names.index(name) for name in found)


class _Around(Dataset):
    """All of `data`, each sample changed. Abstract but for what passes through."""

    def __init__(self, data: Dataset, unseen: frozenset[int], vocabulary: Vocabulary) -> None:
        """`unseen`: classes of `data`. `vocabulary`: what the classes of changed samples are of."""
        self.data, self.unseen, self.vocabulary = data, unseen, vocabulary

    @abstractmethod
    def change(self, sample: Sample) -> Sample: ...

    def __len__(self) -> int:
        return len(self.data)

    def keys(self) -> Sequence[str]:
        return self.data.keys()

    def __getitem__(self, index: int) -> Sample:
        return self.change(self.data[index])


class Withheld(_Around):
    """All pictures, without the labels of unseen classes: their pixels have no class. The names stay."""

    def __init__(self, data: Dataset, unseen: str | list[str]) -> None:
        """`unseen`: names, a bundled list or a text file, see `names_of`; by default the recipe's. Raises DataError."""
        super().__init__(data, unseen_of(unseen, data.vocabulary), data.vocabulary)

    def shown(self, index: int) -> frozenset[int]:
        return self.data.shown(index) - self.unseen

    def change(self, sample: Sample) -> Sample:
        hidden = torch.isin(sample.classes, torch.tensor(sorted(self.unseen)))
        return sample[~hidden] if hidden.any() else sample


class SeenNames(_Around):
    """Data whose vocabulary has the seen classes alone, in its order; labels of others are refused."""

    def __init__(self, data: Dataset, unseen: str | list[str]) -> None:
        """See Withheld, which goes inside where unseen classes have labels."""
        hidden = unseen_of(unseen, data.vocabulary)
        kept = [index for index in range(len(data.vocabulary)) if index not in hidden]
        super().__init__(data, hidden, chosen(data.vocabulary, kept))
        self._places = torch.full((len(data.vocabulary),), VOID)
        self._places[kept] = torch.arange(len(kept))

    def shown(self, index: int) -> frozenset[int]:
        return frozenset(self._places[sorted(self.data.shown(index))].tolist()) - {VOID}

    def change(self, sample: Sample) -> Sample:
        sample = _refused(sample, self.unseen, self.data.vocabulary)
        return replace(sample, classes=self._places[sample.classes])


class Refusing(_Around):
    """Training data that is trusted to have no label of an unseen class, and found out where it has one."""

    def __init__(self, data: Dataset, unseen: frozenset[int]) -> None:
        """`unseen`: indices of classes."""
        super().__init__(data, unseen, data.vocabulary)

    def shown(self, index: int) -> frozenset[int]:
        return self.data.shown(index)

    def change(self, sample: Sample) -> Sample:
        return _refused(sample, self.unseen, self.vocabulary)


class _Some(Dataset):
    """Some pictures of `data`, chosen by what they show when it is first used. Abstract but for the choice."""

    def __init__(self, data: Dataset, unseen: str | list[str]) -> None:
        """See Withheld."""
        self.data, self.vocabulary = data, data.vocabulary
        self.unseen = unseen_of(unseen, data.vocabulary)

    @abstractmethod
    def wanted(self, shown: frozenset[int]) -> bool:
        """Whether a picture that shows these classes is one of them."""

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """Places of the pictures in `data`. Raises DataError where there are none."""
        kept = tuple(index for index in range(len(self.data)) if self.wanted(self.data.shown(index)))
        if not kept:
            names = listed(repr(self.vocabulary.names[index]) for index in sorted(self.unseen))
            raise DataError(f"unseen ({names}): this leaves none of {len(self.data)} pictures; the split is empty")
        return kept

    def __len__(self) -> int:
        return len(self.kept)

    def keys(self) -> Sequence[str]:
        keys = self.data.keys()
        return [keys[index] for index in self.kept]

    def shown(self, index: int) -> frozenset[int]:
        return self.data.shown(self.kept[index])

    def __getitem__(self, index: int) -> Sample:
        return self.data[self.kept[index]]


class WithoutUnseen(_Some):
    """The pictures that show no unseen class; those that show nothing stay, too. The names stay."""

    def wanted(self, shown: frozenset[int]) -> bool:
        return not shown & self.unseen


class WithUnseen(_Some):
    """The pictures that show an unseen class, with all of their labels."""

    def wanted(self, shown: frozenset[int]) -> bool:
        return bool(shown & self.unseen)


def _refused(sample: Sample, classes: frozenset[int], vocabulary: Vocabulary) -> Sample:
    """The sample, if it has no segment of these classes. Raises DataError."""
    found = classes & set(sample.classes.tolist())
    if found:
        names = listed(f"'{vocabulary.names[index]}'" for index in sorted(found))
        raise DataError(
            f"{sample.key}: has labels of {names}, which should be unseen in training; wrap the data in kind `withheld` "
            "to ignore them, or in `without_unseen` to leave such pictures out"
        )
    return sample
