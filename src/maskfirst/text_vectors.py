"""Text vectors: class names put into sentences and encoded by a text encoder that was trained with pictures.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021; the templates are those of
He et al., "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation" (PADing), CVPR 2023.
"""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maskfirst.errors import UserError, nearest
from maskfirst.formats import class_vectors
from maskfirst.formats.class_vectors import ClassVectors

TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "A photo of a {} in the scene",
)
SYNONYMS = ", "
"""What stands between the words of a name that mean the same."""


class TextEncoder(ABC):
    """Sentences to vectors. `name`: what it is called in notes, by which cached vectors are known."""

    name: str

    @abstractmethod
    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "N D"]:
        """On the CPU, not normalised."""


class OpenClip(TextEncoder):
    """A model of open_clip, of its own tokens."""

    def __init__(
        self, name: str, model: Any, length: int | None = None, tokenizer: Callable[..., Tensor] | None = None
    ) -> None:
        """`length`: tokens of a sentence. `tokenizer`: CLIP's by default."""
        from open_clip import tokenize

        self.name, self.model, self.length = name, model, length
        self.tokenizer = tokenizer or tokenize

    @classmethod
    def called(cls, model: str) -> "OpenClip":
        """`model`: an architecture of open_clip's and, after a slash, the weights, as ViT-B-16/openai; or hf-hub:org/name."""
        import open_clip

        architecture, _, weights = (model, "", "") if model.startswith("hf-hub:") else model.partition("/")
        known = open_clip.list_models()
        if architecture not in known and not architecture.startswith("hf-hub:"):
            raise UserError(f"open_clip has no model '{architecture}'.{nearest(architecture, known)}")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if weights not in tags and not architecture.startswith("hf-hub:") and not Path(weights).is_file():
            raise UserError(
                f"open_clip has no weights '{weights}' of {architecture}.{nearest(weights, tags)} Known: {', '.join(tags)}."
            )
        built = open_clip.create_model(architecture, pretrained=weights or None).eval()
        return cls(f"open_clip:{model}", built, tokenizer=open_clip.get_tokenizer(architecture))

    def tokens(self, sentences: Sequence[str]) -> Int64[Tensor, "N L"]:
        """The numbers of the sentences' tokens."""
        return self.tokenizer([*sentences], **({} if self.length is None else {"context_length": self.length}))

    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "N D"]:
        with torch.inference_mode():
            return self.model.encode_text(self.tokens(sentences)).float().clone()


class Transformers(TextEncoder):
    """A model of the library transformers that has text features, such as CLIP and SigLIP."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer

    @classmethod
    def called(cls, model: str) -> "Transformers":
        """`model`: a name on the hub, or a folder."""
        from transformers import AutoModel, AutoTokenizer

        return cls(
            f"transformers:{model}", AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
        )

    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "N D"]:
        told = self.tokenizer([*sentences], padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            found = self.model.get_text_features(**told)
            # Newer releases say more than the features.
            found = found if isinstance(found, Tensor) else found.pooler_output
            return found.float().clone()


ENCODERS: dict[str, tuple[type[OpenClip] | type[Transformers], str]] = {
    "open_clip": (OpenClip, "pip install 'maskfirst[text]'"),
    "transformers": (Transformers, "pip install transformers"),
}
"""Library -> its encoders, and how it is installed."""


def encoder(said: str) -> TextEncoder:
    """LIBRARY:MODEL, such as open_clip:ViT-B-16/openai or transformers:openai/clip-vit-base-patch16.

    Raises UserError where there is no such library or model, or where it cannot be had.
    """
    library, sign, model = said.partition(":")
    if library not in ENCODERS or not sign or not model:
        raise UserError(
            f"encoder '{said}': should look like open_clip:ViT-B-16/openai or transformers:openai/clip-vit-base-patch16."
            f"{nearest(library, ENCODERS)}"
        )
    kind, remedy = ENCODERS[library]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"encoder '{said}': {library} is not installed; {remedy}")
    try:
        return kind.called(model)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"encoder '{said}': cannot be had: {' '.join(str(error).split())}") from error


def prompts(name: str, templates: Sequence[str] = TEMPLATES) -> tuple[str, ...]:
    """The sentences of a name: in each template, each of its synonyms."""
    return tuple(template.replace("{}", word) for template in templates for word in name.split(SYNONYMS))


def text_vectors(
    names: Sequence[str], encode: TextEncoder, templates: Sequence[str] = TEMPLATES
) -> Float[Tensor, "K D"]:
    """The mean of the normalised vectors of a name's sentences, normalised."""
    found = []
    for name in names:
        each = F.normalize(encode.encode(prompts(name, templates)), dim=-1)
        found.append(F.normalize(each.mean(0), dim=-1))
    return torch.stack(found)


def cached(
    path: Path,
    names: Sequence[str],
    said: str,
    templates: Sequence[str] = TEMPLATES,
    make: Callable[[str], TextEncoder] | None = None,
) -> tuple[ClassVectors, int]:
    """The vectors of `names` by the encoder `said`, from the file where it has them, else made and added to it.

    Also returns how many were made. `make`: in place of `encoder`, and not called where none is. Raises UserError where the
    file is of another encoder.
    """
    notes = {"encoder": said, "templates": json.dumps([*templates], ensure_ascii=False)}
    old = class_vectors.read_all(path) if path.exists() else None
    if old is not None and {key: old.notes.get(key) for key in notes} != notes:
        raise UserError(
            f"{path}: holds vectors of {old.notes.get('encoder', 'an unknown encoder')} by other words; give another --out"
        )
    known = () if old is None else old.names
    missing = [name for name in dict.fromkeys(names) if name not in known]
    if old is not None and not missing:
        return old, 0
    vectors = text_vectors(missing, (make or encoder)(said), templates)
    if old is not None:
        vectors = torch.cat([old.vectors, vectors])
    found = ClassVectors((*known, *missing), vectors, str(path), notes)
    class_vectors.write(path, found)
    return found, len(missing)
