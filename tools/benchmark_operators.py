"""What benchmark_memory.py measures: one layer's operator with inputs like a model's at its start, ours and its peers.

Shapes: b batch, t tokens, h heads, d head_dim; dim = h * d channels. Every builder returns an `Operator` on the device given;
what cannot be built here raises `UserError` with the words for the table.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.errors import UserError
from titans_pretrain.memory import MemoryOptions, memory_scan, tile_length
from titans_pretrain.model.cost import scan_tile_flops
from titans_pretrain.model.init import rule_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATE_STD = 0.02
"""Of the weights of the gates' linear layers (model/init.py)."""


@dataclass(frozen=True)
class Row:
    """One line of the table before it is measured."""

    operator: str
    """A key of `BUILDERS`."""
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    """A key of `DTYPES`."""
    hidden: int = 0
    """Width of the memory's network; 0 where there is none."""
    chunk: int = 0
    """Ours: tokens whose gradients share one anchor. titans-pytorch: tokens that share one state of the weights."""
    path: str = ""
    """Ours: the path of `memory_scan`."""
    anchor: int = 0
    """titans-pytorch: tokens whose gradients share one anchor (its `batch_size`); 0: the whole sequence."""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def setting(self) -> str:
        """The table's second column."""
        if self.operator == "matmul":
            return f"{self.tokens} x {self.tokens} x {self.tokens}, {self.dtype}"
        parts = [f"dim {self.dim}" if self.operator == "dense" else f"{self.heads} x {self.head_dim}"]
        if self.hidden:
            parts.append(f"h {self.hidden}")
        if self.chunk:
            parts.append(f"C {self.chunk}")
        if self.operator == "titans_pytorch":
            parts.append(f"anchor every {self.anchor}" if self.anchor else "one anchor")
        if self.path:
            parts.append(self.path)
        return ", ".join([*parts, self.dtype, f"T {self.tokens}", f"B {self.batch}"])


class Operator(NamedTuple):
    """Something that can be timed."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """What the backward pass computes gradients of; empty: there is none."""
    flops: float | None
    """Operations of forward and backward together, by our count; None: not counted."""


# ------------------------------------------------------------------------------------------------------------- ours


def memory_inputs(row: Row, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor argument of `memory_scan` as a model has it at its start, all of them leaves that require gradients.

    q, k, v [b, t, h, d] and the parameters in the row's dtype, gates [b, t, h, 2] in fp32: q and k of unit length, v behind
    a SiLU, gates around the biases of `ModelConfig`, initial weights by the rules of model/init.py, layer norm on.
    """
    generator = torch.Generator(device).manual_seed(seed)
    config, dtype = _config(row), DTYPES[row.dtype]
    tokens = (row.batch, row.tokens, row.heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def logits(bias: float) -> Tensor:  # of a linear layer whose dim inputs have unit variance
        return bias + GATE_STD * math.sqrt(row.dim) * normal(*tokens, config.memory_depth)

    eta = logits(config.memory_eta_bias)
    inputs = {
        "q": F.normalize(normal(*tokens, row.head_dim), dim=-1).to(dtype),
        "k": F.normalize(normal(*tokens, row.head_dim), dim=-1).to(dtype),
        "v": F.silu(normal(*tokens, row.head_dim)).to(dtype),
        "log_gamma": F.logsigmoid(-logits(config.memory_alpha_bias)),
        "log_eta": F.logsigmoid(eta),
        "theta": config.resolved_theta_max * torch.sigmoid(logits(config.memory_theta_bias)) * torch.sigmoid(-eta),
    }
    for layer, (rows, columns) in enumerate(config.memory_shapes):
        rule = rule_for(f"memory.initial_weights.{layer}", config)
        std = rule.scale if rule.kind == "normal" else rule.scale / math.sqrt(rows)
        inputs[f"W{layer + 1}"] = (std * normal(row.heads, rows, columns)).to(dtype)
    inputs["norm_weight"] = torch.ones(row.heads, row.head_dim, device=device, dtype=dtype)
    inputs["norm_bias"] = torch.zeros(row.heads, row.head_dim, device=device, dtype=dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def scan(inputs: dict[str, Tensor], chunk: int, path: str) -> Tensor:
    """`memory_scan` on what `memory_inputs` made -> its output [b, t, h, d]."""
    gates = inputs["log_gamma"], inputs["log_eta"], inputs["theta"]
    weights = tuple(x for name, x in inputs.items() if name.startswith("W"))
    out, _ = memory_scan(
        inputs["q"], inputs["k"], inputs["v"], *gates, weights, inputs["norm_weight"], inputs["norm_bias"],
        options=MemoryOptions(chunk_size=chunk), path=path,
    )  # fmt: skip
    return out


def memory_flops(row: Row) -> float:
    """Matrix products of our scan, forward and backward: `model.cost.scan_tile_flops`, and twice it for the backward."""
    config, tile = _config(row), tile_length(row.chunk)
    chunks = itertools.chain(itertools.repeat(row.chunk, row.tokens // row.chunk), [row.tokens % row.chunk])
    tiles = (min(tile, chunk - start) for chunk in chunks for start in range(0, chunk, tile))
    return 3.0 * row.batch * row.heads * sum(scan_tile_flops(config, config.memory_shapes, t) for t in tiles)


def _config(row: Row) -> ModelConfig:
    return ModelConfig(
        variant="lmm",
        dim=row.dim,
        num_heads=row.heads,
        memory_expansion=row.hidden / row.head_dim,
        memory_chunk=row.chunk,
    )


def build_memory(row: Row, device: torch.device) -> Operator:
    inputs = memory_inputs(row, device)
    return Operator(lambda: scan(inputs, row.chunk, row.path), list(inputs.values()), memory_flops(row))


# ------------------------------------------------------------------------------------------------------------ peers


def build_matmul(row: Row, device: torch.device) -> Operator:
    """tokens x tokens times tokens x tokens, forward only: what the device reaches at best."""
    x = torch.randn(row.tokens, row.tokens, device=device, dtype=DTYPES[row.dtype])
    return Operator(lambda: x @ x, [], 2.0 * row.tokens**3)


def build_attention(row: Row, device: torch.device) -> Operator:
    """Causal softmax attention; torch chooses the kernel. Only the half below the diagonal is counted."""
    q, k, v = (_leaf((row.batch, row.heads, row.tokens, row.head_dim), row, device) for _ in range(3))
    flops = 3 * 2.0 * row.batch * row.dim * row.tokens**2
    return Operator(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], flops)


def build_dense(row: Row, device: torch.device) -> Operator:
    """The matrix products of a block without its mixing: four dim x dim, then dim -> 4 dim -> dim."""
    x = _leaf((row.batch * row.tokens, row.dim), row, device)
    widths = [row.dim] * 5 + [4 * row.dim, row.dim]
    weights = [_leaf((b, a), row, device, scale=a**-0.5) for a, b in itertools.pairwise(widths)]

    def forward() -> Tensor:
        y = x
        for w in weights:
            y = F.linear(y, w)
        return y

    return Operator(forward, [x, *weights], 3 * 2.0 * row.batch * row.tokens * 12 * row.dim**2)


def build_gated_delta_rule(row: Row, device: torch.device) -> Operator:
    """flash-linear-attention's chunk kernel, its fastest for training."""
    if device.type != "cuda":
        raise UserError("its kernels need a GPU")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens = (row.batch, row.tokens, row.heads)
    q, v = (_leaf((*tokens, row.head_dim), row, device) for _ in range(2))
    k = F.normalize(torch.randn(*tokens, row.head_dim, device=device), dim=-1).to(DTYPES[row.dtype]).requires_grad_()
    g = F.logsigmoid(torch.randn(tokens, device=device) + 6.0).requires_grad_()
    beta = torch.rand(tokens, device=device).to(DTYPES[row.dtype]).requires_grad_()
    return Operator(lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], [q, k, v, g, beta], None)


def build_titans_pytorch(row: Row, device: torch.device) -> Operator:
    """titans-pytorch's memory layer as its users call it: projections, gates, norms, scan and read.

    Its momentum and forgetting have one gate a chunk, and a chunk's reads see no token of the chunk: at C 1 with an anchor
    every n it follows the rule that ours follows at C n; a larger C is a coarser and cheaper rule.
    """
    from titans_pytorch import NeuralMemory

    layer: nn.Module = NeuralMemory(
        dim=row.dim,
        heads=row.heads,
        dim_head=row.head_dim,
        chunk_size=row.chunk,
        batch_size=row.anchor or None,
        default_model_kwargs=dict(depth=2, expansion_factor=row.hidden / row.head_dim),
        use_accelerated_scan=device.type == "cuda" and importlib.util.find_spec("accelerated_scan") is not None,
    ).to(device, DTYPES[row.dtype])
    x = _leaf((row.batch, row.tokens, row.dim), row, device)
    return Operator(lambda: layer(x)[0], [x, *layer.parameters()], None)


def missing_package(row: Row) -> str | None:
    """What a row needs and is not installed, as pip calls it."""
    module = {"gated_delta_rule": "fla", "titans_pytorch": "titans_pytorch"}.get(row.operator)
    return None if module is None or importlib.util.find_spec(module) else PACKAGES[module]


def _leaf(shape: tuple[int, ...], row: Row, device: torch.device, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(DTYPES[row.dtype]).requires_grad_()


BUILDERS: dict[str, Callable[[Row, torch.device], Operator]] = {
    "matmul": build_matmul,
    "memory": build_memory,
    "attention": build_attention,
    "dense": build_dense,
    "gated_delta_rule": build_gated_delta_rule,
    "titans_pytorch": build_titans_pytorch,
}
PEERS = ("attention", "dense", "gated_delta_rule", "titans_pytorch")
PACKAGES = {"torch": "torch", "triton": "triton", "fla": "flash-linear-attention", "titans_pytorch": "titans-pytorch"}
"""What the figures depend on: key in the JSON -> distribution."""


def peer_rows(names: tuple[str, ...], base: dict[str, Any], hidden: list[int], chunk: int) -> list[Row]:
    """The rows of the peers at the shape of ours. base: batch, tokens, heads, head_dim, dtype; chunk: the rule of ours that
    titans-pytorch is asked to follow exactly in the last of its rows."""
    rows = []
    dim = base["heads"] * base["head_dim"]
    for name in names:
        if name == "attention":  # the two shapes it is usually run at
            sizes = dict.fromkeys(min(size, dim) for size in (64, 128))
            rows += [Row(name, **{**base, "heads": dim // d, "head_dim": d}) for d in sizes if dim % d == 0]
        elif name == "titans_pytorch":
            settings = [(64, 0), (256, 0), (64, 64), (1, chunk)]
            rows += [
                Row(name, **base, hidden=h, chunk=c, anchor=a)
                for h in hidden
                for c, a in dict.fromkeys(settings)
                if c <= base["tokens"]
            ]
        else:
            rows.append(Row(name, **base))
    return rows
