"""Five optimizer steps of a small model under any layout: what ranks run in test_layouts.py."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from titans_pretrain.config import config_from_dict

STEPS, ROWS, SEQ_LEN, VOCAB_SIZE = 5, 4, 64, 61


class Outcome(NamedTuple):
    """What one layout must share with every other."""

    losses: list[float]
    norms: list[float]
    gradients: dict[int, dict[str, torch.Tensor]]
    """Step -> by parameter name, whole, before clipping."""


def tree(variant: str, *, zero: int = 0, micro: int = 0, **overrides: Any) -> dict[str, dict[str, Any]]:
    """Config sections of a small model; overrides are written section__key=value."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "variant": variant,
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "dim": 32,
            "num_heads": 4,
            "hidden_dim": 48,
            "window": 24,  # longer than a shard of four
            "segment_len": 16,
            "num_persistent": 3,
            "memory_chunk": 12,  # shards end inside a chunk
            "memory_expansion": 1.5,
            "memory_theta_max": 0.005,  # a calm memory: it enlarges rounding errors less
        },
        "data": {"seq_len": SEQ_LEN, "batch_tokens": ROWS * SEQ_LEN, "micro_batch": micro},
        # A large eps keeps AdamW smooth: with 1e-8 the first updates are the gradients' signs, also where they are noise.
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-2, "clip": 0.5},
        "schedule": {"tokens": STEPS * ROWS * SEQ_LEN},
        "parallel": {},
        "engine": {"zero_stage": zero, "precision": "fp32", "loss_chunk": 50},
        "run": {"device": "cpu"},
    }
    if zero == 3:  # shard what ZeRO-3 would keep whole for its size
        sections["engine"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 300}}
    for name, value in overrides.items():
        section, key = name.split("__")
        sections[section][key] = value
    return sections


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [ROWS, SEQ_LEN] of a step; unequally many labels in each quarter of a row do not count."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCAB_SIZE, (ROWS, SEQ_LEN + 1), generator=generator)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    labels[0, 5:40] = -100
    labels[2, SEQ_LEN // 2 :] = -100
    return tokens, labels


def run_cases(gathered: Collection[int], *trees: dict[str, dict[str, Any]]) -> list[Outcome]:
    """`run_case` for each config, in one set of processes."""
    from titans_pretrain.train.environment import find_environment, join

    grid = join(find_environment(), "cpu")
    return [run_case(sections, grid, gathered) for sections in trees]


def run_case(sections: dict[str, dict[str, Any]], world: Any, gathered: Collection[int]) -> Outcome:
    """Train STEPS steps, as train/loop.py does it, and collect, in steps `gathered` gradients too."""
    from titans_pretrain.layout import choose_layout, micro_batch_rows
    from titans_pretrain.model import Titans
    from titans_pretrain.parallel.build import build_model
    from titans_pretrain.train.engine import Engine

    config = config_from_dict(sections)
    grid = world.lay_out(choose_layout(config, world.world_size))
    names = [name for name, _ in Titans(config.model).named_parameters()]
    model = build_model(config, grid, seed=1)
    engine = Engine(config, model, grid)
    rows = micro_batch_rows(config, grid.data.size)
    share, columns = ROWS // grid.data.size, SEQ_LEN // grid.sequence.size
    outcome = Outcome([], [], {})
    for step in range(STEPS):
        tokens, labels = batch(step)
        num_valid = int((labels != -100).sum())
        mine = (
            slice(grid.data.rank * share, (grid.data.rank + 1) * share),
            slice(grid.sequence.rank * columns, (grid.sequence.rank + 1) * columns),
        )
        pairs = list(zip(tokens[mine].split(rows), labels[mine].split(rows), strict=True))
        loss = 0.0
        for index, pair in enumerate(pairs):
            if index:
                engine.end_micro_batch()
            loss += float(engine.forward_backward(*pair, grid.replica.size / num_valid))
        outcome.losses.append(float(grid.distinct(grid.gather_numbers([loss])).sum()) / num_valid)
        if step in gathered:
            outcome.gradients[step] = whole_gradients(model, names, config.engine.zero_stage, grid)
        outcome.norms.append(engine.step(config.optimizer.learning_rate))
    return outcome if grid.is_first else Outcome([], [], {})


def whole_gradients(model: Any, names: list[str], stage: int, grid: Any) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, gathered over replicas by DeepSpeed and over tensor ranks by the split table."""
    from deepspeed.utils import safe_get_full_grad

    from titans_pretrain.parallel.split_table import whole_of

    found = {}
    for name, parameter in model.named_parameters():
        own = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
        assert own is not None, name
        parts = [torch.empty_like(own) for _ in range(grid.tensor.size)]
        if grid.tensor.size > 1:
            torch.distributed.all_gather(parts, own.contiguous(), group=grid.tensor.group)
        else:
            parts = [own]
        found[name] = whole_of(name, parts, VOCAB_SIZE).clone()
        if name not in names:
            raise AssertionError(f"{name} was not in the model before it was split")
    return found
