"""Does the benchmark measure what it says, find a wrong path, and tell in words what cannot run?"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.cost import scan_tile_flops
from tools import benchmark_check, benchmark_memory, benchmark_operators
from tools.benchmark_measure import Settings, explain, measure, measure_here
from tools.benchmark_memory import main
from tools.benchmark_operators import Row, memory_flops, memory_inputs

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "benchmark_memory.py"
TINY = ["--device", "cpu", "--dim", "16", "--head-dim", "8", "--hidden", "12", "--chunk", "4"]
ROW = Row("memory", 1, 10, 2, 8, "fp32", hidden=12, chunk=4, path="auto")
HERE = Settings("cpu", threads=1, repeats=2, warm_up=0, memory_limit=0, timeout=60)


@pytest.fixture(autouse=True)
def one_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product that takes no time."""
    monkeypatch.setitem(benchmark_memory.MATMUL, "cpu", Row("matmul", 1, 64, 1, 1, "fp32"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows measured without a process of their own, which costs seconds; what may be missing still says so."""

    def measured(row: Row, settings: Settings) -> dict[str, Any]:
        package = benchmark_operators.missing_package(row)
        if package is not None:
            return {"words": f"not installed (pip install {package})"}
        try:
            return measure_here(row, replace(settings, memory_limit=0))
        except Exception as error:
            return {"words": explain(error)}

    monkeypatch.setattr(benchmark_memory, "measure", measured)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 1
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ table


def test_the_command_measures_rows_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--tokens", "10", "--repeats", "2", "--threads", "1"]
    command += ["--paths", "closed_form", "--peers", "none", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peak resident memory of the row's own process" in done.stdout
    told = json.loads(file.read_text())
    assert told["device"] == "cpu"
    assert told["device_name"]
    assert (
        told["versions"]["torch"] == torch.__version__.split("+")[0] or told["versions"]["torch"] == torch.__version__
    )
    assert told["settings"]["chunk"] == [4]
    assert [row["operator"] for row in told["rows"]] == ["matmul", "memory"]
    memory = told["rows"][1]
    assert f"| {memory['setting']} " in done.stdout
    assert memory["setting"] == "2 x 8, h 12, C 4, closed_form, fp32, T 10, B 1"
    assert 0 < memory["forward_ms"] < memory["total_ms"]
    assert len(memory["total_all_ms"]) == 2
    assert memory["mtok_s"] == pytest.approx(10 / memory["total_ms"] / 1e3)
    assert 0 <= memory["peak_gib"] < 0.1
    ours = replace(ROW, path="closed_form")
    assert memory["tflops"] == pytest.approx(memory_flops(ours) / memory["total_ms"] / 1e9)
    assert memory["percent_of_matmul"] == pytest.approx(100 * memory["tflops"] / told["rows"][0]["tflops"])


@pytest.mark.usefixtures("in_process")
def test_what_cannot_run_says_so_in_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        benchmark_operators.importlib.util,
        "find_spec",
        lambda name: None if name in ("fla", "titans_pytorch") else find_spec(name),
    )
    file = tmp_path / "table.json"
    main([*TINY, "--tokens", "8", "--repeats", "1", "--paths", "auto", "triton", "--json", str(file)])
    out = capsys.readouterr().out
    assert "not installed (pip install flash-linear-attention)" in out
    assert "not installed (pip install titans-pytorch)" in out
    rows = json.loads(file.read_text())["rows"]
    triton = next(row for row in rows if row["path"] == "triton")
    assert "total_ms" in triton or "triton" in triton["words"]
    assert {row["operator"] for row in rows if "total_ms" in row} >= {"matmul", "memory", "attention", "dense"}


@pytest.mark.usefixtures("in_process")
def test_a_long_sequence_is_measured_at_three_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--long", "--tokens", "64", "--repeats", "1", "--paths", "auto"])
    out = capsys.readouterr().out
    assert [f"T {tokens}, B 1" in out for tokens in (16, 32, 64)] == [True] * 3
    assert out.count("twice the tokens take") == 2
    assert "attention" not in out


def test_a_row_out_of_memory_or_time_or_dead_is_words(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Row("matmul", 1, 30_000, 1, 1, "fp32")  # 3.4 GiB a matrix
    assert measure(large, replace(HERE, memory_limit=1.5))["words"] == "out of memory"
    assert measure(ROW, replace(HERE, timeout=0.01))["words"] == "not done after 0.01 s (--timeout)"
    assert explain(MemoryError()) == "out of memory"
    assert explain(RuntimeError("first\nsecond")) == "cannot run: RuntimeError: first"


def test_flops_are_those_of_the_cost_model() -> None:
    config = ModelConfig(variant="lmm", dim=16, num_heads=2, memory_expansion=1.5, memory_chunk=4)
    one = [scan_tile_flops(config, [(8, 12), (12, 8)], tile) for tile in (4, 4, 2)]
    assert memory_flops(ROW) == 3 * 2 * sum(one)
    long = replace(ROW, tokens=200, chunk=100)  # each chunk is a tile of 64 and one of 36
    assert memory_flops(long) == 3 * 2 * 2 * sum(scan_tile_flops(config, [(8, 12), (12, 8)], tile) for tile in (64, 36))


def test_inputs_are_those_of_a_model_at_its_start() -> None:
    inputs = memory_inputs(Row("memory", 1, 500, 2, 32, "bf16", hidden=64, chunk=16), torch.device("cpu"))
    assert inputs["q"].float().norm(dim=-1).mean().item() == pytest.approx(1, abs=0.01)
    assert inputs["k"].dtype is torch.bfloat16
    assert inputs["theta"].dtype is torch.float32
    assert -torch.expm1(inputs["log_gamma"]).mean().item() == pytest.approx(0.0025, rel=0.1)
    assert inputs["log_eta"].exp().mean().item() == pytest.approx(0.5, rel=0.05)
    assert inputs["theta"].mean().item() == pytest.approx(0.25 / 32, rel=0.05)
    assert inputs["W1"].float().std().item() == pytest.approx(1, rel=0.05)
    assert inputs["W2"].float().std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert all(x.requires_grad and x.is_leaf for x in inputs.values())


# ------------------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check_passes_and_writes_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    file = tmp_path / "check.json"
    lengths = ["--lengths", "7", "12", "130"]  # the last is beyond what the token loop judges
    main([*TINY, "--check", "--dtype", dtype, "--paths", "auto", "reference", *lengths, "--json", str(file)])
    assert "6 of 6 comparisons passed" in capsys.readouterr().out
    results = json.loads(file.read_text())["check"]
    assert [result["tokens"] for result in results] == [7, 7, 12, 12, 130, 130]
    names = ["out", "q", "k", "v", "log_gamma", "log_eta", "theta", "W1", "W2", "norm_weight", "norm_bias"]
    assert all(list(result["errors"]) == names for result in results)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_check_fails_when_a_path_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    scan = benchmark_check.scan

    def off(inputs: dict[str, torch.Tensor], chunk: int, path: str) -> torch.Tensor:
        return scan(inputs, chunk, path) * (factor if path == "closed_form" else 1.0)

    monkeypatch.setattr(benchmark_check, "scan", off)
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--check", "--paths", "reference", "closed_form", "--lengths", "6"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "1 of 2 comparisons passed" in out
    assert out.count("WRONG") == 1


def test_check_of_no_path_that_runs_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_memory, "check", lambda row, paths, device: [{"path": "triton", "words": "no"}])
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--check", "--paths", "triton", "--lengths", "6"])
    assert stop.value.code == 1
    assert "0 of 0 comparisons passed" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--check", "--long"], "--check and --long are two tasks"),
        (["--lengths", "5"], "--lengths belongs to --check"),
        (["--paths", "reference"], "one autograd call a token"),
        (["--peers", "none", "dense"], "--peers takes all, none or names"),
        (["--tokens", "0"], "--tokens must be 1 or more, not 0"),
        (["--hidden", "8", "-1"], "--hidden must be 1 or more"),
        (["--heads", "3", "--head-dim", "8", "--dim", "16"], "--heads 3 times --head-dim 8 is 24, not --dim 16"),
        (["--heads", "0"], "--heads must be 1 or more"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--long", "--tokens", "30"], "--tokens 30 is not a multiple of 4"),
        (["--repeats", "0"], "--repeats must be 1 or more"),
        (["--timeout", "0"], "--timeout must be more than 0"),
    ],
)
def test_bad_arguments_get_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    error = refused(capsys, "--device", "cpu", *arguments)
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no GPU here" in refused(capsys, "--device", "cuda")


def test_two_of_dim_heads_and_head_dim_give_the_third() -> None:
    def shape(*arguments: str) -> tuple[int, int, int]:
        args = benchmark_memory.resolve(benchmark_memory.parse(["--device", "cpu", *arguments]))
        return args.dim, args.heads, args.head_dim

    assert shape() == (384, 4, 96)
    assert shape("--dim", "192") == (192, 2, 96)
    assert shape("--heads", "2", "--head-dim", "16") == (32, 2, 16)
    assert shape("--dim", "64", "--heads", "4") == (64, 4, 16)
