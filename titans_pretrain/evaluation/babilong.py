"""Can a model reason over facts that lie far apart? Stories of world.py, their facts scattered over prose, in order.

After BABILong (arXiv 2406.10149), whose background is books and whose facts are those of the bAbI tasks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.haystack import Haystack, Words, insert
from titans_pretrain.evaluation.scoring import Model, Sample, Scoring, judge, summarize
from titans_pretrain.evaluation.world import FACTS, PLACES, tell

TASKS = {f"babilong_{kind}": kind for kind in FACTS}
ROOM = 1 + max(map(len, PLACES))
"""Tokens kept for the answer: no tokenizer with a piece for every byte needs more."""
LEAST_BACKGROUND = 32
"""Tokens of prose."""


class Scattered:
    """Samples of one task, "babilong_qa1" to "babilong_qa3"."""

    def __init__(self, task: str, words: Words, background: Haystack, seed: int) -> None:
        self.task = task
        self.words = words
        self.background = background
        self.seed = seed

    def sample(self, length: int, index: int) -> Sample:
        """Sample number `index`: prompt and the answer's room make `length` tokens.

        Raises:
            UserError: the facts alone are longer.
        """
        draw = random.Random(f"{self.seed}/{self.task}/{length}/{index}")
        story = tell(TASKS[self.task], draw)
        before = self.words.ids(
            "The following text has facts about the positions of different persons and objects hidden in it. Answer the "
            "question from the facts alone. If somebody was in several places, the latest counts."
        )
        facts = [self.words.ids(fact) for fact in story.facts]
        question = (*self.words.ids(story.question), *self.words.ids(story.beginning))
        fixed = 1 + len(before) + sum(map(len, facts)) + len(question) + ROOM
        if length - fixed < LEAST_BACKGROUND:
            raise UserError(
                f"{self.task} does not fit in {length} tokens: the {len(facts)} facts of sample {index}, question and answer "
                f"take {fixed}, and the prose needs {LEAST_BACKGROUND} more; give --lengths of {fixed + LEAST_BACKGROUND} or "
                "more"
            )
        stretch = self.background.stretch(draw.randrange(len(self.background)), length - fixed)
        places = sorted(draw.choices(stretch.boundaries, k=len(facts)))
        text = insert(stretch, list(zip(places, facts, strict=True)))
        prompt = (self.words.tokenizer.bos_id, *before, *text, *question)
        assert len(prompt) == length - ROOM
        choices = tuple(self.words.ids(place) for place in PLACES)
        return Sample(prompt, story.answer, self.words.ids(story.answer), choices, PLACES.index(story.answer))


def run_scattered(
    model: Model,
    stories: Scattered,
    lengths: Sequence[int],
    samples: int,
    scoring: Scoring,
    record: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One task at every length.

    Args:
        samples: of each length.
        record: gets an object for each sample: what was asked and what was written.

    Returns:
        {"cells": [{"length", "samples", "score", "choice", "token_accuracy", "nll"}], "chance": of "choice", percent}.
    """
    tokenizer = stories.words.tokenizer
    cells = []
    for length in lengths:
        asked = [stories.sample(length, index) for index in range(samples)]
        judged = judge(
            model,
            asked,
            scoring,
            new_tokens=ROOM + scoring.spare_tokens,
            num_tokens=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )
        cells.append({"length": length, **summarize(asked, judged, tokenizer)})
        if record is not None:
            record += [
                {
                    "task": stories.task,
                    "length": length,
                    "prompt": tokenizer.decode(sample.prompt),
                    "answer": sample.answer,
                    "written": tokenizer.decode(answer.written),
                    "chosen": PLACES[answer.chosen],
                    "nll": answer.nll,
                }
                for sample, answer in zip(asked, judged, strict=True)
            ]
    return {"cells": cells, "chance": round(100 / len(PLACES), 2)}
