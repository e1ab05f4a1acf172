"""Do the runs of a grid have the sizes, tokens, batches, rates and costs that the study asks for?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.scaling.points import study
from titans_pretrain.config import config_from_dict, config_to_dict
from titans_pretrain.errors import UserError
from titans_pretrain.model import Titans
from titans_pretrain.model.cost import flops_per_token
from titans_pretrain.scaling.fit import check_points
from titans_pretrain.scaling.grid import all_series, counts, make_grid, short
from titans_pretrain.scaling.study import read_study

STUDIES = sorted((Path(__file__).resolve().parents[2] / "configs" / "scaling").glob("*.yaml"))


def test_flop_budgets_are_met_and_configs_are_whole() -> None:
    grid = make_grid(study(variants={"mag": ["model.variant=mag"], "full": ["model.variant=transformer"]}), 0)
    assert len(grid.points) == 2 * 4 * 3
    assert len({run.name for run in grid.runs}) == len(grid.runs)
    for run in grid.points:
        config = run.config
        step = run.flops_per_token * config.data.batch_tokens
        assert abs(run.flops - float(run.budget)) <= step / 2
        assert run.flops_per_token == flops_per_token(config.model, config.data.seq_len)
        assert run.tokens == config.schedule.tokens, "whole steps: nothing overshoots"
        assert config_from_dict(config_to_dict(config)) == config
        assert str(config.run_dir) == f"runs/scaling/known/{run.name}"
        assert config.model.dim == 32 * config.model.num_layers


def test_token_budgets_and_multiples_of_parameters() -> None:
    for run in make_grid(study(budgets={"tokens": [1e5, 2e5]}), 0).points:
        assert abs(run.tokens - {"100k": 1e5, "200k": 2e5}[run.budget]) <= run.config.data.batch_tokens / 2
    for count in ("non_embedding", "total"):
        for run in make_grid(study(budgets={"tokens_per_parameter": [2, 20]}, count=count), 0).points:
            assert run.tokens == pytest.approx(float(run.budget[:-1]) * run.counts[count], rel=0.1)


@pytest.mark.parametrize("variant", ["mag", "lmm", "mac", "mal", "transformer"])
def test_parameters_are_counted_three_ways(variant: str) -> None:
    model = (
        make_grid(study(variants={"v": [f"model.variant={variant}", "model.memory_depth=3"]}), 0).points[0].config.model
    )
    with torch.device("meta"):
        named = dict(Titans(model).named_parameters())

    def count(without: tuple[str, ...]) -> int:
        return sum(p.numel() for name, p in named.items() if not any(part in name for part in without))

    found = counts(model)
    assert found["total"] == count(())
    assert found["non_embedding"] == count(("embedding", "head."))
    assert found["without_memory_init"] == count(("embedding", "head.", "initial_weights"))
    assert (found["without_memory_init"] < found["non_embedding"]) == (variant != "transformer")


def test_axes_make_series_of_their_own() -> None:
    given = study(axes={"model.memory_chunk": [16, 64], "model.memory_momentum": [True, False]})
    assert [series.name for series in all_series(given)] == [
        f"mag-memory_chunk{chunk}-memory_momentum{on}" for chunk in (16, 64) for on in ("true", "false")
    ]
    run = make_grid(given, 0).points[-1]
    assert (run.config.model.memory_chunk, run.config.model.memory_momentum) == (64, False)


def test_rules_set_batch_and_rate() -> None:
    grid = make_grid(
        study(
            batch={"tokens": 4096, "reference": 1e6, "exponent": 0.5},
            learning_rate={"base": 1e-3, "by": "dim", "reference": 64, "exponent": 1},
            overrides=["model.vocab_size=4096", "cluster.gpus_per_node=2", "data.micro_batch=2"],
        ),
        0,
    )
    for run in grid.points:
        unit = run.config.data.seq_len * 2 * 2
        assert run.config.data.batch_tokens % unit == 0
        assert run.config.optimizer.learning_rate == pytest.approx(1e-3 * 64 / run.config.model.dim, rel=1e-3)
        wanted = 4096 * (float(run.budget) / run.flops_per_token / 1e6) ** 0.5
        assert abs(run.config.data.batch_tokens - max(wanted, unit)) <= unit / 2


def test_a_sweep_runs_at_the_smallest_sizes_and_its_winner_is_the_point() -> None:
    given = study(
        learning_rate={
            "by": "dim",
            "reference": 32,
            "exponent": 0.5,
            "sweep": {"values": [1e-3, 3e-3, 1e-2], "sizes": 2},
        }
    )
    grid = make_grid(given, 0)
    assert grid.undecided == ("mag",)
    assert {(run.size, run.budget) for run in grid.sweep} == {("l1", "1e12"), ("l2", "1e12")}
    assert [run.config.optimizer.learning_rate for run in grid.sweep if run.size == "l1"] == [1e-3, 3e-3, 1e-2]
    assert grid.sweep[-1].config.optimizer.learning_rate == pytest.approx(1e-2 / 2**0.5, rel=1e-3), (
        "by the rule there too"
    )
    assert len(grid.points) == 12 - 2
    settled = make_grid(given, 0, {"mag": 1e-2})
    assert settled.undecided == ()
    assert len(settled.points) == 12
    assert [run.name for run in settled.points if run.swept] == ["mag-l1-1e12-lr0.01", "mag-l2-1e12-lr0.01"]
    assert {run.base for run in settled.points} == {1e-2}
    assert len(settled.runs) == 6 + 10


def test_what_cannot_be_is_told() -> None:
    falling = {"large": ["model.dim=64"], "small": ["model.dim=32", "model.num_heads=2"]}
    with pytest.raises(UserError, match=r"smallest first, but for mag small has .* and large"):
        make_grid(study(sizes=falling), 0)
    with pytest.raises(UserError, match=r"model.vocab_size is 0 and there is no data"):
        make_grid(study(overrides=[]), 0)
    with pytest.raises(UserError, match=r"data.batch_tokens|data-parallel ranks"):
        make_grid(study(overrides=["model.vocab_size=64", "cluster.gpus_per_node=3"]), 0)
    assert make_grid(study(overrides=["cluster.gpus_per_node=0"]), 4096).points[0].config.model.vocab_size == 4096


def test_runs_of_too_few_or_too_many_tokens_are_not_made() -> None:
    every = make_grid(study(), 0).points
    kept = make_grid(study(budgets={"flops": [1e12, 1e13, 1e14], "within": [2, 50]}), 0).points
    ratios = {run.name: float(run.budget) / run.flops_per_token / run.counts["non_embedding"] for run in every}
    assert [run.name for run in kept] == [run.name for run in every if 2 <= ratios[run.name] <= 50]
    assert 3 < len(kept) < len(every)
    with pytest.raises(UserError, match=r"budgets.within shuts out every size"):
        make_grid(study(budgets={"flops": [1e12], "within": [1e5, 1e6]}), 0)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_grids_of_the_studies_here(path: Path) -> None:
    given = read_study(path)
    assert given.learning_rate.sweep is not None
    assert make_grid(given, 4096).undecided == tuple(given.variants)
    settled = make_grid(given, 4096, dict.fromkeys(given.variants, given.learning_rate.sweep.values[0]))
    for series in given.variants:
        mine = [run for run in settled.points if run.series == series]
        n, d = [run.counts[given.count] for run in mine], [run.tokens for run in mine]
        check_points(n, d, [3.0] * len(mine), series)


def test_short_numbers() -> None:
    def all_of() -> Iterator[str]:
        for number in (999.6, 64_000, 1_500_000, 15e9, 2e12, 42):
            yield short(number)

    assert list(all_of()) == ["1k", "64k", "1.5M", "15B", "2T", "42"]


def test_grid_is_a_function_of_the_study() -> None:
    assert make_grid(study(), 0) == make_grid(dataclasses.replace(study()), 0)
