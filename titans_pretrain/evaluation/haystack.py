"""What does a needle lie in? A stretch of running text as token ids, of any length, that knows where its sentences end.

Text is tokenised once, sentence by sentence. That gives the ids of the whole text: SentencePiece joins nothing across a
space, and puts one in front of a text. Of a tokenizer that does not, the space is given with the sentence.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.scoring import TextTokenizer

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""RULER's noise haystack: these, over and over."""
MOST_WORDS = 60
"""Of a sentence; text without full stops is cut there."""


class Words:
    """Text of one or more sentences -> ids as they stand in running text, each text remembered."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        joined = tokenizer.decode([*tokenizer.encode("one"), *tokenizer.encode("two")[1:]])
        self._space = "" if joined == "one two" else " "
        self._known: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> tuple[int, ...]:
        """Without the beginning of a sequence."""
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer.encode(self._space + text)[1:])
        return self._known[text]


def split_sentences(text: str) -> list[str]:
    """Sentences of one line each, of at most MOST_WORDS words.

    A sentence ends with . ! or ? and what closes a quotation, before a space.
    """
    words = text.split()
    sentences, begun = [], 0
    for place, word in enumerate(words, 1):
        if re.search(r"[.!?][\"'”’)\]]*$", word) or place - begun == MOST_WORDS or place == len(words):
            sentences.append(" ".join(words[begun:place]))
            begun = place
    return sentences


@dataclass(frozen=True)
class Stretch:
    """Running text that begins with a sentence."""

    ids: tuple[int, ...]
    boundaries: tuple[int, ...]
    """Places in `ids` where a sentence begins, 0 first; the last may be the end."""

    def nearest(self, depth: float) -> int:
        """The boundary nearest to `depth`, a share of the text; of two the earlier."""
        wanted = depth * len(self.ids)
        return min(self.boundaries, key=lambda place: (abs(place - wanted), place))


class Haystack:
    """Sentences as ids, to be read from any of them on, from the beginning again behind the last.

    Raises:
        UserError: there are no sentences.
    """

    def __init__(self, words: Words, sentences: Sequence[str], name: str) -> None:
        self.name = name
        self._sentences = [ids for ids in map(words.ids, sentences) if ids]
        if not self._sentences:
            raise UserError(f"{name} holds no text, so nothing can be hidden in it; name another with --text")

    def __len__(self) -> int:
        return len(self._sentences)

    def stretch(self, first: int, length: int) -> Stretch:
        """`length` tokens from sentence `first` on; the last sentence may be cut."""
        ids: list[int] = []
        boundaries = [0]
        number = first
        while len(ids) < length:
            ids += self._sentences[number % len(self._sentences)]
            boundaries.append(len(ids))
            number += 1
        return Stretch(tuple(ids[:length]), tuple(place for place in boundaries if place <= length))


def insert(stretch: Stretch, parts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """The stretch with each part's ids before the place given (a boundary); parts of one place keep their order."""
    ids: list[int] = []
    done = 0
    for place, part in sorted(parts, key=lambda item: item[0]):
        assert stretch.boundaries[bisect.bisect_left(stretch.boundaries, place)] == place, "not at a boundary"
        ids += [*stretch.ids[done:place], *part]
        done = place
    return [*ids, *stretch.ids[done:]]
