"""A loss or gradient that is no longer a number stops the run before the update and names the layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, losses, tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.train.checkpoint import find_checkpoints


def stop_on_bad_gradient(tree: dict[str, Any], poison: str) -> tuple[str, bool, float]:
    """One step of an engine with one bad weight, or a parameter whose gradient is made bad -> the description, whether
    the weights were left alone, and the norm."""
    from titans_pretrain.data.shards import ShardSet
    from titans_pretrain.data.stream import BatchLoader, TokenStream
    from titans_pretrain.layout import choose_layout
    from titans_pretrain.parallel.build import build_model
    from titans_pretrain.train.engine import Engine, NotFiniteError
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.watch import describe_failure

    grid = join(find_environment(), "cpu")
    config = config_from_dict(tree)
    grid = grid.lay_out(choose_layout(config, grid.world_size))
    shards = ShardSet.open(config.data.path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=shards.vocab_size))
    model = build_model(config, grid, seed=0)
    if config.model.compile:
        model.compile_blocks("aot_eager")
    victim = model.blocks[1].feed_forward.up.weight
    if poison == "weight":
        with torch.no_grad():
            victim[3, 5] = torch.nan
    engine = Engine(config, model, grid)
    before = _local(model)
    if poison == "gradient" and grid.rank == grid.world_size - 1:
        victim.register_hook(lambda gradient: gradient * torch.inf)
    loader = BatchLoader(
        TokenStream(shards, "train", SEQ_LEN, seed=0),
        batch_size=8,
        micro_batch=2,
        data_rank=grid.data.rank,
        data_size=grid.data.size,
        sequence_rank=grid.sequence.rank,
        sequence_size=grid.sequence.size,
        start=0,
        prefetch=1,
    )
    batch = next(loader)
    loader.close()
    for index, (tokens, labels, _) in enumerate(batch):
        if index:
            engine.end_micro_batch()
        engine.forward_backward(tokens, labels, 0.01)
    norm = 0.0
    try:
        engine.step(1e-2)
    except NotFiniteError as error:
        norm = error.norm
    description = describe_failure(engine, batch, 0.01, grid)
    same = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, _local(model), strict=True))
    return description, same, norm


def _local(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of what this rank holds of every parameter: its part of it under ZeRO-3, else all."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("stage", "compiled", "poison"),
    [
        (0, False, "weight"),
        (1, False, "gradient"),
        (2, False, "weight"),
        (3, False, "weight"),
        (3, False, "gradient"),
        (1, True, "gradient"),
    ],
)
def test_step_is_refused_and_the_layer_named(
    stage: int, compiled: bool, poison: str, dataset: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(
        dataset,
        tmp_path,
        model__variant="transformer",
        model__compile=compiled,
        data__micro_batch=2,
        engine__zero_stage=stage,
        engine__deepspeed=sharded(100) if stage == 3 else {},
    )
    for description, same, norm in run_distributed(stop_on_bad_gradient, 2, tree, poison):
        assert not torch.isfinite(torch.tensor(norm))
        assert norm != 0.0
        assert same, "the update must not have been made"
        if poison == "weight":
            assert "the output of blocks.1.feed_forward.up is the first" in description
            assert "rank 0" in description
        else:
            assert "in the backward pass the gradient of blocks.1.feed_forward.up.weight is the first" in description
            assert "rank 1" in description


@pytest.mark.parametrize("layout", [{"parallel__tensor": 2}, {"parallel__sequence": 2, "parallel__memory": "hand_off"}])
@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_the_layer_is_named_when_ranks_share_a_row(
    layout: dict[str, Any], poison: str, dataset: Path, tmp_path: Path
) -> None:
    """Both ranks run the batch again together: no one waits for the other in vain."""
    tree = tiny_tree(dataset, tmp_path, data__micro_batch=2, **layout)
    for description, same, norm in run_distributed(stop_on_bad_gradient, 2, tree, poison):
        assert not torch.isfinite(torch.tensor(norm))
        assert same, "the update must not have been made"
        found = (
            "the output of blocks.1.feed_forward.up"
            if poison == "weight"
            else "blocks.1.feed_forward.up.weight is the first"
        )
        assert found in description


def test_the_run_stops_with_one_sentence(dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(
        dataset,
        tmp_path,
        model__memory_depth=1,
        schedule__tokens=6 * 8 * SEQ_LEN,
        engine__zero_stage=0,
        eval__tokens=SEQ_LEN,
    )
    assert run_distributed(train_job, 2, {**tree, "run": {**tree["run"], "stop_after": 2}}) == [None, None]
    (checkpoint,) = find_checkpoints(tmp_path / "run")

    # Put an infinity into one weight of the checkpoint, as a bad memory module would, and make the checkpoint whole again.
    name = "deepspeed/mp_rank_00_model_states.pt"
    state = torch.load(checkpoint / name, weights_only=False)
    state["module"]["model.blocks.1.memory.key.weight"][0, 0] = torch.inf
    torch.save(state, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    sentences = run_distributed(train_job, 2, tree)
    assert sentences[0] == sentences[1]
    for text in (
        "loss is nan at step 3",
        "blocks.1.memory.key",
        "update was not made",
        str(checkpoint),
        "learning_rate",
    ):
        assert text in sentences[0], sentences[0]
    assert len(losses(tmp_path / "run")) == 2
    assert find_checkpoints(tmp_path / "run") == [checkpoint]
    assert sentences[0] in (tmp_path / "run" / "log" / "rank_1.txt").read_text()
