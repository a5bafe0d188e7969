"""Callback: how code from outside follows a training, without a loop of its own."""

from collections.abc import Mapping

from maskfirst.checkpoint import State
from maskfirst.evaluate import Evaluation


class Callback:
    """Called from the loop, in every process; override what is needed. `state` is not to be changed."""

    def on_step(self, state: State, losses: Mapping[str, float]) -> None:
        """After each step. `losses`: weighted, averaged over the batch; `loss` is their sum, `norm` the gradient's."""

    def on_evaluation(self, state: State, evaluation: Evaluation) -> None:
        """After each evaluation."""

    def on_end(self, state: State) -> None:
        """After the last step and its evaluation."""
