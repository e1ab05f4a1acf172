"""What DeepSpeed is told, and what an expert may add to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, tiny_config, tiny_tree
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.grid import Axis, Grid
from titans_pretrain.train.engine import deepspeed_settings


def settings(world_size: int = 2, **overrides: Any) -> dict[str, Any]:
    config = tiny_config(Path("data"), Path("runs"), **overrides)
    ranks = Axis(0, tuple(range(world_size)))
    return deepspeed_settings(config, Grid(0, world_size, torch.device("cpu"), data=ranks, replica=ranks))


def test_batch_is_split_into_micro_batches() -> None:
    made = settings(world_size=2, data__micro_batch=2)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (
        8,
        2,
        2,
    )
    assert settings(world_size=4)["train_micro_batch_size_per_gpu"] == 2


def test_gradients_are_kept_and_sent_in_fp32() -> None:
    made = settings(engine__precision="bf16")
    assert made["bf16"] == {"enabled": True}
    assert made["data_types"]["grad_accum_dtype"] == "fp32"
    assert made["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"zero_optimisation": {}}, "unknown key engine.deepspeed.zero_optimisation; did you mean zero_optimization?"),
        (
            {"zero_optimization": {"stage": 3}},
            "engine.deepspeed.zero_optimization.stage is 3 but this stack sets it to 1",
        ),
        ({"gradient_clipping": 5.0}, "engine.deepspeed.gradient_clipping is 5.0 but this stack sets it to 1.0"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "engine.deepspeed.data_types.grad_accum_dtype is 'bf16'"),
        ({"optimizer": {"type": "Adam"}}, "engine.deepspeed.optimizer is decided by the optimizer section"),
        ({"fp16": {"enabled": True}}, "engine.deepspeed.fp16 is decided by engine.precision"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_raw_key_is_refused(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(engine__deepspeed=raw)
    assert says in str(caught.value)


def test_raw_keys_reach_deepspeed_and_its_refusal_is_one_sentence(dataset: Path, tmp_path: Path) -> None:
    made = settings(
        engine__deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": False}
    )
    assert made["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    tree = tiny_tree(
        dataset, tmp_path, engine__deepspeed={"zero_optimization": {"no_such_key": 1}}, eval__tokens=SEQ_LEN
    )
    sentences = run_distributed(train_job, 2, tree)
    assert sentences[0] == sentences[1]
    assert "DeepSpeed refuses engine.deepspeed" in sentences[0]
    assert "no_such_key" in sentences[0]
    assert "\n" not in sentences[0]
