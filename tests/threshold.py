"""A segmenter that needs no network: dark pixels are `dark`, bright ones `bright`, pure black is void."""

from jaxtyping import UInt8
from torch import Tensor, nn

from maskfirst.segmenter import Segmenter
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
        self.calls: list[dict] = []

    def predict(
        self,
        image: UInt8[Tensor, "3 H W"],
        task: str = "semantic",
        *,
        augment: bool = False,
        truth: Segments | None = None,
        key: str = "",
    ) -> Segments:
        self.calls.append({"task": task, "augment": augment, "truth": truth})
        brightness = image.float().mean(0)
        return Segments.from_label_map((brightness > 128).long().masked_fill(brightness == 0, VOID))
