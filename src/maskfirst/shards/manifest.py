"""Manifest: the parts of what is to be segmented, numbered for good, and a receipt for each that is done.

`manifest.json` says what is made by what, `shards/NUMBER.ENDING` is a part's segments, `receipts/NUMBER.json` that it is done.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from maskfirst.errors import UserError, listed
from maskfirst.files import write_json
from maskfirst.sources import Part

FORMAT = "maskfirst-shards-1"
FILE = "manifest.json"
Form = Literal["parquet", "coco"]
ENDINGS: dict[Form, str] = {"parquet": "parquet", "coco": "json"}


@dataclass(frozen=True)
class Planned:
    """A part with its number, from 0, by which its files are called, and what its pictures are told from others by."""

    number: int
    part: Part
    fingerprint: str

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Planned":
        return cls(told["number"], Part(**told["part"]), told["fingerprint"])


@dataclass(frozen=True)
class Receipt:
    """What was done of a part. `failed`: a key and an error for each picture that could not be read. `seconds`: it took."""

    number: int
    fingerprint: str
    pictures: int
    seconds: float
    failed: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """What makes the shards, which all of a folder have in common. `model`: the digest of its file."""

    model: str
    task: str
    form: Form
    size: int
    augment: bool


class Manifest:
    """The plan of a folder and what of it is done."""

    def __init__(self, out: Path, made: Made, planned: Sequence[Planned]) -> None:
        self.out, self.made, self.planned = out, made, tuple(planned)

    @classmethod
    def plan(cls, out: Path, made: Made, parts: Sequence[tuple[Part, str]]) -> "Manifest":
        """The plan of these parts, each with its fingerprint, after what an earlier plan in `out` has.

        Parts that were planned before keep their numbers, and those of sources that are not asked for now are kept, too.
        Raises UserError where `out` was begun with other settings, or where a source has fewer parts than it had.
        """
        before = _earlier(out, made)
        found = {(part.source, part.first): (part, fingerprint) for part, fingerprint in parts}
        if len(found) < len(parts):
            raise UserError("a source is named twice; name each once")
        sources = {part.source for part, _ in parts}
        planned = []
        for each in before:
            now = found.pop((each.part.source, each.part.first), None)
            if now is None and each.part.source in sources:
                raise UserError(f"{each.part.source}: has fewer pictures than when {out} was begun; give another --out")
            planned.append(each if now is None else Planned(each.number, *now))
        planned += [Planned(len(planned) + index, *each) for index, each in enumerate(found.values())]
        return cls(out, made, planned)

    def write(self) -> None:
        """Raises DiskError."""
        content = {"format": FORMAT, **asdict(self.made), "parts": [asdict(each) for each in self.planned]}
        write_json(self.out / FILE, content)


def shard_file(out: Path, form: Form, number: int) -> Path:
    """Where a part's segments are, or will be."""
    return out / "shards" / f"{number:06d}.{ENDINGS[form]}"


def receipt_of(out: Path, form: Form, planned: Planned) -> Receipt | None:
    """That a part is done; None where it is not, its receipt is damaged, or its pictures are others by now."""
    try:
        found = Receipt(**json.loads(_receipt_file(out, planned.number).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    done = found.fingerprint == planned.fingerprint and shard_file(out, form, planned.number).is_file()
    return found if done else None


def write_receipt(out: Path, receipt: Receipt) -> None:
    """Says that the shard, which is there, is whole. Raises DiskError."""
    write_json(_receipt_file(out, receipt.number), asdict(receipt))


def _receipt_file(out: Path, number: int) -> Path:
    return out / "receipts" / f"{number:06d}.json"


def _earlier(out: Path, made: Made) -> list[Planned]:
    """What a folder was begun with. Raises UserError where that is something else."""
    path = out / FILE
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError
        planned = [Planned.of(each) for each in content["parts"]]
        differing = [name for name, value in asdict(made).items() if content[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no manifest of ours, or damaged; give another --out") from error
    if differing:
        raise UserError(f"{path}: begun with another {listed(differing)}; give another --out, or the same settings")
    return planned
