"""Can a model find one sentence in a long text? The needles of RULER (arXiv 2404.06654), made offline.

A sentence with a key and a value is put into a haystack at a sentence's end; the text ends with a question for the key's
value. Length, depth, task, seed and the sample's number decide a sample down to the last token; the depth moves the needle
and nothing else.

niah_single_1     haystack: five sentences over and over; value: a number of seven digits (the pass key of earlier work)
niah_single_2     haystack: prose; value: a number
niah_single_3     haystack: prose; value: a UUID
niah_multikey_1   as single_2, with three more needles of other keys
niah_multikey_2   the whole haystack is needles of other keys
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.haystack import NOISE, Haystack, Words, insert
from titans_pretrain.evaluation.scoring import Model, Sample, Scoring, judge, summarize
from titans_pretrain.evaluation.word_lists import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class NeedleTask:
    """One kind of needle."""

    name: str
    haystack: str
    """noise, prose or needles."""
    value: str
    """number or UUID."""
    others: int = 0
    """Needles of other keys that lie somewhere in the haystack."""


TASKS = {
    task.name: task
    for task in (
        NeedleTask("niah_single_1", "noise", "number"),
        NeedleTask("niah_single_2", "prose", "number"),
        NeedleTask("niah_single_3", "prose", "UUID"),
        NeedleTask("niah_multikey_1", "prose", "number", others=3),
        NeedleTask("niah_multikey_2", "needles", "number"),
    )
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, as a share of the haystack: 0 the beginning, 1 the end."""
LEAST_HAYSTACK = 32
"""Tokens: of less there is no depth."""
HAYSTACK_NEEDLES = 4096
"""Needles of which niah_multikey_2's haystacks are stretches; 60 thousand tokens and more before they repeat."""


class Needles:
    """Samples of one task.

    Args:
        words: the model's tokenizer.
        prose: of the tasks with one.
    """

    def __init__(self, task: NeedleTask, words: Words, prose: Haystack | None, seed: int) -> None:
        self.task = task
        self.words = words
        self.seed = seed
        self._taken: set[str] = set()
        if task.haystack == "prose":
            assert prose is not None, task.name
            self.haystack = prose
        elif task.haystack == "noise":
            self.haystack = Haystack(words, NOISE, "the noise")
        else:
            draw = self._draw("haystack")
            pairs = [(self._key(draw), self._value(draw)) for _ in range(HAYSTACK_NEEDLES)]
            self.haystack = Haystack(words, [self._needle(*pair) for pair in pairs], "the needles")
            self._taken = {key for key, _ in pairs}

    @property
    def room(self) -> int:
        """Tokens kept for the answer: no tokenizer with a piece for every byte needs more."""
        return 1 + (7 if self.task.value == "number" else 36)

    def sample(self, length: int, depth: float, index: int) -> Sample:
        """Sample number `index`: prompt and the answer's room make `length` tokens.

        Raises:
            UserError: they do not fit.
        """
        draw = self._draw(length, index)
        key, value = self._key(draw), self._value(draw)
        while key in self._taken:
            key = self._key(draw)
        needles = [(key, value)]
        while len(needles) <= self.task.others:
            other = (self._key(draw), self._value(draw))
            if all(other[0] != k and other[1] != v for k, v in needles):
                needles.append(other)
        kind = self.task.value
        before = self.words.ids(
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards."
        )
        question = self.words.ids(
            f"What is the special magic {kind} for {key} mentioned in the provided text? "
            f"The special magic {kind} for {key} mentioned in the provided text is"
        )
        parts = [self.words.ids(self._needle(k, v)) for k, v in needles]
        fixed = 1 + len(before) + sum(map(len, parts)) + len(question) + self.room
        if length - fixed < LEAST_HAYSTACK:
            raise UserError(
                f"{self.task.name} does not fit in {length} tokens: needle, question and answer take {fixed}, and the haystack "
                f"needs {LEAST_HAYSTACK} more; give --lengths (eval.needle_lengths in training) of {fixed + LEAST_HAYSTACK} "
                "or more"
            )
        stretch = self.haystack.stretch(draw.randrange(len(self.haystack)), length - fixed)
        places = [stretch.nearest(depth), *(draw.choice(stretch.boundaries) for _ in parts[1:])]
        hidden = insert(stretch, list(zip(places, parts, strict=True)))
        prompt = (self.words.tokenizer.bos_id, *before, *hidden, *question)
        assert len(prompt) == length - self.room
        return Sample(prompt, value, self.words.ids(value))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.task.value}s for {key} is: {value}."

    def _key(self, draw: random.Random) -> str:
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"

    def _value(self, draw: random.Random) -> str:
        if self.task.value == "number":
            return str(draw.randrange(10**6, 10**7))
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    def _draw(self, *what: object) -> random.Random:
        # Of a text Python makes the generator's state by SHA-512: the same on every machine.
        return random.Random("/".join(map(str, (self.seed, self.task.name, *what))))


def run_needles(
    model: Model,
    needles: Needles,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    scoring: Scoring,
    record: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The grid of one task.

    Args:
        samples: in each cell.
        record: gets an object for each sample: what was asked and what was written.

    Returns:
        {"cells": [{"length", "depth", "samples", "score", "token_accuracy", "nll"}]}.
    """
    tokenizer = needles.words.tokenizer
    cells = []
    for length in lengths:
        for depth in depths:
            asked = [needles.sample(length, depth, index) for index in range(samples)]
            judged = judge(
                model,
                asked,
                scoring,
                new_tokens=needles.room + scoring.spare_tokens,
                num_tokens=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
            )
            cells.append({"length": length, "depth": depth, **summarize(asked, judged, tokenizer)})
            if record is not None:
                where = {"task": needles.task.name, "length": length, "depth": depth}
                record += [
                    {
                        **where,
                        "prompt": tokenizer.decode(sample.prompt),
                        "answer": sample.answer,
                        "written": tokenizer.decode(answer.written),
                        "nll": answer.nll,
                    }
                    for sample, answer in zip(asked, judged, strict=True)
                ]
    return {"cells": cells}
