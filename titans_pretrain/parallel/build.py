"""One rank's share of a model: the same steps for training, benchmarks and plans."""

from __future__ import annotations

from titans_pretrain.config import Config
from titans_pretrain.layout import memory_strategy
from titans_pretrain.model import Titans, initialize
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.parallel.sequence import ShardedSequence
from titans_pretrain.parallel.tensor import split_model


def build_model(config: Config, grid: Grid, seed: int | None) -> Titans:
    """The model of a rank of `grid`, which is laid out; its parameters are slices of those that one process draws.

    Args:
        config: resolved (model.vocab_size set).
        seed: names the initial values; None: parameters stay empty.
    """
    sequence = ShardedSequence(grid.sequence, memory_strategy(config)) if grid.sequence.size > 1 else None
    model = Titans(config.model, loss_chunk=config.engine.loss_chunk, sequence=sequence)
    if seed is not None:
        initialize(model, seed)
    split_model(model, grid.tensor)
    model.activation_checkpointing = config.engine.activation_checkpointing
    return model
