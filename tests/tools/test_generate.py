"""Does the command stream text as it is written, repeat with a seed, and say in one sentence what a user got wrong?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.tiny import tiny_export
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Generation
from titans_pretrain.inference.sampling import SamplingOptions
from tools.generate import main

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "generate.py"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "export"
    tiny_export(folder, tokenizer_file, "mag")
    return folder


def written(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_prints_prompt_and_what_the_model_writes(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = written(
        capsys,
        export,
        "--prompt",
        "The memory",
        "--max-new-tokens",
        40,
        "--seed",
        5,
        "--temperature",
        0.7,
        "--top-k",
        200,
        "--top-p",
        0.9,
    )
    model, tokenizer, _ = load_export(export)
    prompt = tokenizer.encode("The memory")
    options = SamplingOptions(0.7, 200, 0.9)
    ids = list(Generation(model, prompt, max_new_tokens=40, options=options, seed=5, eos_id=tokenizer.eos_id))
    assert out == tokenizer.decode([*prompt, *ids]) + "\n"
    assert re.search(
        rf"prompt: {len(prompt)} tokens in .* written: {len(ids)} tokens .* tokens/s .*state: [\d,]+ bytes", err
    )


def test_seed_and_greedy(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*arguments: object) -> str:
        return written(capsys, export, "--max-new-tokens", 30, *arguments)[0]

    assert text("--seed", 1) == text("--seed", 1)
    assert text("--seed", 1) != text("--seed", 2)
    assert text("--temperature", 0, "--seed", 1) == text("--temperature", 0, "--seed", 2)


def test_read_a_book_once_and_ask_later(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state after a text, and a question from the file, write what text and question in one process do."""
    book = "The memory learns. " * 9
    (tmp_path / "book.txt").write_text(book)
    saved = tmp_path / "book.state"
    draws = ("--temperature", 1.3, "--seed", 4, "--max-new-tokens", 30)
    _, err = written(
        capsys, export, "--prompt-file", tmp_path / "book.txt", "--max-new-tokens", 0, "--save-state", saved
    )
    assert re.search(r"book.state: the state after \d+ tokens, [\d,]+ bytes", err)
    before = saved.read_bytes()
    whole, _ = written(capsys, export, "--prompt", book + " surprise", *draws)
    later, _ = written(capsys, export, "--load-state", saved, "--prompt", " surprise", *draws)
    assert book + later == whole
    assert saved.read_bytes() == before
    # What was written is part of what is read next: a text written in two parts is one text.
    (tmp_path / "half").mkdir()
    half = tmp_path / "half" / "state"
    first, _ = written(
        capsys, export, "--load-state", saved, "--max-new-tokens", 10, "--temperature", 0, "--save-state", half
    )
    second, _ = written(capsys, export, "--load-state", half, "--max-new-tokens", 10, "--temperature", 0)
    both, _ = written(capsys, export, "--load-state", saved, "--max-new-tokens", 20, "--temperature", 0)
    assert first[:-1] + second == both


def test_stop_strings_end_the_text_before_them(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = ("--prompt", "The", "--seed", 3, "--max-new-tokens", 60)
    whole, _ = written(capsys, export, *draws)
    stop = whole[25:29]
    out, err = written(capsys, export, *draws, "--stop", "never in it", "--stop", stop)
    assert out == "The" + whole[3:][: whole[3:].index(stop)] + "\n"
    assert "(--stop)" in err


def test_many_prompts_write_what_each_writes_alone(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The memory", "", "a river of stone and the wave", "12", "surprise forgets café"]
    (tmp_path / "prompts").write_text("\n".join(texts) + "\n")
    draws = ("--max-new-tokens", 25, "--temperature", 0.9)
    out, err = written(capsys, export, "--prompts", tmp_path / "prompts", "--batch", 2, "--seed", 7, *draws)
    found = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert sorted(found) == list(range(len(texts)))
    for i, text in enumerate(texts):
        alone, _ = written(capsys, export, "--prompt", text, "--seed", 7 + i, *draws)
        assert found[i]["prompt"] + found[i]["text"] + "\n" == alone
        assert found[i]["ended"] in ("length", "eos")
    assert re.search(r"5 prompts of \d+ tokens; written: \d+ tokens", err)


def test_prompt_file_is_taken_as_it_is(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "  two lines\r\nand 😀 no more\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    out, _ = written(capsys, export, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 0)
    assert out == text + "\n"
    assert written(capsys, export, "--max-new-tokens", 0)[0] == "\n"


BAD = {
    "no export": (["{none}"], "there is no exported model at"),
    "temperature": (["{export}", "--temperature", "-1"], "temperature"),
    "top_k": (["{export}", "--top-k", "-1"], "top_k"),
    "top_p": (["{export}", "--top-p", "0"], "top_p"),
    "length": (["{export}", "--max-new-tokens", "-1"], "--max-new-tokens"),
    "seed": (["{export}", "--seed", "-1"], "--seed"),
    "threads": (["{export}", "--threads", "-1"], "--threads"),
    "surrogate": (["{export}", "--prompt", "ab\udcff"], "not valid Unicode"),
    "no prompt file": (["{export}", "--prompt-file", "{none}"], "cannot read --prompt-file"),
    "batch": (["{export}", "--batch", "0"], "--batch"),
    "empty stop": (["{export}", "--stop", ""], "--stop"),
    "state of a batch": (["{export}", "--prompts", "{none}", "--load-state", "{none}"], "not for --prompts"),
    "no folder": (["{export}", "--save-state", "{none}/a"], "there is no folder"),
    "no state": (["{export}", "--load-state", "{none}"], "there is no state at"),
    "not a state": (["{export}", "--load-state", "{export}/model.safetensors"], "is not a state written by"),
    "not utf-8": (["{export}", "--prompt-file", "{latin}"], "not UTF-8 text: byte 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    places = {"export": export, "none": tmp_path / "none", "latin": tmp_path / "latin"}
    arguments, message = BAD[name]
    with pytest.raises(SystemExit) as exit_:
        main([a.format(**places) for a in arguments])
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_streams_and_ends_quietly_when_the_reader_leaves(export: Path) -> None:
    """As `generate.py ... | head -c 20`: text arrives while the model still writes, and the closed pipe is no crash.

    The 600 tokens fit into Python's buffer: without a flush per token they would all come at the end.
    """
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(SCRIPT.parent.parent),
        PYTHONIOENCODING="ascii",
        PYTHONUNBUFFERED="",
    )
    command = [
        sys.executable,
        str(SCRIPT),
        str(export),
        "--prompt",
        "é",
        "--max-new-tokens",
        "600",
        "--temperature",
        "2",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        beginning = b""
        while len(beginning) < 20:
            received = process.stdout.read(20)
            assert received
            beginning += received
        assert beginning.startswith(b"?")  # an encoding without é loses the letter, not the program
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in error
    assert "output closed" in error
