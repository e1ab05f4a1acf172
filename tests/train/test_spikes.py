"""Bad steps: a batch that is really bad is skipped, rewound or stops the run, and the rest is as if it had never been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree
from titans_pretrain.config import FaultsConfig
from titans_pretrain.train.checkpoint import full_fp32_weights
from titans_pretrain.train.spikes import SpikeWatch

STEPS, BAD = 15, 12


def spiking_job(bad_step: int, how: str, *trees: dict[str, dict[str, Any]]) -> list[str | None]:
    """`train_job` by each config in turn, where the labels of one step are noise ("spike"), one weight is infinite while it is
    computed ("inf"), or neither."""
    from titans_pretrain.config import config_from_dict
    from titans_pretrain.errors import UserError
    from titans_pretrain.train.engine import Engine
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.loop import train
    from titans_pretrain.train.report import Reporter

    made, reported, place = Engine.forward_backward, Reporter.start, [0]

    def start(reporter: Reporter, progress: Any, *rest: Any) -> None:
        place[0] = progress.step
        reported(reporter, progress, *rest)

    def forward_backward(engine: Engine, tokens: Any, labels: Any, scale: float, *rest: Any) -> Any:
        place[0] += 1
        if place[0] == bad_step and how == "spike":
            labels = (labels * 7 + 3) % 61
        if place[0] == bad_step and how == "inf":
            scale = float("inf")
        return made(engine, tokens, labels, scale, *rest)

    Engine.forward_backward, Reporter.start = forward_backward, start  # type: ignore[method-assign]
    grid = join(find_environment(), "cpu")
    sentences: list[str | None] = []
    for tree in trees:
        try:
            train(config_from_dict(tree), grid)
            sentences.append(None)
        except UserError as error:
            sentences.append(str(error))
    return sentences


def tree(dataset: Path, folder: Path, name: str, **overrides: Any) -> dict[str, dict[str, Any]]:
    settings = {
        "model__variant": "transformer",
        "model__num_layers": 1,
        "run__name": name,
        "schedule__tokens": STEPS * 8 * SEQ_LEN,
        "faults__spike_window": 8,
        "faults__spike_sigma": 3,
        "checkpoint__interval": 5,
        "checkpoint__keep_last": 0,
        "optimizer__learning_rate": 3e-3,
    }
    return tiny_tree(dataset, folder, **{**settings, **overrides})


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return full_fp32_weights(folder / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_skipped_step_changes_nothing(stage: int, dataset: Path, tmp_path: Path) -> None:
    common = dict(engine__zero_stage=stage, checkpoint__interval=1)
    trees = [
        tree(dataset, tmp_path, "whole", faults__on_spike="skip", **common),
        tree(dataset, tmp_path, "pieces", faults__on_spike="skip", run__stop_after=BAD - 2, **common),
        tree(dataset, tmp_path, "pieces", faults__on_spike="skip", **common),
    ]
    assert run_distributed(spiking_job, 2, BAD, "spike", *trees) == [[None] * 3] * 2
    before, after = (weights_at(tmp_path / "whole", step) for step in (BAD - 1, BAD))
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = weights_at(tmp_path / "whole", BAD + 1)
    assert not all(torch.equal(moved[name], after[name]) for name in after)
    rows, again = (read_metrics(tmp_path / name) for name in ("whole", "pieces"))
    steps, pieces = ([row for row in r if "loss" in row or "skipped" in row] for r in (rows, again))
    assert [row["step"] for row in steps] == [row["step"] for row in pieces] == list(range(1, STEPS + 1))
    assert [row["step"] for row in steps if "skipped" in row] == [BAD]
    for mine, other in zip(steps, pieces, strict=True):
        for key in ("loss", "bad_loss", "grad_norm", "skipped", "tokens"):
            assert mine.get(key) == other.get(key), (mine["step"], key)
    fault = json.loads((tmp_path / "whole" / "faults.jsonl").read_text())
    assert (fault["kind"], fault["step"], fault["remedy"]) == ("spike", BAD, "skip")
    assert fault["samples"] == {"first": 8 * (BAD - 1), "count": 8, "by_source": {"0": 8}}


@pytest.mark.parametrize("stage", [1, 3])
def test_rewound_weights_are_the_checkpoints(stage: int, dataset: Path, tmp_path: Path) -> None:
    common = dict(engine__zero_stage=stage, faults__on_spike="rewind")
    trees = [
        tree(dataset, tmp_path, "whole", **common),
        tree(dataset, tmp_path, "pieces", run__stop_after=BAD + 1, **common),
        tree(dataset, tmp_path, "pieces", **common),
    ]
    assert run_distributed(spiking_job, 2, BAD, "spike", *trees) == [[None] * 3] * 2
    before, after = (weights_at(tmp_path / "whole", step) for step in (10, BAD))  # it saves after a rewind
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows, again = (
        [r for r in read_metrics(tmp_path / name) if "loss" in r or "skipped" in r] for name in ("whole", "pieces")
    )
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in again]
    assert "the weights are again those of step_00000010" in (tmp_path / "whole" / "log" / "rank_0.txt").read_text()


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_not_finite_is_skipped_if_asked(stage: int, dataset: Path, tmp_path: Path) -> None:
    common = dict(engine__zero_stage=stage, checkpoint__interval=1)
    trees = [
        tree(dataset, tmp_path, "skip", faults__on_not_finite="skip", **common),
        tree(dataset, tmp_path, "stop", **common),
        tree(dataset, tmp_path, "few", faults__on_not_finite="skip", faults__max_skips=0, **common),
    ]
    skip, stop, few = run_distributed(spiking_job, 2, 4, "inf", *trees)[0]
    assert skip is None
    before, after = (weights_at(tmp_path / "skip", step) for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = [row for row in read_metrics(tmp_path / "skip") if "tokens" in row and "valid_loss" not in row]
    assert [row["step"] for row in rows if "skipped" in row] == [4]
    assert stop is not None
    assert "gradient norm is" in stop
    assert few is not None
    assert "faults.max_skips=0" in few


def test_a_spike_stops_the_run_if_asked(dataset: Path, tmp_path: Path) -> None:
    stop = tree(dataset, tmp_path, "stop", faults__on_spike="stop")
    (sentence,) = run_distributed(spiking_job, 1, BAD, "spike", stop)[0]
    assert f"a spike (faults.spike_sigma) at step {BAD}" in sentence
    off = tree(dataset, tmp_path, "off")
    assert run_distributed(spiking_job, 1, BAD, "spike", off) == [[None]]


def test_the_threshold_is_robust() -> None:
    watch = SpikeWatch(FaultsConfig(on_spike="skip", spike_window=8, spike_sigma=5.0), [1.0, 1.1, 0.9])
    assert watch.threshold() == float("inf"), "less than half a window"
    watch.good(1.0)
    assert 1.2 < watch.threshold() < 1.5
    watch.good(40.0)
    assert watch.threshold() < 2.0, "one spike in the window does not hide the next"
    assert SpikeWatch(FaultsConfig(), [1.0] * 99).threshold() == float("inf"), "off"
