"""Byte pairs: CLIP's token file, and text in the numbers of its tokens.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016; the vocabulary is that of Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021.
"""

import gzip
import html
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from maskfirst.errors import UserError

MERGES = 48894
"""How many pairs CLIP's vocabulary has."""
START, END = 512 + MERGES, 513 + MERGES
"""Numbers of the tokens around every text, after those of the bytes, of the bytes that end a word, and of the pairs."""
_MOST = 2**24
"""Bytes of a token file; CLIP's has 1.3 million."""
_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
_ENDS = "</w>"


class BytePairs:
    """Text to numbers, word by word: of the pairs of neighbours the one that the file has first is merged first."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        """`merges`: pairs of symbols in the order of the file. The bytes of a symbol are written as `_letters` has them."""
        letters = [*_letters().values()]
        symbols = [*letters, *(letter + _ENDS for letter in letters), *(first + second for first, second in merges)]
        self.numbers = {symbol: number for number, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    @classmethod
    def read(cls, path: Path, known: Mapping[str, Sequence[int]]) -> "BytePairs":
        """A `bpe_simple_vocab_16e6.txt.gz` or `merges.txt` of CLIP's. Raises UserError where it is not.

        `known`: texts and their numbers, with those around them, by which another vocabulary of as many pairs shows.
        """
        try:
            with path.open("rb") as file:
                raw = file.read(_MOST)
            if raw[:2] == b"\x1f\x8b":
                raw = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(raw, _MOST)
            lines = raw.decode("utf-8").splitlines()[1 : MERGES + 1]
        except (OSError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no token file can be read there ({error})") from error
        pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines) if first and second]
        found = cls(pairs)
        wrong = [text for text, numbers in known.items() if found.row(text, len(numbers)) != [*numbers]]
        if len(pairs) < MERGES or wrong:
            what = f"of {len(pairs)} pairs" if len(pairs) < MERGES else f"that writes '{wrong[0]}' in other numbers"
            raise UserError(
                f"{path}: a token file {what}, and not CLIP's, of {MERGES}; take its bpe_simple_vocab_16e6.txt.gz"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens, without those around it. Case and the width of spaces do not count.

        Text is put in Unicode's composed form; text that was decoded wrongly once is not repaired.
        """
        clean = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).lower()
        return [self.numbers[symbol] for word in _words(clean) for symbol in self._merged(word)]

    def row(self, text: str, length: int) -> list[int]:
        """`length` numbers: a start, the text, an end, and 0 behind it. A text that is too long is cut before its end."""
        inner = self.encode(text)[: length - 2]
        return [START, *inner, END, *(0,) * (length - 2 - len(inner))]

    def _merged(self, word: str) -> list[str]:
        letters = _letters()
        symbols = [letters[byte] for byte in word.encode("utf-8")]
        symbols[-1] += _ENDS
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, MERGES))
            if pair not in self.ranks:
                break
            merged, place = [], 0
            while place < len(symbols):
                together = (*symbols[place : place + 2],) == pair
                merged.append("".join(pair) if together else symbols[place])
                place += 2 if together else 1
            symbols = merged
        return symbols


@cache
def _letters() -> dict[int, str]:
    """What every byte is written as: printable ones as themselves, the others as letters from U+0100 on, after those."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single digits, and runs of all else but space."""
    place = 0
    while place < len(text):
        if contraction := _CONTRACTION.match(text, place):
            yield contraction[0]
            place = contraction.end()
            continue
        kind, end = _kind(text[place]), place + 1
        while kind != "N" and end < len(text) and _kind(text[end]) == kind:
            end += 1
        if kind != " ":
            yield text[place:end]
        place = end


def _kind(letter: str) -> str:
    if letter.isspace():
        return " "
    category = unicodedata.category(letter)[0]
    return category if category in "LN" else "other"
