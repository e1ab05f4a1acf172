"""Does a run count with the right numbers, and is one that must not count left out by name, with the reason?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.scaling.points import study
from titans_pretrain.config import config_to_yaml
from titans_pretrain.errors import UserError
from titans_pretrain.scaling.collect import RATES, collect, largest_rise, read_points, read_rates, write
from titans_pretrain.scaling.grid import Grid, PlannedRun, make_grid
from titans_pretrain.scaling.study import Study


def rows_of(run: PlannedRun, start: float = 8.0, end: float = 4.0) -> list[dict[str, Any]]:
    """Metrics of a run that went well, its loss falling in a line."""
    steps, batch = run.config.num_steps, run.config.data.batch_tokens
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "valid_loss": start, "valid_perplexity": 1.0}]
    for step in range(1, steps + 1):
        loss = start + (end - start) * step / steps
        row = {"step": step, "tokens": step * batch, "loss": loss, "grad_norm": 1.0, "seconds": 2.0}
        rows.append({**row, "tokens_per_second": batch / 2, "tflops": 30.0, "mfu": 0.3})
    rows.insert(len(rows) - 1, {"step": steps - 1, "checkpoint_step": steps - 1})
    return [*rows, {"step": steps, "tokens": steps * batch, "valid_loss": end + 0.1, "valid_perplexity": 1.0}]


def put(run: PlannedRun, rows: list[dict[str, Any]]) -> None:
    folder = run.config.run_dir
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def six_runs(folder: str | Path, **changes: Any) -> Study:
    dial = {"layers": [1, 2, 3], "aspect": 32, "head_dim": 16}
    return study(dir=str(folder), budgets={"tokens": [40960, 81920]}, dial=dial, **changes)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Study, Grid]:
    given = six_runs(tmp_path)
    return given, make_grid(given, 0)


def test_a_finished_run_is_a_point(small: tuple[Study, Grid]) -> None:
    given, grid = small
    run = grid.points[3]
    put(run, rows_of(run))
    found = collect(given, grid)
    assert [point.run for point in found.points] == [run.name]
    point = found.points[0]
    steps = run.config.num_steps
    assert point.loss == point.valid_loss == 4.1
    assert point.train_loss == pytest.approx(4.0 + 4.0 * 4.5 / steps), "the mean of the last ten"
    assert (point.tokens, point.parameters) == (run.tokens, run.counts)
    assert point.flops == run.flops
    assert (point.seconds, point.tokens_per_second) == (2.0 * steps, run.tokens / (2.0 * steps))
    assert (point.mfu, point.peak_tflops) == (pytest.approx(0.3), pytest.approx(100.0))
    assert len(found.left_out) == 5
    assert set(found.left_out.values()) == {"not started: no metrics.jsonl"}
    by_training = six_runs(given.dir, collect={"loss": "train", "last": 2})
    assert collect(by_training, grid).points[0].loss == pytest.approx(4.0 + 4.0 * 0.5 / steps)


def test_runs_are_left_out_by_name(small: tuple[Study, Grid]) -> None:
    given, grid = small
    names = [run.name for run in grid.points]
    spiked = rows_of(grid.points[0])
    for row in spiked[15:26]:
        if "loss" in row:
            row["loss"] += 3.0
    put(grid.points[0], spiked)
    broken = rows_of(grid.points[1])
    broken[-2]["loss"] = math.nan
    put(grid.points[1], broken)
    skipping = rows_of(grid.points[2])
    skipping[5] = {"step": 5, "tokens": skipping[5]["tokens"], "bad_loss": 99.0, "skipped": 1}
    put(grid.points[2], skipping)
    put(grid.points[3], rows_of(grid.points[3])[:-6])
    put(grid.points[4], rows_of(grid.points[4])[:9])
    (grid.points[4].config.run_dir / "FAILED").write_text("2026-01-01 the loss is nan at step 9: it overflowed\n")
    put(grid.points[5], rows_of(grid.points[5])[:-1])
    found = collect(given, grid)
    assert found.points == ()
    why = found.left_out
    assert why[names[0]].startswith("diverged: the loss rose by 0.6")
    assert why[names[1]] == f"diverged: loss is nan at step {grid.points[1].config.num_steps}"
    assert why[names[2]] == "diverged: 1 bad steps were skipped"
    assert why[names[3]].startswith("incomplete: step ")
    assert why[names[4]].startswith("diverged: step 8 of ")
    assert "the loss is nan at step 9" in why[names[4]]
    assert why[names[5]].startswith("incomplete: the validation loss of the last step")


def test_a_run_of_other_settings_is_no_point(small: tuple[Study, Grid]) -> None:
    """Else a study whose YAML was edited would mix two studies."""
    given, grid = small
    for run in grid.points:
        put(run, rows_of(run))
    changed = six_runs(
        given.dir,
        overrides=["model.vocab_size=4096", "cluster.gpus_per_node=0", "optimizer.weight_decay=0", "log.interval=3"],
    )
    found = collect(changed, make_grid(changed, 0))
    assert found.points == ()
    assert set(found.left_out.values()) == {
        "trained with other settings than the study has: optimizer.weight_decay is 0.1 in the run, 0.0 in the study"
    }
    assert len(collect(given, grid).points) == 6


def test_a_last_line_cut_short_is_no_damage(small: tuple[Study, Grid]) -> None:
    given, grid = small
    put(grid.points[0], rows_of(grid.points[0]))
    path = grid.points[0].config.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 1')
    assert len(collect(given, grid).points) == 1
    path.write_text('{"step": 1\n' + path.read_text())
    assert collect(given, grid).left_out[grid.points[0].name] == "metrics.jsonl is damaged in line 1"


def test_points_are_written_and_read(small: tuple[Study, Grid]) -> None:
    given, grid = small
    put(grid.points[0], rows_of(grid.points[0]))
    found = collect(given, grid)
    json_file, csv_file = write(given, found)
    assert read_points(json_file) == found
    lines = csv_file.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"{grid.points[0].name},mag,l1,41k,False,40960,")
    json_file.write_text("{}")
    with pytest.raises(UserError, match=r"is not what `collect` writes"):
        read_points(json_file)


def test_the_sweep_settles_the_rate(tmp_path: Path) -> None:
    sweep = {"values": [1e-3, 3e-3, 1e-2], "sizes": 2}
    given = study(dir=str(tmp_path), budgets={"tokens": [40960, 81920]}, learning_rate={"sweep": sweep})
    grid = make_grid(given, 0)
    ends = {1e-3: (5.0, 4.0), 3e-3: (4.2, 4.1), 1e-2: (3.0, 3.0)}
    for run in grid.sweep[:-1]:
        put(run, rows_of(run, end=ends[run.base][int(run.size == "l2")]))
    assert collect(given, grid).rates == {}, "one run is missing"
    last = grid.sweep[-1]
    put(last, [*rows_of(last)[:9], {"step": 9, "tokens": 0, "loss": math.inf, "grad_norm": 1.0, "seconds": 1.0}])
    found = collect(given, grid)
    assert found.rates["mag"]["base"] == 3e-3, "the lowest mean of both sizes, and what diverged is out"
    assert found.rates["mag"]["losses"]["0.01"].startswith("diverged")
    assert {point.run for point in found.points} == {"mag-l1-41k-lr0.003", "mag-l2-41k-lr0.003"}
    assert len(found.swept) == 5
    write(given, found)
    assert read_rates(given)["mag"]["base"] == 3e-3
    changed = {**json.loads((given.folder / RATES).read_text())["mag"], "base": 1e-3}
    (given.folder / RATES).write_text(json.dumps({"mag": changed}))
    again = collect(given, grid)
    assert again.rates["mag"] == changed, "what is settled stays"
    assert {point.run for point in again.points} == {"mag-l1-41k-lr0.001", "mag-l2-41k-lr0.001"}
    (given.folder / RATES).write_text('{"mag": {"base": 0.5}}')
    with pytest.raises(UserError, match=r"settles 0.5 for mag, which is not in learning_rate.sweep.values"):
        read_rates(given)


def test_a_winner_at_the_edge_is_warned_of(tmp_path: Path) -> None:
    given = study(dir=str(tmp_path), budgets={"tokens": [40960]}, learning_rate={"sweep": {"values": [1e-3, 3e-3]}})
    grid = make_grid(given, 0)
    for run in grid.sweep:
        put(run, rows_of(run, end=5 - 100 * run.base))
    assert "is the largest value tried" in collect(given, grid).rates["mag"]["warning"]


def test_rise_is_over_the_lowest_mean_before() -> None:
    def steps(losses: list[float]) -> list[dict[str, Any]]:
        return [{"step": number, "loss": loss} for number, loss in enumerate(losses, 1)]

    assert largest_rise(steps([5, 4, 3, 3, 3]), 1) == (0.0, 0)
    assert largest_rise(steps([5, 3, 4, 5, 2]), 1) == (2.0, 4)
    assert largest_rise(steps([5, 3, 4, 5, 2]), 2) == (1.0, 4)
    assert largest_rise([], 10)[0] == 0
