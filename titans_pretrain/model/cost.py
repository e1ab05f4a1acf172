"""What a model costs: parameters by group, and floating-point operations per token counted operation by operation.

Only matrix products and convolutions are counted, two operations a multiply-add, as `torch.utils.flop_counter` does (a test
holds the two together). Attention is counted as computed, masked places included. What is done once per batch, not
per token (the persistent tokens' own pass), is left out.
"""

from __future__ import annotations

import torch

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory import tile_length
from titans_pretrain.model.chunks import CHUNK
from titans_pretrain.model.titans import Titans

GROUPS = (
    *("embedding", "head", "attention", "memory", "recurrence", "feed_forward"),
    *("persistent", "memory_tokens", "norm"),
)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by group, `total`, and `non_embedding` (the total without embedding and head). A tied matrix counts once,
    as embedding. Builds the model on the meta device: no memory, no initial values.

    Raises:
        ValueError: vocab_size is not resolved.
    """
    with torch.device("meta"):
        model = Titans(config)
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        counts[_group(name)] += parameter.numel()
    total = sum(counts.values())
    return {**counts, "total": total, "non_embedding": total - counts["embedding"] - counts["head"]}


def _group(name: str) -> str:
    parts = name.split(".")
    for group in GROUPS:
        if group in parts:
            return group
    return "norm"


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations to train on one token at this sequence length: forward, and twice that for the backward pass
    (activation recomputation is not useful work and is not counted)."""
    return 3.0 * sum(forward_flops(config, seq_len).values())


def forward_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of the forward pass per token, by group."""
    if config.variant == "rmt":
        return _rmt_flops(config, seq_len)
    flops = {
        "head": 2.0 * config.dim * config.vocab_size,
        "feed_forward": config.num_layers * 6.0 * config.dim * config.resolved_hidden_dim,
    }
    if config.has_attention:
        flops["attention"] = config.num_layers * (8.0 * config.dim**2 + _score_flops(config, seq_len))
    if config.has_memory:
        flops["memory"] = config.num_layers * _memory_flops(config, seq_len)
    if config.has_recurrence:
        flops["recurrence"] = config.num_layers * _recurrence_flops(config, seq_len)
    return flops


def _rmt_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """RMT's: every segment is longer by the memory that it reads and, but for the last, writes."""
    segments = _pieces(seq_len, config.segment_len)
    inputs = [n + 2 * config.num_memory_tokens for n in segments]
    inputs[-1] -= config.num_memory_tokens
    places = sum(inputs) / seq_len
    scores = 4.0 * config.dim * sum(n * n for n in inputs) / seq_len
    return {
        "head": 2.0 * config.dim * config.vocab_size,
        "feed_forward": config.num_layers * 6.0 * config.dim * config.resolved_hidden_dim * places,
        "attention": config.num_layers * (8.0 * config.dim**2 * places + scores),
    }


def _score_flops(config: ModelConfig, seq_len: int) -> float:
    """Scores and weighted values of one attention layer per token: 4 * dim operations for every key a query is given."""
    if config.variant == "transformer":
        return 4.0 * config.dim * seq_len
    if config.variant == "mac":
        keys = sum(
            n * (config.num_persistent + n + n // config.retrieve_every) for n in _pieces(seq_len, config.segment_len)
        )
        return 4.0 * config.dim * keys / seq_len
    prefix = config.num_persistent if config.has_memory else 0
    keys, start = 0, 0
    for n in _pieces(seq_len, config.window):
        keys += n * (prefix + min(start, config.window - 1) + n)
        start += n
    return 4.0 * config.dim * keys / seq_len


def _memory_flops(config: ModelConfig, seq_len: int) -> float:
    """One memory layer per token: its projections, convolutions, gates, and the scan; for MAC also the first read."""
    dim, heads = config.dim, config.resolved_memory_heads
    kinds = 1 + config.memory_momentum + config.memory_forgetting
    gates = kinds * heads * (config.memory_depth if config.memory_per_layer_gates else 1)
    h3 = config.arrangement == "h3"  # one convolution, and the query is the gate
    flops = 2.0 * dim * ((4 if h3 else 5) * dim + gates) + (1 if h3 else 3) * 2.0 * config.conv_kernel * dim
    widths = config.memory_shapes
    if config.variant == "mac":
        read = 2.0 * heads * sum(a * b for a, b in widths) + 2.0 * 4 * dim**2  # the way out, then attention's k and v
        segments = _pieces(seq_len, config.segment_len)
        flops += 2.0 * dim**2 + 2.0 * config.conv_kernel * dim
        flops += read * sum(n // config.retrieve_every for n in segments) / seq_len
    else:
        segments = [seq_len]
    scanned = 0.0
    for segment in segments:
        for chunk in _pieces(segment, config.memory_chunk):
            for tile in _pieces(chunk, tile_length(config.memory_chunk)):
                scanned += heads * scan_tile_flops(config, widths, tile)
    return flops + scanned / seq_len


def _recurrence_flops(config: ModelConfig, seq_len: int) -> float:
    """One recurrence per token: its projections, convolutions, gates, and the products of its chunks."""
    dim, heads, width = config.dim, config.resolved_memory_heads, config.memory_head_dim
    chunk = min(CHUNK, seq_len)
    per_token = -(-seq_len // chunk) * chunk / seq_len  # the last chunk is filled up
    convolutions = 3 * 2.0 * config.conv_kernel * dim
    if config.variant == "linear_attention":
        inside, state = chunk * (2 * width + 1), 2 * width * (width + 1)
        return 8.0 * dim**2 + convolutions + 2.0 * heads * (inside + state) * per_token
    # Keys and queries with keys, the update's product, and the solution for values and keys, counted as the product with the
    # inverse of the system.
    inside, state = chunk * 5 * width, 3 * width**2
    return 10.0 * dim**2 + 4.0 * dim * heads + convolutions + 2.0 * heads * (inside + state) * per_token


def scan_tile_flops(config: ModelConfig, widths: list[tuple[int, int]], tile: int) -> float:
    """The closed form of method.md section 1 over `tile` tokens of one head."""
    weights = [rows * columns for rows, columns in widths]
    forward = sum(weights)
    deltas = sum(weights[1:])
    reads = sum(weights) * (
        1 + config.memory_momentum + (config.memory_forgetting and config.memory_forget_toward == "init")
    )
    updates = sum(weights) * (1 + config.memory_momentum)
    inside = sum(tile * (rows + columns) for rows, columns in widths)
    both = config.memory_momentum and config.memory_forgetting
    gates = config.memory_depth * (tile * tile + tile) if both else 0
    return 2.0 * tile * (forward + deltas + reads + updates + inside + gates)


def _pieces(total: int, size: int) -> list[int]:
    """Lengths of the pieces that `total` tokens are cut into."""
    return [min(size, total - start) for start in range(0, total, size)]
