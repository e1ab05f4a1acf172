"""Do the stories' answers follow from their text, from the supporting facts alone, and do scores span chance to 100?"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from tests.evaluation.models import Guesser, Oracle
from tests.inference.tiny import VOCAB
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.babilong import ROOM, TASKS, Scattered, run_scattered
from titans_pretrain.evaluation.haystack import Haystack, Words
from titans_pretrain.evaluation.scoring import Scoring
from titans_pretrain.evaluation.world import FACTS, PLACES, tell

LENGTH = 1100
SCORING = Scoring(piece=256, batch=8)
PERSON = r"(Mary|John|Daniel|Sandra)"
MOVE = re.compile(rf"^{PERSON} (?:went to|moved to|travelled to|journeyed to|went back to) the (\w+)$")
TAKE = re.compile(rf"^{PERSON} (?:picked up|took|grabbed|got) the (\w+)(?: there)?$")
DROP = re.compile(rf"^{PERSON} (?:dropped|put down|left|discarded) the (\w+)(?: there)?$")


def solve(facts: Sequence[str], question: str) -> str:
    """The answer by reading, a reader of its own: nothing of world.py is in it."""
    at: dict[str, str] = {}
    has: dict[str, str] = {}
    been: dict[str, list[str]] = {}
    for fact in facts:
        fact = fact.rstrip(".")
        if match := MOVE.match(fact):
            person, place = match.groups()
            at[person] = place
            for thing, who in has.items():
                if who == person:
                    been[thing].append(place)
        elif match := TAKE.match(fact):
            person, thing = match.groups()
            assert thing not in has
            has[thing] = person
            here = been.setdefault(thing, [])
            if person in at and here[-1:] != [at[person]]:
                assert not here, f"{thing} was taken where it did not lie"
                here.append(at[person])
        else:
            match = DROP.match(fact)
            assert match, fact
            person, thing = match.groups()
            assert has.pop(thing) == person
    if match := re.fullmatch(rf"Where is {PERSON}\?", question):
        return at[match[1]]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return been[match[1]][-1]
    match = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question)
    assert match, question
    places = been[match[1]]
    assert places.count(match[2]) == 1, "which of the times?"
    return places[places.index(match[2]) - 1]


@pytest.mark.parametrize("task", FACTS)
def test_answers_follow_from_the_text_and_from_the_supporting_facts(task: str) -> None:
    answers = dict.fromkeys(PLACES, 0)
    for seed in range(400):
        story = tell(task, random.Random(f"{task}/{seed}"))
        assert FACTS[task][0] <= len(story.facts) <= FACTS[task][1]
        assert len(story.supporting) == {"qa1": 1, "qa2": 2, "qa3": 3}[task]
        assert solve(story.facts, story.question) == story.answer
        assert solve([story.facts[i] for i in story.supporting], story.question) == story.answer
        answers[story.answer] += 1
    assert all(40 < count < 95 for count in answers.values()), f"some answer is a better guess: {answers}"


def read_and_solve(text: str) -> str:
    """Finds the facts between other sentences."""
    question = re.search(r"Where (?:is|was) [^?]*\?", text)
    assert question, text
    sentences = re.split(r"(?<=[.!?]) ", text[: question.start()].split("the latest counts. ")[1])
    return solve([s for s in sentences if any(kind.match(s.rstrip(".")) for kind in (MOVE, TAKE, DROP))], question[0])


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_scores_100_and_the_seed_decides(task: str, words: Words, haystack: Haystack) -> None:
    stories = Scattered(task, words, haystack, seed=5)
    oracle = Oracle(words, LENGTH - ROOM, read_and_solve)
    result = run_scattered(oracle, stories, [LENGTH], 20, SCORING)
    (cell,) = result["cells"]
    assert {key: cell[key] for key in ("score", "choice", "token_accuracy")} == dict(
        score=100.0, choice=100.0, token_accuracy=100.0
    )
    assert result["chance"] == 16.67
    sample = stories.sample(LENGTH, 3)
    assert len(sample.prompt) == LENGTH - ROOM
    assert sample == Scattered(task, words, haystack, seed=5).sample(LENGTH, 3)
    assert sample != Scattered(task, words, haystack, seed=6).sample(LENGTH, 3)
    assert tuple(words.tokenizer.encode(words.tokenizer.decode(sample.prompt))) == sample.prompt


def test_a_guesser_scores_chance(words: Words, haystack: Haystack) -> None:
    """One answer of six; its choices follow the tokens' number and the draw, not the text."""
    stories = Scattered("babilong_qa1", words, haystack, seed=1)
    (cell,) = run_scattered(Guesser(VOCAB), stories, [LENGTH], 240, SCORING)["cells"]
    assert abs(cell["choice"] - 100 / 6) < 4 * 100 * (1 / 6 * 5 / 6 / 240) ** 0.5
    assert cell["score"] < 2
    assert cell["token_accuracy"] < 2


def test_a_length_too_short_is_refused(words: Words, haystack: Haystack) -> None:
    with pytest.raises(UserError, match=r"babilong_qa3 does not fit in 200 tokens.*--lengths of \d+"):
        Scattered("babilong_qa3", words, haystack, 0).sample(200, 0)
