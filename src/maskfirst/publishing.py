"""Publishing: a model as a folder that others load, on disk or on a hub: its weights, and a card that says what they are.

Mitchell et al., "Model Cards for Model Reporting", FAT* 2019.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from maskfirst import weights
from maskfirst.errors import UserError
from maskfirst.files import write_aside
from maskfirst.segmenter import Segmenter
from maskfirst.types import Vocabulary
from maskfirst.weights import HUB_FILE, WeightsFile

CARD = "README.md"
"""What the hub shows of a folder."""
MOST_NAMES = 200
"""Of a vocabulary that are told; the file has them all."""


def publish(
    source: Path | str,
    destination: Path | str,
    model: Segmenter | None = None,
    half: bool = False,
    licence: str | None = None,
) -> Path | str:
    """Writes the model at `source`, see `weights.locate`, into a folder or to `hub:org/name`; returns where it is now.

    `model`: of the same recipe, whose numbers are written in place of the source's, such as one that was trained further by
    hand; scores, which were not its own, are left out then. `half`: numbers of 16 bits. `licence`: its identifier, for the
    card. Raises UserError where the source is no model, or the hub refuses, and DiskError.
    """
    file = weights.read(source)
    text = str(destination)
    if not text.startswith("hub:"):
        _write(file, Path(destination), text, model, half, licence)
        return Path(destination)
    with tempfile.TemporaryDirectory() as folder:
        _write(file, Path(folder), text, model, half, licence)
        return _upload(Path(folder), text.removeprefix("hub:"))


def card(file: WeightsFile, address: str, scores: Mapping[str, Any], licence: str | None = None) -> str:
    """What people read of a model that is loaded from `address`, in Markdown with the metadata that hubs look for."""
    tree = file.recipe.tree
    head = {"library_name": "maskfirst", "pipeline_tag": "image-segmentation", "tags": _kinds(tree)}
    if licence is not None:
        head["license"] = licence
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {address.removeprefix('hub:')}",
        f"A model of image segmentation: proposer `{tree['proposer']['kind']}`, namer `{tree['namer']['kind']}`, for the "
        f"{tree.get('task', 'semantic')} task, {len(file.vocabulary)} names."
        + (f" Its weights come from {file.source}." if file.source else ""),
        _use(address),
        _scores(scores),
        _names(file.vocabulary),
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) + "```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _write(
    file: WeightsFile, folder: Path, address: str, model: Segmenter | None, half: bool, licence: str | None
) -> None:
    if model is not None:
        weights.check_fit(model, file)
    scores = file.scores if model is None else {}
    weights.save(folder / HUB_FILE, model or file.tensors, file.recipe.tree, file.vocabulary, scores, half, file.source)
    with write_aside(folder / CARD) as aside:
        aside.write_text(card(file, address, scores, licence), encoding="utf-8")


def _upload(folder: Path, repository: str) -> str:
    """Returns the address of the page."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish with maskfirst")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"hub:{repository}: cannot be written: {reason}; 'hf auth login' asks for a key") from error
    return f"hub:{repository}"


def _kinds(tree: Mapping[str, Any]) -> list[str]:
    task = tree.get("task", "semantic")
    return [f"{task}-segmentation", *dict.fromkeys((tree["proposer"]["kind"], tree["namer"]["kind"]))]


def _use(address: str) -> str:
    return f"""## Use

```bash
pip install maskfirst
maskfirst predict {address} PICTURES --out pictures
```

```python
import maskfirst

found = maskfirst.load("{address}").predict("street.jpg")
```"""


def _scores(scores: Mapping[str, Any]) -> str:
    """The means as one table, and those of each class as another."""
    means = {name: value for name, value in scores.items() if isinstance(value, float) and name != "seconds"}
    for group in ("seen", "unseen", "harmonic"):
        inner = scores.get(group, {})
        means |= {f"{name}, {group}": value for name, value in inner.items() if isinstance(value, float)}
    if not means:
        return ""
    count = f", on {scores['images']} pictures for validation or testing" if "images" in scores else ""
    told = [f"## Measured scores\n\nIn percent{count}.", _table(("score", "%"), means)]
    classes = {name: value for name, value in scores.items() if isinstance(value, dict) and name in ("IoU", "PQ", "AP")}
    told += [_table(("class", name), values) for name, values in classes.items()]
    return "\n\n".join(told)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---:|"]
    return "\n".join(
        lines
        + [
            f"| {name.replace('|', chr(92) + '|')} | {'–' if value is None or value != value else f'{100 * value:.1f}'} |"
            for name, value in rows.items()
            if value is None or isinstance(value, float)
        ]
    )


def _names(words: Vocabulary) -> str:
    told = [f"{name}{' (thing)' if index in words.things else ''}" for index, name in enumerate(words.names)]
    more = f" and {len(told) - MOST_NAMES} more" if len(told) > MOST_NAMES else ""
    return "## Names\n\n" + ", ".join(told[:MOST_NAMES]) + more + "."
