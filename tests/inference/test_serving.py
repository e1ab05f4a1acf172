"""Does the model's thread outlive a request that goes wrong, and keep to its bounds?"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.inference.tiny import tiny_export
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Generation, Reading, Row
from titans_pretrain.inference.serving import Busy, End, Failure, Job, SessionError, Sessions, Text, Worker
from titans_pretrain.inference.text import TextWriter


@pytest.fixture
def worker(tmp_path: Path, tokenizer_file: Path) -> Iterator[Worker]:
    tiny_export(tmp_path / "tiny", tokenizer_file, "mag")
    model, tokenizer, _ = load_export(tmp_path / "tiny")
    worker = Worker(model, tokenizer, batch=2, waiting=3, piece=8, sessions=Sessions(1))
    yield worker
    worker.close()


def ask(worker: Worker, prompt: str, tokens: int = 12, session: str = "") -> tuple[str, End | Failure]:
    events: queue.Queue[Text | End | Failure] = queue.Queue()
    worker.submit([Job(prompt, Row(tokens), events.put, session=session)])
    text = ""
    while isinstance(event := events.get(timeout=30), Text):
        text += event.text
    return text, event


def test_a_request_that_goes_wrong_ends_and_the_next_is_answered(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    good = ask(worker, "The memory", session="a")
    assert isinstance(good[1], End)
    weight = worker.model.embedding.weight
    kept = weight.clone()
    weight.fill_(torch.nan)
    _, failure = ask(worker, "The memory", session="a")
    assert isinstance(failure, Failure)
    assert "not finite" in failure.message
    assert "error while writing" in capfd.readouterr().err
    weight.copy_(kept)
    _, end = ask(worker, "", tokens=0, session="a")
    assert isinstance(end, End)
    assert end.session_tokens == good[1].session_tokens, "the session is as it was before what went wrong"
    prompt = worker.tokenizer.encode("The memory")
    writer = TextWriter(worker.tokenizer, prompt)
    expected = [writer.push(token) for token in Generation(worker.model, prompt, max_new_tokens=12)]
    assert ask(worker, "The memory")[0] == "".join([*expected, writer.finish()])


def test_no_more_wait_than_may(worker: Worker) -> None:
    jobs = [Job("x", Row(5), lambda event: None) for _ in range(4)]
    with pytest.raises(Busy, match="requests are waiting"):
        worker.submit(jobs)
    with pytest.raises(UserError, match="at least one token"):
        worker.submit([Job([], Row(5), lambda event: None)])
    held = Job("x", Row(5), lambda event: None, session="a")
    with pytest.raises(Busy):
        worker.submit([held, *jobs])
    assert isinstance(ask(worker, "x", session="a")[1], End), "what was refused holds no session"


def test_sessions_are_bounded_and_say_what_became_of_them() -> None:
    sessions = Sessions(2)
    readings = [Reading(torch.zeros(1, 1), None, ((i,),)) for i in range(4)]  # type: ignore[arg-type]
    for name, reading in zip("abc", readings, strict=False):
        assert sessions.take(name) is None
        with pytest.raises(SessionError, match="in use"):
            sessions.take(name)
        sessions.give_back(name, reading)
    assert len(sessions) == 2
    with pytest.raises(SessionError, match="was dropped"):
        sessions.take("a")
    assert sessions.take("b") is readings[1]
    sessions.give_back("b", None)
    assert sessions.take("b") is readings[1]
    with pytest.raises(SessionError, match="in use"):
        sessions.delete("b")
    sessions.give_back("b", readings[3])
    assert sessions.take("b") is readings[3]
    sessions.give_back("b", None)
    assert sessions.delete("a")
    assert not sessions.delete("a")
    assert sessions.take("a") is None
    with pytest.raises(SessionError, match="keeps no sessions"):
        Sessions(0).take("x")
