"""Does the summary of a run say what its metrics hold?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from titans_pretrain.config import config_to_yaml, load_config
from titans_pretrain.data.manifest import Manifest, SplitEntry, write_manifest
from titans_pretrain.errors import UserError
from tools import summarize_run


def make_run(folder: Path, *, steps: int = 20, evaluations: int = 2) -> Path:
    """A run folder as training leaves it: losses fall by 0.1 a step from 8."""
    run = folder / "runs" / "small"
    run.mkdir(parents=True)
    empty = SplitEntry(0, 0, 0, ())
    data = folder / "data"
    data.mkdir()
    write_manifest(data, Manifest("uint16", 64, "0", 1, 2, 3.25, {}, {"train": empty, "valid": empty}))
    overrides = [f"data.path={data}", "data.seq_len=512", "data.batch_tokens=1024", "schedule.tokens=40960"]
    (run / "config.yaml").write_text(config_to_yaml(load_config(None, overrides)))
    rows: list[dict[str, float]] = [{"step": 0, "tokens": 0, "valid_loss": 8.0, "valid_loss_x8": 8.5}]
    rows += [
        {"step": n, "tokens": 1024 * n, "loss": 8.1 - 0.1 * n, "seconds": 0.5, "grad_norm": 1.0}
        for n in range(1, steps + 1)
    ]
    if evaluations > 1:
        rows.append({"step": steps, "tokens": 1024 * steps, "valid_loss": 5.0, "valid_loss_x8": 5.5})
        rows.append({"step": steps, "checkpoint_step": steps, "checkpoint_bytes": 1000})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "tensorboard").mkdir()
    return run


def test_summary_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    summarize_run.main([str(run)])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " x8" not in line)
    assert told["run"] == str(run)
    assert "unigram entropy 3.250 nats" in told["data"]
    assert told["progress"] == "step 20 of 40, 20,480 tokens"
    # the last ten losses run from 7.0 to 6.1
    assert told["training"].startswith("loss    8.000 -> 6.550 nats per token")
    assert "last 10" in told["training"]
    assert told["speed"].startswith("2,048 tokens/s over 10 s")
    assert f"8.000 -> 5.000 nats per token, perplexity {math.exp(5):,.1f} at step 20" in told["validation"]
    assert told["TensorBoard"].endswith(f"tensorboard --logdir {run}/tensorboard")
    assert ("validation x8", "8.500 -> 5.500 nats per token, perplexity 244.7 at step 20") in summarize_run.summarize(
        run
    )


def test_a_run_under_way_is_fine(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3, evaluations=1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "to')
    told = dict(summarize_run.summarize(run))
    assert told["progress"].startswith("step 3 of 40")
    assert "mean of the last 3" in told["training loss"]
    assert told["validation"].startswith("8.000 -> 8.000")


def test_before_the_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=0, evaluations=1)
    assert [subject for subject, _ in summarize_run.summarize(run)] == [
        "run",
        "model",
        "data",
        "validation",
        "validation x8",
        "TensorBoard",
    ]


def test_data_that_is_gone_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "data" / "index.json").unlink()
    assert "unigram entropy is unknown" in dict(summarize_run.summarize(run))["data"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl.*run folder"):
        summarize_run.summarize(tmp_path)
    run = make_run(tmp_path)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 8.0', '"loss": 8..0', 1))
    with pytest.raises(UserError, match="line 2 is damaged"):
        summarize_run.summarize(run)


def test_a_mixture_tells_of_each_source(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = tmp_path / "data"
    overrides = [f"data.sources=[{{path: {data}, weight: 3}}, {{path: {data}, name: code}}]", "data.seq_len=512"]
    ramp = ["data.batch_tokens=1024", "data.batch_ramp=[{tokens: 30000, batch_tokens: 2048}]", "schedule.tokens=40960"]
    (run / "config.yaml").write_text(config_to_yaml(load_config(None, overrides + ramp)))
    with open(run / "metrics.jsonl", "a") as file:
        step = {"step": 21, "tokens": 21504, "loss": 6.0, "seconds": 1.0, "tokens_per_second": 1024}
        counts = {"tokens/data": 16128, "tokens/code": 5376, "epochs/data": 1.5, "epochs/code": 0.25}
        file.write(json.dumps(step | counts) + "\n")
        file.write(json.dumps({"step": 21, "tokens": 21504, "valid_loss": 4.0, "valid_loss/code": 3.0}) + "\n")
    told = dict(summarize_run.summarize(run))
    assert told["data"] == f"{data}, {data}, unigram entropy 3.250 nats per token"
    assert told["progress"] == "step 21 of 35, 21,504 tokens"
    assert told["source data"] == "16,128 tokens, 75.0%, 1.50 epochs"
    assert told["source code"] == "5,376 tokens, 25.0%, 0.25 epochs"
    assert told["validation code"].startswith("3.000 nats per token")
    assert told["speed"].startswith("1,955 tokens/s")
