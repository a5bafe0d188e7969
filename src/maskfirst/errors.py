"""UserError: a mistake its user can put right, told in one line that names the place and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Printed by the command line as one line on stderr, with exit code 2; never with a traceback."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is most like the word; None where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or nothing where none is close."""
    close = closest(word, known)
    return "" if close is None else f" Did you mean '{close}'?"


def listed(words: Iterable[str], most: int = 10) -> str:
    """The words with commas, or the first `most` of them and how many more there are."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
