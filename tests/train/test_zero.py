"""Every ZeRO stage on two processes gives one process's losses and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, losses, read_metrics, tiny_tree
from titans_pretrain.config import VARIANTS

STEPS, ROWS = 20, 4
# One layer with every part for mag; the others also leave out what they share with it and costs most of the time.
LEAN: dict[str, dict[str, Any]] = {
    "mag": {"model__num_layers": 1},
    "mac": {"model__num_layers": 1, "model__memory_depth": 1},
    "mal": {"model__num_layers": 1, "model__num_persistent": 0},
    "lmm": {"model__num_layers": 1, "model__num_persistent": 0},
    "gated_deltanet_swa": {"model__num_layers": 1},
}


def sharded(elements: int) -> dict[str, Any]:
    """ZeRO-3 keeps parameters up to 100,000 elements whole, which is all of so small a model; shard those above `elements`."""
    return {"zero_optimization": {"stage3_param_persistence_threshold": elements}}


# gated_deltanet_swa has every kind of parameter that the other two recurrences have.
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("gated_deltanet", "linear_attention")])
def test_all_stages_on_two_ranks_equal_one_process(variant: str, dataset: Path, tmp_path: Path) -> None:
    def tree(name: str, stage: int) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__variant=variant,
            **LEAN.get(variant, {}),
            data__batch_tokens=ROWS * SEQ_LEN,
            schedule__tokens=STEPS * ROWS * SEQ_LEN,
            run__name=name,
            engine__zero_stage=stage,
            engine__deepspeed=sharded(0 if variant == "mag" else 1500) if stage == 3 else {},
            eval__tokens=3 * SEQ_LEN,
        )

    assert run_distributed(train_job, 1, tree("alone", 0)) == [None]
    stages = range(4) if variant in ("mag", "lmm") else (1, 3)
    trees = [tree(f"stage_{stage}", stage) for stage in stages]
    assert run_distributed(train_job, 2, *trees, timeout=240) == [None, None]

    expected = read_metrics(tmp_path / "alone")
    for stage in stages:
        rows = read_metrics(tmp_path / f"stage_{stage}")
        assert [row["step"] for row in rows] == [row["step"] for row in expected] == [0, *range(1, STEPS + 1), STEPS]
        for row, wanted in zip(rows, expected, strict=True):
            for name, tolerance in (("loss", 1e-5), ("valid_loss", 1e-5), ("grad_norm", 1e-4)):
                if name in wanted:
                    assert row[name] == pytest.approx(wanted[name], abs=tolerance, rel=0), (stage, row["step"], name)
    assert losses(tmp_path / "alone")[-1] < losses(tmp_path / "alone")[0] - 1


def test_accumulation_and_activation_checkpointing_change_nothing(dataset: Path, tmp_path: Path) -> None:
    steps = 3

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        common = {"model__variant": "mac", "model__memory_depth": 1, "schedule__tokens": steps * 8 * SEQ_LEN}
        return tiny_tree(dataset, tmp_path, **common, run__name=name, eval__tokens=SEQ_LEN, **overrides)

    runs = {
        "whole_batch": tree("whole_batch"),
        "accumulated": tree("accumulated", data__micro_batch=2, engine__zero_stage=2),
        "recomputed": tree("recomputed", engine__activation_checkpointing=True),
        "stage_3_recomputed": tree(
            "stage_3_recomputed",
            engine__activation_checkpointing=True,
            engine__zero_stage=3,
            engine__deepspeed=sharded(300),
            data__micro_batch=2,
        ),
    }
    assert run_distributed(train_job, 2, *runs.values()) == [None, None]
    expected = losses(tmp_path / "whole_batch")
    assert len(expected) == steps
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5, rel=0), name


def test_bf16_follows_fp32_in_every_stage(dataset: Path, tmp_path: Path) -> None:
    steps = 5

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        common = {"model__variant": "transformer", "schedule__tokens": steps * 8 * SEQ_LEN, "data__micro_batch": 2}
        return tiny_tree(dataset, tmp_path, **common, run__name=name, eval__tokens=SEQ_LEN, **overrides)

    trees = [tree(f"bf16_{stage}", engine__zero_stage=stage, engine__precision="bf16") for stage in (1, 2, 3)]
    assert run_distributed(train_job, 2, tree("fp32"), *trees) == [None, None]
    for stage in (1, 2, 3):
        assert losses(tmp_path / f"bf16_{stage}") == pytest.approx(losses(tmp_path / "fp32"), abs=0.05, rel=0), stage
