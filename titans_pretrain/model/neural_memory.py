"""The neural long-term memory as a layer: projections, gates, the scan, and how a read leaves it (method.md section 1).

Shapes: b batch, t time, c channels, h memory heads, d memory head_dim, l weight matrices of the memory network.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory import (
    MemoryOptions,
    MemoryState,
    begin_chunk,
    expected_path,
    initial_state,
    memory_read,
)
from titans_pretrain.memory.surprise import scan_with_surprise
from titans_pretrain.model.convolution import convolve
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import CausalConv, RMSNorm, unit
from titans_pretrain.model.sequence import LocalSequence


def memory_options(config: ModelConfig) -> MemoryOptions:
    """The update rule's settings of a model."""
    return MemoryOptions(
        chunk_size=config.memory_chunk,
        activation=config.memory_activation,
        forget_toward=config.memory_forget_toward,
    )


def describe_path(config: ModelConfig, device: torch.device, dtype: torch.dtype, documents: bool = False) -> str:
    """By which implementation the memory of a model trains on `device` with activations in `dtype`, in words. `documents`:
    several in a row."""
    # MAC begins a document between two scans.
    inside = documents and config.variant != "mac"
    resets = (config.num_persistent > 0, config.memory_forgetting) if inside else None

    def path(heads: int) -> str:
        model = dataclasses.replace(config, memory_heads=heads)
        shape = model.memory_depth, model.memory_head_dim, model.memory_shapes[0][1]
        return expected_path(device, dtype, *shape, memory_options(model), resets)

    said = path(config.memory_heads)
    if said in ("triton", "closed_form"):
        return said
    for heads in range(config.resolved_memory_heads + 1, config.dim // 16 + 1):
        if config.dim % heads == 0 and path(heads) == "triton":
            return f"{said}; model.memory_heads={heads}, heads of {config.dim // heads}, would be taken, in a new run"
    return said


class MemoryLayerState(NamedTuple):
    """What the next token needs: the convolutions' last inputs [b, kernel - 1, c] for q, k, v, and the memory itself."""

    tails: tuple[Tensor, Tensor, Tensor]
    memory: MemoryState

    def close_chunk(self) -> MemoryLayerState:
        return self._replace(memory=begin_chunk(self.memory))


class TokenSignals(NamedTuple):
    """What a memory made of each token [b, t]; fp32, or float64 where the model is. Per head, and per memory layer l."""

    inner_loss: Tensor
    """[b, t, h]: 0.5 * ||M(k) - v||^2 at the weights of the start of the token's chunk."""
    gradient_norm: Tensor
    """[b, t, h, l]: the norm of its gradient, the momentary surprise, which the memory takes a step against."""
    theta: Tensor
    """[b, t, h, l]: the step's size."""
    eta: Tensor | None
    """[b, t, h, l]: what is kept of the momentum; None: there is none. alpha alike."""
    alpha: Tensor | None
    """[b, t, h, l]: what is forgotten."""


class NeuralMemory(nn.Module):
    """One memory network per head that learns, token by token, to map its keys to its values.

    `config.arrangement` says what stands around the scan, of linear projections q, k, v of the input:

    - llama: convolutions and SiLU on q, k and v; the read leaves through a norm and a SiLU gate of its own.
    - h3: H3's `q * SSM_diag(SSM_shift(k) * v)` (arXiv 2212.14052), with the memory where its diagonal state-space layer was.
      The shift is the key's convolution, of `conv_kernel` taps and without SiLU: a state-space layer that shifts is a filter
      over the last few tokens. q and v have neither. What is written is the product shift(k) * v, and the read is
      multiplied by q, which takes the gate's place. A state-space layer needs no address, a memory does: it is written at
      the key shift(k) and read at q, both of unit norm, as H3 with heads does with its outer products (docs/method.md 2).
    """

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__()
        dim, heads, head_dim = config.dim, config.resolved_memory_heads, config.memory_head_dim
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        h3 = config.arrangement == "h3"
        self.query_conv = None if h3 else CausalConv(dim, config.conv_kernel)
        self.key_conv = CausalConv(dim, config.conv_kernel)
        self.value_conv = None if h3 else CausalConv(dim, config.conv_kernel)

        gates = heads * (config.memory_depth if config.memory_per_layer_gates else 1)
        self.theta_gate = nn.Linear(dim, gates)
        self.eta_gate = nn.Linear(dim, gates) if config.memory_momentum else None
        self.alpha_gate = nn.Linear(dim, gates) if config.memory_forgetting else None

        self.initial_weights = nn.ParameterList(
            nn.Parameter(torch.empty(heads, rows, columns)) for rows, columns in config.memory_shapes
        )
        self.inner_norm_weight = nn.Parameter(torch.empty(heads, head_dim)) if config.memory_residual_norm else None
        self.inner_norm_bias = nn.Parameter(torch.empty(heads, head_dim)) if config.memory_residual_norm else None

        self.read_norm = RMSNorm(heads, head_dim, eps=config.norm_eps)
        self.read_gate = None if h3 else nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

        self.config = config
        self.head_dim = head_dim
        self.options = memory_options(config)
        self.sequence = sequence
        self.collect_signals = False
        self.signals: dict[str, Tensor] = {}
        self.collect_tokens = False
        self.token_signals: list[TokenSignals] = []
        """Of the calls since `collect_tokens` was set, in order; see Titans.observe."""

    # ------------------------------------------------------------------------------------------------ inputs of the scan

    def queries(
        self, x: Tensor, tail: Tensor | None, sequence: LocalSequence, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [b, t, c] -> unit queries [b, t, h, d] and the convolution's new tail; `sequence` has the tokens before x."""
        assert self.query_conv is not None
        q, tail = convolve(self.query(x), self.query_conv, tail, sequence, documents)
        return unit(self._heads(F.silu(q))), tail

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """x [b, t, c] -> log(1 - alpha), log(eta) and theta, fp32 [b, t, h, l]; None for a gate that is switched off."""
        log_gamma = None if self.alpha_gate is None else F.logsigmoid(-self._gate(self.alpha_gate, x))
        theta = self.config.resolved_theta_max * torch.sigmoid(self._gate(self.theta_gate, x))
        if self.eta_gate is None:
            return log_gamma, None, theta
        eta_logit = self._gate(self.eta_gate, x)
        if self.config.memory_theta_scaling == "momentum":
            theta = theta * torch.sigmoid(-eta_logit)  # 1 - eta, without the cancellation
        return log_gamma, F.logsigmoid(eta_logit), theta

    def _gate(self, layer: nn.Linear, x: Tensor) -> Tensor:
        depth = self.config.memory_depth if self.config.memory_per_layer_gates else 1
        logits = layer(x).unflatten(-1, (-1, depth))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.expand(*logits.shape[:-1], self.config.memory_depth)

    def _heads(self, x: Tensor) -> Tensor:
        """[..., c] -> [..., h, d]."""
        return x.unflatten(-1, (-1, self.head_dim))

    # ------------------------------------------------------------------------------------------------------------- calls

    def start(self, batch: int, persistent: Tensor | None = None) -> MemoryLayerState | None:
        """The state before the first token: the learned initial weights, after the persistent tokens [p, c] if any.

        Persistent tokens do not depend on the input, so one row of them is scanned and shared by the whole batch. A new
        gradient chunk begins after them, which keeps the chunk grid of the sequence independent of their number.
        """
        if persistent is None:
            return None
        with self.sequence.whole():
            _, _, (tails, memory) = self._scan(persistent[None], None)
        weights, momentum = (
            tuple(x.expand(batch, -1, -1, -1) for x in part) for part in (memory.weights, memory.momentum)
        )
        q_tail, k_tail, v_tail = (x.expand(batch, -1, -1) for x in tails)
        return MemoryLayerState((q_tail, k_tail, v_tail), MemoryState(weights, momentum, weights, 0))

    def forward(
        self, x: Tensor, state: MemoryLayerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryLayerState]:
        """Write x [b, t, c] into the memory and read it per token, each read including the token's own update -> [b, t, c].

        With `documents` the rows of `state` are alike, and every document begins with it."""
        if self.collect_tokens:
            assert documents is None, "documents that share a row are not looked at token by token"
            read, query, state = self._observe(x, state)
        else:
            read, query, state = self._scan(x, state, documents, signals=self.collect_signals)
        return self.leave(read, x, query), state

    def begin_anew(self, state: MemoryLayerState, rows: Tensor) -> MemoryLayerState:
        """`state`, at the start of a chunk, with the rows where `rows` [b] is true as before the first token."""
        tails = tuple(tail.masked_fill(rows[:, None, None], 0.0) for tail in state.tails)
        at = rows[:, None, None, None]
        initial = self.initial_memory(len(rows))
        weights = tuple(torch.where(at, w0, w) for w0, w in zip(initial.weights, state.memory.weights, strict=True))
        momentum = tuple(s.masked_fill(at, 0.0) for s in state.memory.momentum)
        return MemoryLayerState((tails[0], tails[1], tails[2]), MemoryState(weights, momentum, weights, 0))

    def recall(self, weights: tuple[Tensor, ...], queries: Tensor, x: Tensor) -> Tensor:
        """Read fixed weights [b, h, in, out] at queries [b, t, h, d] (MAC's first read; no update); x gates -> [b, t, c]."""
        read = memory_read(queries, weights, self.inner_norm_weight, self.inner_norm_bias, self.options)
        return self.leave(read, x)

    def initial_memory(self, batch: int) -> MemoryState:
        """W = W_init, S = 0, for `batch` rows."""
        return initial_state(tuple(self.initial_weights), batch)

    def leave(self, read: Tensor, x: Tensor, query: Tensor | None = None) -> Tensor:
        """read [b, t, h, d] -> per-head RMS norm, gate by a linear layer of x (by `query` in the h3 arrangement), output
        projection -> [b, t, c]."""
        gate = query if self.read_gate is None else F.silu(self.read_gate(x))
        assert gate is not None, "in the h3 arrangement the query is the gate"
        return self.output(self.read_norm(read).flatten(-2) * gate)

    def _scan(
        self,
        x: Tensor,
        state: MemoryLayerState | None,
        documents: Documents | None = None,
        signals: bool = False,
    ) -> tuple[Tensor, Tensor | None, MemoryLayerState]:
        """-> the read [b, t, h, d], in the h3 arrangement the query as projected [b, t, c], and the state."""
        (q, k, v), query, tails, gates = self._scan_inputs(x, state, documents)
        result = self.sequence.memory_scan(
            q,
            k,
            v,
            *gates,
            tuple(self.initial_weights),
            self.inner_norm_weight,
            self.inner_norm_bias,
            None if state is None else state.memory,
            self.options,
            document_starts=None if documents is None else documents.starts,
            fresh=None if documents is None or state is None else state.memory.first_row(),
            return_signals=signals,
        )
        if signals:
            self._record(result[2], *gates)
        return result[0], query, MemoryLayerState(tails, result[1])

    def _observe(self, x: Tensor, state: MemoryLayerState | None) -> tuple[Tensor, Tensor | None, MemoryLayerState]:
        """`_scan`, and the signals of every token."""
        (q, k, v), query, tails, (log_gamma, log_eta, theta) = self._scan_inputs(x, state)
        read, memory, surprise = scan_with_surprise(
            q, k, v, log_gamma, log_eta, theta, tuple(self.initial_weights), self.inner_norm_weight,
            self.inner_norm_bias, None if state is None else state.memory, self.options,
        )  # fmt: skip
        alpha = None if log_gamma is None else -torch.expm1(log_gamma)
        self.token_signals.append(TokenSignals(*surprise, theta, None if log_eta is None else log_eta.exp(), alpha))
        return read, query, MemoryLayerState(tails, memory)

    def _scan_inputs(
        self, x: Tensor, state: MemoryLayerState | None, documents: Documents | None = None
    ) -> tuple[
        tuple[Tensor, ...],
        Tensor | None,
        tuple[Tensor, Tensor, Tensor],
        tuple[Tensor | None, Tensor | None, Tensor],
    ]:
        """x [b, t, c] -> q, k, v [b, t, h, d], in the h3 arrangement the query as projected [b, t, c], the convolutions' new
        tails, and `gates`."""
        tails: tuple[Tensor | None, ...] = (None, None, None) if state is None else state.tails
        query = self.query(x) if self.query_conv is None else None
        if query is None:
            q, query_tail = self.queries(x, tails[0], self.sequence, documents)
        else:
            q, query_tail = unit(self._heads(query)), query.new_empty(len(x), 0, query.shape[-1])
        k, key_tail = convolve(self.key(x), self.key_conv, tails[1], self.sequence, documents)
        if self.value_conv is None:
            v, value_tail = k * self.value(x), k.new_empty(len(x), 0, k.shape[-1])
        else:
            k = F.silu(k)
            v, value_tail = convolve(self.value(x), self.value_conv, tails[2], self.sequence, documents)
            v = F.silu(v)
        return (
            (q, unit(self._heads(k)), self._heads(v)),
            query,
            (query_tail, key_tail, value_tail),
            self.gates(x),
        )

    @torch.no_grad()
    def _record(
        self,
        scanned: dict[str, Tensor],
        log_gamma: Tensor | None,
        log_eta: Tensor | None,
        theta: Tensor,
    ) -> None:
        """Scalars that show whether the memory is alive: what the scan says of itself, and how it is gated."""
        self.signals = {**scanned, "theta_mean": theta.mean()}
        if log_gamma is not None:
            self.signals["alpha_mean"] = -torch.expm1(log_gamma).mean()
        if log_eta is not None:
            self.signals["eta_mean"] = log_eta.exp().mean()
