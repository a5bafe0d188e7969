"""A segmenter that needs no network: dark pixels are `dark`, bright ones `bright`, pure black is void."""

from collections.abc import Sequence

from jaxtyping import UInt8
from torch import Tensor, nn

from maskfirst.segmenter import Inference, Segmenter
from maskfirst.types import VOID, Segments, Vocabulary

VOCABULARY = Vocabulary(
    ("dark", "bright", "unseen"), frozenset({1}), ((70, 70, 160), (250, 200, 60), (9, 9, 9)), (0, 1, 2)
)


class Threshold(Segmenter):
    """Counts its calls, so that tests can tell what was predicted and what was not."""

    uses_truth = False

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.vocabulary = VOCABULARY
        self.inference = Inference()
        self.calls: list[dict] = []

    @property
    def default_task(self) -> str:
        return "semantic"

    def segment_many(
        self,
        images: Sequence[UInt8[Tensor, "3 _H _W"]],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Sequence[Segments] | None = None,
        **_: object,
    ) -> list[Segments]:
        self.calls += [{"task": task, "augment": augment, "truth": each} for each in truth or [None] * len(images)]
        found = []
        for image in images:
            brightness = image.float().mean(0)
            found.append(Segments.from_label_map((brightness > 128).long().masked_fill(brightness == 0, VOID)))
        return found
