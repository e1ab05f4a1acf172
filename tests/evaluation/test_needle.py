"""Is the needle where it should be, is a sample a pure function of its seed, and do the scores span chance to 100?"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from tests.evaluation.models import Guesser, Oracle
from tests.inference.tiny import VOCAB
from tests.model.tiny import tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.haystack import Haystack, Words, insert, split_sentences
from titans_pretrain.evaluation.needle import TASKS, Needles, run_needles
from titans_pretrain.evaluation.scoring import Scoring, judge
from titans_pretrain.inference.generate import Generation
from titans_pretrain.inference.sampling import SamplingOptions

LENGTH = 900
SCORING = Scoring(piece=200, batch=4)


def needles(name: str, words: Words, haystack: Haystack, seed: int = 0) -> Needles:
    return Needles(TASKS[name], words, haystack, seed)


def look_up(text: str) -> str:
    """The value of the key that the text's end asks for."""
    (key,) = set(re.findall(r"for (\S+) mentioned in the provided text", text))
    (value,) = re.findall(rf"One of the special magic \w+ for {key} is: (\S+)\.", text)
    return value


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_its_text_tokenised(name: str, words: Words, haystack: Haystack, tokenizer: Tokenizer) -> None:
    """Exactly as long as asked with the answer's room, and the ids are those of the text as a whole."""
    for depth in (0.0, 0.4, 1.0):
        made = needles(name, words, haystack)
        sample = made.sample(LENGTH, depth, 3)
        assert len(sample.prompt) + made.room == LENGTH
        text = tokenizer.decode(sample.prompt)
        assert look_up(text) == sample.answer
        assert len(sample.answer_ids) <= made.room
        assert tokenizer.decode([*sample.prompt, *sample.answer_ids]) == f"{text} {sample.answer}"
        assert tuple(tokenizer.encode(f"{text} {sample.answer}")) == (*sample.prompt, *sample.answer_ids)
        shape = r"[0-9]{7}" if TASKS[name].value == "number" else r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"
        assert re.fullmatch(shape, sample.answer)
        assert text.count("One of the special magic") >= 1 + TASKS[name].others


@pytest.mark.parametrize("name", TASKS)
def test_the_needle_lies_between_sentences_at_its_depth(name: str, words: Words, haystack: Haystack) -> None:
    decode = words.tokenizer.decode
    found = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        sample = needles(name, words, haystack).sample(LENGTH, depth, 0)
        text = decode(sample.prompt)
        start = text.index(f": {sample.answer}.")
        start = text.rindex("One of the special magic", 0, start)
        assert text[: start - 1].endswith((".", "!", "?")), text[start - 30 : start]
        stop = text.index(f"{sample.answer}.", start) + len(sample.answer) + 2
        assert text[stop - 1] == " "
        begin = text.index("afterwards. ") + len("afterwards. ")
        found.append((start - begin) / (text.index("What is the special") - begin - (stop - start)))
    assert found == sorted(found)
    for depth, place in zip((0.0, 0.25, 0.5, 0.75, 1.0), found, strict=True):
        assert abs(place - depth) < 0.13, found
    assert found[0] < 0.01


def test_the_seed_decides_everything_and_the_depth_only_the_place(words: Words, haystack: Haystack) -> None:
    for name in TASKS:
        one, again, other = (needles(name, words, haystack, seed) for seed in (7, 7, 8))
        assert one.sample(LENGTH, 0.5, 2) == again.sample(LENGTH, 0.5, 2)
        assert one.sample(LENGTH, 0.5, 2) != other.sample(LENGTH, 0.5, 2)
        assert one.sample(LENGTH, 0.5, 2) != one.sample(LENGTH, 0.5, 3)
        shallow, deep = one.sample(LENGTH, 0.0, 2), one.sample(LENGTH, 1.0, 2)
        assert shallow.prompt != deep.prompt
        assert sorted(shallow.prompt) == sorted(deep.prompt)
        assert shallow.answer == deep.answer


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_scores_100(name: str, words: Words, haystack: Haystack) -> None:
    made = needles(name, words, haystack)
    oracle = Oracle(words, LENGTH - made.room, look_up)
    record: list[dict[str, Any]] = []
    cells = run_needles(oracle, made, [LENGTH], [0.0, 0.5, 1.0], 5, SCORING, record)["cells"]
    assert [(cell["score"], cell["token_accuracy"]) for cell in cells] == [(100.0, 100.0)] * 3
    assert all(cell["nll"] < 1e-6 for cell in cells)
    assert [(cell["length"], cell["depth"], cell["samples"]) for cell in cells] == [
        (LENGTH, 0.0, 5),
        (LENGTH, 0.5, 5),
        (LENGTH, 1.0, 5),
    ]
    assert len(record) == 15
    assert all(line["written"] == line["answer"] for line in record)


def test_an_oracle_that_is_wrong_once_in_five_does_not(words: Words, haystack: Haystack) -> None:
    """The score counts samples, the token accuracy tokens."""
    made = needles("niah_single_1", words, haystack)
    wrong = made.sample(LENGTH, 0.5, 2).answer

    def almost(text: str) -> str:
        value = look_up(text)
        return value[:-1] + str((int(value[-1]) + 1) % 10) if value == wrong else value

    (cell,) = run_needles(Oracle(words, LENGTH - made.room, almost), made, [LENGTH], [0.5], 5, SCORING)["cells"]
    tokens = sum(len(made.sample(LENGTH, 0.5, i).answer_ids) for i in range(5))
    assert cell["score"] == 80.0
    assert cell["token_accuracy"] == round(100 * (tokens - 1) / tokens, 2)
    assert cell["nll"] == pytest.approx(40 / tokens, rel=0.01)


def test_a_guesser_scores_chance(words: Words, haystack: Haystack) -> None:
    made = needles("niah_single_3", words, haystack)
    (cell,) = run_needles(Guesser(VOCAB), made, [LENGTH], [0.5], 40, SCORING)["cells"]
    tokens = sum(len(made.sample(LENGTH, 0.5, i).answer_ids) for i in range(40))
    assert tokens > 500
    expected = tokens / VOCAB
    assert cell["score"] == 0.0
    assert abs(cell["token_accuracy"] / 100 * tokens - expected) < 4 * math.sqrt(expected)
    assert cell["nll"] == pytest.approx(math.log(VOCAB), abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_real_model_is_judged_by_what_it_computes(variant: str, words: Words, haystack: Haystack) -> None:
    """Losses are those of one pass over prompt and answer, and the continuation is what tools/generate.py would write."""
    model = tiny_model(variant, vocab_size=VOCAB + 5).requires_grad_(False)
    made = needles("niah_single_3", words, haystack)
    samples = [made.sample(420, 0.5, index) for index in range(3)]
    judged = judge(model, samples, Scoring(piece=64, batch=2), new_tokens=9, num_tokens=VOCAB, eos_id=2)
    assert len({len(sample.answer_ids) for sample in samples}) > 1, "answers of one length prove less"
    for sample, found in zip(samples, judged, strict=True):
        ids = torch.tensor([[*sample.prompt, *sample.answer_ids]])
        logits = model.logits(model.hidden(ids[:, :-1])[0])[0, len(sample.prompt) - 1 :]
        answer = torch.tensor(sample.answer_ids)
        losses = torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
        assert found.nll == pytest.approx(float(losses), rel=1e-4)
        assert found.correct_tokens == int((logits[:, :VOCAB].argmax(-1) == answer).sum())
        options = SamplingOptions(temperature=0.0)
        written = Generation(model, sample.prompt, max_new_tokens=9, options=options, eos_id=2, num_tokens=VOCAB)
        assert list(found.written) == list(written)


def test_a_length_too_short_is_refused(words: Words, haystack: Haystack) -> None:
    with pytest.raises(UserError, match=r"niah_single_3 does not fit in 100 tokens.*--lengths.*of \d+"):
        needles("niah_single_3", words, haystack).sample(100, 0.5, 0)


def test_sentences() -> None:
    text = 'He said: "Go!" She\nwent.  \n\nWhere? (There.) No 3.5 here'
    assert split_sentences(text) == ['He said: "Go!"', "She went.", "Where?", "(There.)", "No 3.5 here"]
    assert split_sentences("word " * 130) == ["word " * 59 + "word"] * 2 + ["word " * 9 + "word"]
    assert split_sentences(" \n ") == []


def test_a_haystack_is_the_text_tokenised_and_goes_on_from_its_beginning(words: Words, tokenizer: Tokenizer) -> None:
    sentences = ["The memory learns.", "Surprise forgets!", "Café naïve 12 345?"]
    hay = Haystack(words, sentences, "it")
    text = " ".join([*sentences[1:], *sentences, sentences[0]])
    whole = tokenizer.encode(text)[1:]
    stretch = hay.stretch(1, len(whole) - 1)
    assert list(stretch.ids) == whole[:-1]
    assert len(stretch.boundaries) == 6
    assert stretch.nearest(0.0) == 0
    assert stretch.nearest(1.0) == stretch.boundaries[-1]
    assert insert(stretch, [(0, [7]), (stretch.boundaries[1], [8]), (0, [9])])[:3] == [7, 9, whole[0]]
    with pytest.raises(UserError, match="--text"):
        Haystack(words, [], "nothing")
