"""Which layouts a config allows: how many ranks each axis has, which strategy the memory follows, and what is refused.

Knows sizes only, no ranks and no processes, so that a plan for a thousand GPUs can be made on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

from titans_pretrain.config import Config
from titans_pretrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of the grid of ranks. rank = (data_rank * sequence + sequence_rank) * tensor + tensor_rank."""

    data: int
    """Ranks that read different rows of the batch."""
    sequence: int = 1
    """Ranks that share a row, each with its slice of the tokens."""
    tensor: int = 1
    """Ranks that share every token, each with its slice of the heads, the feed-forward and the vocabulary."""

    @property
    def world_size(self) -> int:
        return self.data * self.sequence * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks that hold the same slice of every parameter: what ZeRO shards over."""
        return self.data * self.sequence


def describe(config: Config, layout: Layout) -> str:
    """The layout in words, for the log."""
    words = [f"{layout.data} data"]
    if layout.sequence > 1:
        words.append(f"{layout.sequence} sequence")
    if layout.tensor > 1:
        words.append(f"{layout.tensor} tensor")
    what = "recurrence" if config.model.has_recurrence else "memory"
    shared = f", {what} by {memory_strategy(config)}" if layout.sequence > 1 and config.model.carries_state else ""
    return f"{' x '.join(words)} rank{'s' if layout.world_size > 1 else ''}{shared}"


def memory_strategy(config: Config) -> str:
    """How the memory is scanned where `parallel.sequence` is above 1: parallel.memory with "auto" resolved."""
    if config.parallel.memory != "auto":
        return config.parallel.memory
    return "hand_off" if config.model.variant == "mac" else "head_exchange"


def micro_batch_rows(config: Config, data_size: int) -> int:
    """Sequences per rank and forward pass."""
    return config.data.micro_batch or config.batch_size // data_size


def choose_layout(config: Config, world_size: int) -> Layout:
    """The layout of `world_size` processes.

    Raises:
        UserError: they cannot share the batch, the sequence or the heads that way; names the keys and a legal choice.
    """
    parallel = config.parallel
    shared = parallel.sequence * parallel.tensor
    if world_size % shared:
        raise UserError(
            f"parallel.sequence ({parallel.sequence}) x parallel.tensor ({parallel.tensor}) = {shared} does not divide the "
            f"{world_size} processes that were started; start a multiple of {shared} or lower one of the two"
        )
    layout = Layout(world_size // shared, parallel.sequence, parallel.tensor)
    if parallel.data and parallel.data != layout.data:
        asked = parallel.data * shared
        each = f" / {shared} (parallel.sequence x parallel.tensor)" if shared > 1 else ""
        raise UserError(
            f"parallel.data is {parallel.data} but {world_size} processes were started{each}; start {asked} or set "
            "parallel.data=0"
        )
    _check_batch(config, layout)
    _check_compile(config, layout)
    _check_tensor(config, layout)
    if layout.sequence > 1:
        _check_documents(config, layout)
        _check_sequence(config, layout)
    return layout


def _check_batch(config: Config, layout: Layout) -> None:
    for number, size in enumerate(config.batch_sizes):
        key = f"data.batch_ramp[{number - 1}].batch_tokens" if number else "data.batch_tokens"
        if size % layout.data:
            raise UserError(
                f"the batch of {size} sequences ({key} {size * config.data.seq_len} / data.seq_len "
                f"{config.data.seq_len}) does not divide over {layout.data} data-parallel ranks; "
                f"make {key} a multiple of {layout.data * config.data.seq_len}"
            )
        local = size // layout.data
        micro = config.data.micro_batch
        if micro and local % micro:
            raise UserError(
                f"each of {layout.data} ranks takes {local} sequences a step ({key} {size * config.data.seq_len}), "
                f"which is not a multiple of data.micro_batch ({micro})"
            )


def _check_compile(config: Config, layout: Layout) -> None:
    if config.model.compile and layout.sequence * layout.tensor > 1:
        raise UserError(
            f"model.compile=true does not go with parallel.sequence ({layout.sequence}) or parallel.tensor ({layout.tensor}) "
            "above 1 yet: a block's communication would cut what is compiled to pieces; set model.compile=false"
        )


def _check_tensor(config: Config, layout: Layout) -> None:
    model, size = config.model, layout.tensor
    parts = [("model.hidden_dim", model.resolved_hidden_dim)]
    if model.has_attention:
        parts.append(("model.num_heads", model.num_heads))
    if model.carries_state:
        parts.append(("model.memory_heads", model.resolved_memory_heads))
    for name, count in parts:
        if count % size:
            raise UserError(
                f"{name} ({count}) does not divide over parallel.tensor ({size}); use parallel.tensor={_divisor(count, size)} "
                f"or change {name}"
            )


def _check_documents(config: Config, layout: Layout) -> None:
    if config.data.reset_at_documents:
        raise UserError(
            f"data.reset_at_documents=true does not go with parallel.sequence ({layout.sequence}) above 1 yet: a document "
            "would lie on several ranks; set parallel.sequence=1 or data.reset_at_documents=false"
        )


def _check_sequence(config: Config, layout: Layout) -> None:
    model, size = config.model, layout.sequence
    if model.variant == "rmt":
        raise UserError(
            f"parallel.sequence ({size}) above 1 does not go with model.variant=rmt, whose segments follow each other through "
            "the whole stack of blocks, so that one rank would wait for the other; use parallel.sequence=1"
        )
    if config.data.seq_len % size:
        raise UserError(
            f"data.seq_len ({config.data.seq_len}) does not divide over parallel.sequence ({size}); use "
            f"parallel.sequence={_divisor(config.data.seq_len, size)} or change data.seq_len"
        )
    if model.variant == "transformer":
        _check_heads(config, layout, "full attention exchanges", "model.num_heads", model.num_heads, "")
    if not model.carries_state:
        return
    strategy = memory_strategy(config)
    if model.has_recurrence and strategy == "chunk_scan":
        raise UserError(
            "parallel.memory=chunk_scan spreads a gradient chunk of the neural memory, and "
            f"model.variant={model.variant} has none; use parallel.memory=head_exchange or hand_off"
        )
    shard = config.data.seq_len // size
    if model.variant == "mac" and strategy != "hand_off":
        raise UserError(
            f"parallel.memory={strategy} does not go with model.variant=mac, whose segments follow each other; use "
            "parallel.memory=hand_off"
        )
    if model.variant == "mac" and shard % model.segment_len:
        raise UserError(
            f"a shard of {shard} tokens (data.seq_len {config.data.seq_len} / parallel.sequence {size}) is not a multiple of "
            f"model.segment_len ({model.segment_len}), so a segment of mac would lie on two ranks; lower parallel.sequence or "
            "model.segment_len"
        )
    if strategy == "head_exchange":
        other = "; or use parallel.memory=hand_off"
        _check_heads(
            config,
            layout,
            "parallel.memory=head_exchange exchanges",
            "model.memory_heads",
            model.resolved_memory_heads,
            other,
        )
    if strategy == "hand_off" and config.engine.zero_stage == 3:
        others = "" if model.variant == "mac" else " or parallel.memory=head_exchange"
        raise UserError(
            "parallel.memory=hand_off does not go with engine.zero_stage=3, which gathers every layer on all ranks at once "
            f"while hand_off has them on different layers; use engine.zero_stage=1{others}"
        )
    if strategy == "chunk_scan" and model.memory_chunk % shard:
        raise UserError(
            "parallel.memory=chunk_scan spreads one chunk over several ranks, but model.memory_chunk "
            f"({model.memory_chunk}) is not a multiple of a shard's {shard} tokens (data.seq_len {config.data.seq_len} / "
            f"parallel.sequence {size}); use parallel.memory=head_exchange or hand_off, or change model.memory_chunk"
        )


def _check_heads(config: Config, layout: Layout, what: str, key: str, heads: int, other: str) -> None:
    local = heads // layout.tensor
    if local % layout.sequence:
        each = f" / parallel.tensor ({layout.tensor}) = {local} heads a rank" if layout.tensor > 1 else ""
        raise UserError(
            f"{what} heads over the sequence ranks, but {key} ({heads}){each} does not divide over parallel.sequence "
            f"({layout.sequence}); use parallel.sequence={_divisor(local, layout.sequence)}{other}"
        )


def _divisor(count: int, below: int) -> int:
    """The largest divisor of `count` up to `below`."""
    return max(d for d in range(1, below + 1) if count % d == 0)
