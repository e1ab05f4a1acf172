"""Does the official client get from a real server what tools/generate.py writes, and a clear error for everything else?"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.inference.tiny import tiny_export
from tools.generate import main as generate
from tools.serve import main as serve

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "serve.py"
TOKEN = "a secret"


@contextlib.contextmanager
def running(*arguments: object, **environment: str) -> Iterator[tuple[str, Path]]:
    """A server process on a free loopback port -> (its URL, the file of its stderr)."""
    log = Path(str(arguments[0])).parent / f"serve{time.monotonic_ns()}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments), "--port", "0"],
            stderr=stderr,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parent.parent), **environment),
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"at (http://127.0.0.1:\d+/v1)\n", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield found[1], log
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_export(folder, tokenizer_file, "mac")
    return folder


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[tuple[str, Path]]:
    with running(export, "--max-sessions", 2, "--batch", 4, TITANS_SERVE_TOKEN=TOKEN) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Path]) -> openai.OpenAI:
    return openai.OpenAI(base_url=server[0], api_key=TOKEN, max_retries=0, timeout=60)


def generated(capsys: pytest.CaptureFixture[str], export: Path, *arguments: object) -> str:
    capsys.readouterr()
    generate([str(export), *map(str, arguments)])
    return capsys.readouterr().out[:-1]


def create(client: openai.OpenAI, **arguments: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": "The memory", "max_tokens": 30, **arguments})


def test_streams_what_generate_writes(client: openai.OpenAI, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of characters that come in several tokens included: this model has drawn some in these texts."""
    texts = []
    for seed in (0, 5, 11):
        expected = generated(
            capsys, export, "--prompt", "The memory", "--seed", seed, "--max-new-tokens", 80, "--temperature", 1.2
        )
        events = list(create(client, seed=seed, max_tokens=80, temperature=1.2, stream=True))
        texts.append("".join(e.choices[0].text for e in events))
        assert "The memory" + texts[-1] == expected
        assert [e.choices[0].finish_reason for e in events][-1] in ("length", "stop")
        assert len(events) > 10
        whole = create(client, seed=seed, max_tokens=80, temperature=1.2)
        assert whole.choices[0].text == texts[-1]
    assert len(set(texts)) == 3
    text = generated(
        capsys, export, "--prompt", "é", "--top-k", 40, "--top-p", 0.8, "--seed", 2, "--max-new-tokens", 30
    )
    answer = create(client, prompt="é", top_p=0.8, seed=2, echo=True, extra_body={"top_k": 40})
    assert answer.choices[0].text == text


def test_temperature_zero_max_tokens_and_usage(
    client: openai.OpenAI, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [create(client, temperature=0, seed=seed, max_tokens=12) for seed in (1, 2)]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    expected = generated(capsys, export, "--prompt", "The memory", "--temperature", 0, "--max-new-tokens", 12)
    assert "The memory" + answers[0].choices[0].text == expected
    assert answers[0].usage.completion_tokens == 12
    assert answers[0].usage.total_tokens == 12 + answers[0].usage.prompt_tokens
    assert answers[0].choices[0].finish_reason == "length"
    *_, last = create(client, max_tokens=5, seed=0, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens <= 5
    assert last.choices == []
    assert create(client, max_tokens=0, echo=True).choices[0].text == "The memory"


def test_stop_ends_before_the_text(client: openai.OpenAI) -> None:
    whole = create(client, seed=3, max_tokens=60).choices[0].text
    stop = whole[20:23]
    found = create(client, seed=3, max_tokens=60, stop=["never there", stop])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    events = list(create(client, seed=3, max_tokens=60, stop=stop, stream=True))
    assert "".join(e.choices[0].text for e in events) == whole[: whole.index(stop)]


def test_many_at_once_are_what_each_is_alone(client: openai.OpenAI) -> None:
    """Eight clients and a batch of four: requests of all lengths join and leave under way."""
    prompts = ["The", "a river of stone " * 9, "12 345", "surprise forgets", "", "café", "x" * 50, "the wave"]
    alone = [create(client, prompt=p, seed=i, max_tokens=10 + 7 * i).choices[0].text for i, p in enumerate(prompts)]
    together = [""] * len(prompts)

    def ask(i: int) -> None:
        together[i] = create(client, prompt=prompts[i], seed=i, max_tokens=10 + 7 * i).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    both = create(client, prompt=["The", "12 345"], n=2, seed=0, max_tokens=10)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == alone[0]
    assert both.choices[0].text != both.choices[1].text
    ids = create(client, prompt=[1, 20, 30], temperature=0, max_tokens=4)
    assert ids.usage.prompt_tokens == 3


def test_a_session_goes_on_from_what_it_has_read(
    client: openai.OpenAI, server: tuple[str, Path], export: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    book = "The long short context. " * 5
    read = create(client, prompt=book, max_tokens=0, extra_body={"session": "book"})
    tokens = read.session["tokens"]
    assert tokens == read.usage.prompt_tokens
    first = create(client, prompt=" surprise", seed=1, max_tokens=9, extra_body={"session": "book"})
    second = create(client, prompt=" the wave", seed=2, max_tokens=9, extra_body={"session": "book"})
    assert first.usage.prompt_tokens < 8, "the book is not read again"
    assert second.session["tokens"] == tokens + first.usage.total_tokens + second.usage.total_tokens
    a, b = tmp_path / "a", tmp_path / "b"
    generated(capsys, export, "--prompt", book, "--max-new-tokens", 0, "--save-state", a)
    text = generated(
        capsys,
        export,
        "--load-state",
        a,
        "--prompt",
        " surprise",
        "--seed",
        1,
        "--max-new-tokens",
        9,
        "--save-state",
        b,
    )
    assert text == " surprise" + first.choices[0].text
    text = generated(capsys, export, "--load-state", b, "--prompt", " the wave", "--seed", 2, "--max-new-tokens", 9)
    assert text == " the wave" + second.choices[0].text

    for name in ("two", "three"):  # the server keeps two
        create(client, max_tokens=1, extra_body={"session": name})
    with pytest.raises(openai.ConflictError, match=r"'book' was dropped.*keeps 2") as gone:
        create(client, max_tokens=1, extra_body={"session": "book"})
    assert gone.value.code == "session_dropped"
    assert "session 'book' dropped" in server[1].read_text()
    assert client.delete("/sessions/book", cast_to=object) == {"id": "book", "object": "session", "deleted": True}
    anew = create(client, max_tokens=1, extra_body={"session": "book"})
    assert anew.session["tokens"] == anew.usage.total_tokens


def test_a_client_that_leaves_stops_the_writing_and_leaves_its_session(client: openai.OpenAI) -> None:
    """Greedy, where this model never draws the end of the text."""
    create(client, prompt="The wave", max_tokens=0, extra_body={"session": "left"})
    before = create(client, prompt="", max_tokens=0, extra_body={"session": "left"}).session["tokens"]
    stream = create(client, prompt=" and", temperature=0, max_tokens=60000, stream=True, extra_body={"session": "left"})
    next(stream)
    with pytest.raises(openai.ConflictError, match="in use by another request"):
        create(client, max_tokens=1, extra_body={"session": "left"})
    stream.close()
    with pytest.raises(openai.APITimeoutError):  # not streamed, and its client does not wait for the end
        client.with_options(timeout=0.5).completions.create(
            model="tiny", prompt="x", temperature=0, max_tokens=60000, extra_body={"session": "other"}
        )
    deadline = time.monotonic() + 10
    for name, tokens in (("left", before), ("other", 1)):
        while True:
            try:
                found = create(client, prompt="", max_tokens=0, extra_body={"session": name})
            except openai.ConflictError:
                assert time.monotonic() < deadline, "still writing for a client that left"
                time.sleep(0.05)
            else:
                assert found.session["tokens"] == tokens
                break


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": "other"}, "there is no model 'other'", "model"),
    ({"temperature": -1}, "temperature must be a number from 0 to 2", "temperature"),
    ({"temperature": True}, "temperature must be a number", "temperature"),
    ({"top_p": 0}, "top_p must be a number", "top_p"),
    ({"max_tokens": -1}, "max_tokens must be an integer", "max_tokens"),
    ({"max_tokens": 10**8}, "max_tokens must be an integer from 0 to 65536", "max_tokens"),
    ({"n": 0}, "n must be an integer", "n"),
    ({"n": 100, "prompt": ["a", "b"]}, "more than 128", "n"),
    ({"seed": -1}, "seed must be an integer", "seed"),
    ({"stop": ["a", ""]}, "stop must be", "stop"),
    ({"stop": ["a"] * 5}, "up to 4", "stop"),
    ({"prompt": [10**6]}, "token ids below 384", "prompt"),
    ({"prompt": "\ud800"}, "not valid Unicode", "prompt"),
    ({"prompt": []}, "prompt must be", "prompt"),
    ({"logprobs": 1}, "logprobs is not supported", "logprobs"),
    ({"best_of": 2}, "best_of is not supported", "best_of"),
    ({"suffix": "x"}, "suffix is not supported", "suffix"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    ({"min_p": 0.1}, "unknown field 'min_p'", "min_p"),
    ({"session": 5}, "session must be a text", "session"),
    ({"session": "a", "n": 2}, "goes on with one text", "session"),
    ({"echo": True, "prompt": [3, 4]}, "echo needs prompts of text", "echo"),
    ({"stream_options": {"x": 1}}, "stream_options may hold", "stream_options"),
]


def test_what_is_not_supported_is_refused_and_never_ignored(client: openai.OpenAI) -> None:
    def post(content: bytes | str, kind: str = "application/json") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", content, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    for body, message, param in BAD:
        status, answer = post(json.dumps({"model": "tiny", "prompt": "a", **body}))
        error = answer["error"]
        assert status == (404 if param == "model" else 400), body
        assert message in error["message"], body
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), body
    nothing = {"logprobs": None, "suffix": None, "best_of": 1, "presence_penalty": 0, "logit_bias": {}}
    assert post(json.dumps({"model": "tiny", "max_tokens": 1, **nothing}))[0] == 200
    assert post("{}", "text/plain")[0] == 415
    assert post("{")[0] == 400
    assert post("[1]")[1]["error"]["message"] == "the request must be a JSON object"


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model") as missing:
        create(client, model="gpt")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="not supported"):
        create(client, logprobs=2, stream=True)
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "titans_pretrain"
    for key in ("", "wrong", TOKEN + "x"):
        stranger = client.with_options(api_key=key or "-")
        with pytest.raises(openai.AuthenticationError, match="bearer token"):
            create(stranger)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.delete("/sessions/book", cast_to=object)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "there is no exported model at"),
        (["{export}", "--host", "0.0.0.0"], "can be reached from other machines and there is no token"),
        (["{export}", "--host", "::"], "there is no token"),
        (["{export}", "--batch", "0"], "--batch must be from 1"),
        (["{export}", "--port", "70000"], "--port must be"),
        (["{export}", "--token-file", "{none}"], "cannot read --token-file"),
        (["{export}", "--token-file", "{empty}"], "is empty"),
        (["{export}", "--port", "{taken}"], "cannot listen on 127.0.0.1 port"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"export": export, "none": tmp_path / "none", "empty": tmp_path / "empty"}
        places["taken"] = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            serve([a.format(**places) for a in arguments])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_missing_extra_is_a_sentence(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        serve([str(export)])
    assert "pip install 'titans_pretrain[serve]'" in capsys.readouterr().err
