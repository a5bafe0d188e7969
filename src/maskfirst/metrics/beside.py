"""Beside: two metrics of the same pictures as one."""

from typing import TypeVar

from maskfirst.contracts import Metric, Scores

Seen = TypeVar("Seen")


class Beside(Metric[Seen]):
    """All that `first` and `second` say, class by class in one table; headline and pictures' own scores are the first's."""

    def __init__(self, first: Metric[Seen], second: Metric[Seen]) -> None:
        self.first = first
        self.second = second

    def update(self, truth: Seen, prediction: Seen, picture: int = 0) -> float | None:
        self.second.update(truth, prediction, picture)
        return self.first.update(truth, prediction, picture)

    def merge(self, other: "Beside[Seen]") -> None:
        self.first.merge(other.first)
        self.second.merge(other.second)

    def scores(self) -> Scores:
        one, two = self.first.scores(), self.second.scores()
        return Scores(
            one.headline,
            {**one.means, **two.means},
            {**one.content, **two.content},
            one.columns + two.columns,
            *(
                [(name, left + right) for (name, left), (_, right) in zip(lefts, rights, strict=True)]
                for lefts, rights in ((one.rows, two.rows), (one.below, two.below))
            ),
        )
