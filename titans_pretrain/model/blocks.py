"""The four Titans blocks: memory as context (MAC), as gate (MAG), as layer (MAL), alone (LMM); method.md section 2.

Every block maps x [b, t, c] and a state to x [b, t, c] and the state after the last token, for any t: training, prefill
and decoding are one code path. `state=None` is the beginning of a sequence. `documents` (whole rows only, `state=None`)
begins several in a row, each computed as if it were alone; the state after that is of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.attention import Attention, AttentionState
from titans_pretrain.model.attention_scores import attend, segment_mask, with_prefix
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import FeedForward, RMSNorm, rotate
from titans_pretrain.model.neural_memory import MemoryLayerState, NeuralMemory
from titans_pretrain.model.sequence import LocalSequence

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh}


class Block(nn.Module):
    """What all Titans blocks share: the mixer's pre-norm, the feed-forward after it, and the persistent tokens.

    Persistent tokens join after the pre-norm: they are free parameters, a norm would only rescale them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.resolved_hidden_dim)
        self.persistent = (
            nn.Parameter(torch.empty(config.num_persistent, config.dim))
            if config.num_persistent and config.has_memory
            else None
        )

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: Any = None, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        x, state = self.mix(x, rotary, state, documents)
        return x + self.feed_forward(self.feed_forward_norm(x)), state

    def mix(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: Any, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        """The sequence mixer with its residual."""
        raise NotImplementedError


class MemoryGate(nn.Module):
    """norm(y) * sigma(norm(m)) with learned vector weights: the memory branch m gates the attention branch y."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.memory_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.activation = GATE_ACTIVATIONS[config.gate_activation]

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.attention_norm(y) * self.activation(self.memory_norm(m))


class HybridState(NamedTuple):
    """State of MAG and MAL: the two branches'."""

    memory: MemoryLayerState
    attention: AttentionState


class MAGBlock(Block):
    """Memory as a gate: o = norm(SWA(x)) * sigma(norm(M(x)))."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__(config)
        self.attention = Attention(config, config.window, sequence)
        self.memory = NeuralMemory(config, sequence)
        self.gate = MemoryGate(config)

    def mix(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: HybridState | None, documents: Documents | None = None
    ) -> tuple[Tensor, HybridState]:
        h = self.mixer_norm(x)
        y, attention = self.attention(h, rotary, self.persistent, state and state.attention, documents)
        start = state.memory if state else self.memory.start(x.shape[0], self.persistent)
        m, memory = self.memory(h, start, documents)
        return x + self.gate(y, m), HybridState(memory, attention)


class MALBlock(Block):
    """Memory as a layer: SWA(M(x)), in series. With `mal_residual` each of the two is a residual sublayer."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__(config)
        self.memory = NeuralMemory(config, sequence)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, config.window, sequence)
        self.residual = config.mal_residual

    def mix(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: HybridState | None, documents: Documents | None = None
    ) -> tuple[Tensor, HybridState]:
        start = state.memory if state else self.memory.start(x.shape[0], self.persistent)
        m, memory = self.memory(self.mixer_norm(x), start, documents)
        u = x + m if self.residual else m
        normed = self.attention_norm(u)
        y, attention = self.attention(normed, rotary, self.persistent, state and state.attention, documents)
        return (u if self.residual else x) + y, HybridState(memory, attention)


class LMMBlock(Block):
    """The neural memory alone as the sequence mixer."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__(config)
        self.memory = NeuralMemory(config, sequence)

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: MemoryLayerState | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, MemoryLayerState]:
        start = state or self.memory.start(x.shape[0], self.persistent)
        m, memory = self.memory(self.mixer_norm(x), start, documents)
        return x + m, memory


class MACState(NamedTuple):
    """State of MAC inside a segment."""

    memory: MemoryLayerState
    """The memory as it stands, fed by the attention's output."""
    recalled: tuple[Tensor, ...]
    """Its weights at the end of the previous segment, which the first read uses for the whole segment."""
    recall_tail: Tensor
    """Last inputs of the query convolution over the segment tokens."""
    context: tuple[AttentionState, AttentionState] | None
    """Keys and values so far of the retrieved tokens and of the segment's own; None at the start of a segment."""
    place: int
    """Tokens of the open segment already consumed."""
    row_places: Tensor | None = None
    """int64 [b]: the place of each row where rows differ, which then go on one token at a time; `place` is 0. The context
    then has room for a whole segment, filled from its beginning; what a row has not filled is not seen."""


class MACBlock(Block):
    """Memory as a context. Per segment S: h = M(q(S)) with the previous segment's memory; attention over
    [persistent | h | S], causal in both; the memory learns the attention's output y and gates it: norm(y) * sigma(norm(M(y))).

    The first read shares the memory's query projection and its way out (norm, gate, projection) with the second.
    """

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__(config)
        self.attention = Attention(config, None, sequence)
        self.memory_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.memory = NeuralMemory(config, LocalSequence())  # it sees one segment at a time, with the state before it
        self.gate = MemoryGate(config)
        self.segment_len = config.segment_len
        self.retrieve_every = config.retrieve_every
        self.sequence = sequence

    def mix(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: MACState | None, documents: Documents | None = None
    ) -> tuple[Tensor, MACState]:
        tokens = self.mixer_norm(x)
        # What does not depend on the memory's state is done once for all segments.
        tail = None if state is None else state.recall_tail
        recall_queries, recall_tail = self.memory.queries(tokens, tail, self.sequence, documents)
        queries = rotate(self.attention.heads(self.attention.query(tokens)), rotary)
        keys, values = self.attention.keys_and_values(tokens)
        keys = rotate(keys, rotary)
        prefix = None if self.persistent is None else self.attention.keys_and_values(self.persistent)
        if state is None:
            state = self._start(x, recall_tail)
        if state.row_places is not None:
            own = AttentionState(keys, values)
            output, state = self._token_of_rows(tokens, recall_queries, queries, own, prefix, rotary, state)
            return x + output, state._replace(recall_tail=recall_tail)

        outputs = []
        start = 0
        while start < x.shape[1]:
            stop = min(x.shape[1], start + self.segment_len - state.place)
            rows = slice(start, stop)
            if documents is not None and start > 0:  # a document's first segment reads the memory as it begins
                memory = self.memory.begin_anew(state.memory, documents.starts[:, start // self.segment_len])
                state = state._replace(memory=memory, recalled=memory.memory.weights)
            own = AttentionState(keys[:, rows], values[:, rows])
            output, state = self._segment(
                tokens[:, rows],
                recall_queries[:, rows],
                queries[:, rows],
                own,
                prefix,
                _at(rotary, rows),
                state,
            )
            outputs.append(output)
            start = stop
        output = self.sequence.hand_on_memory(torch.cat(outputs, dim=1), state.memory)
        return x + output, state._replace(recall_tail=recall_tail)

    def _start(self, x: Tensor, recall_tail: Tensor) -> MACState:
        no_tail = x.new_zeros(x.shape[0], self.memory.key_conv.halo, recall_tail.shape[-1])
        start = MemoryLayerState((no_tail, no_tail, no_tail), self.memory.initial_memory(x.shape[0]))
        memory = self.sequence.memory_before(start)
        return MACState(memory, memory.memory.weights, recall_tail, None, 0)

    def _segment(
        self,
        tokens: Tensor,
        recall_queries: Tensor,
        queries: Tensor,
        own: AttentionState,
        prefix: tuple[Tensor, Tensor] | None,
        rotary: tuple[Tensor, Tensor],
        state: MACState,
    ) -> tuple[Tensor, MACState]:
        """Tokens of one segment, from place state.place on (a decode step brings one, training the whole segment)."""
        first, length = state.place, tokens.shape[1]
        # Of the retrieved tokens every n-th of the segment stays in the context, at the position of the token it answers.
        skipped = (self.retrieve_every - 1 - first) % self.retrieve_every
        kept = slice(skipped, None, self.retrieve_every)
        retrieved = self.memory.recall(state.recalled, recall_queries[:, kept], tokens[:, kept])
        h_keys, h_values = self.attention.keys_and_values(retrieved)
        h = AttentionState(rotate(h_keys, _at(rotary, kept)), h_values)
        if state.context is not None:
            h, own = (
                AttentionState(torch.cat((old.keys, new.keys), dim=1), torch.cat((old.values, new.values), dim=1))
                for old, new in zip(state.context, (h, own), strict=True)
            )
        all_keys, all_values = torch.cat((h.keys, own.keys), dim=1), torch.cat((h.values, own.values), dim=1)
        if prefix is not None:
            all_keys, all_values = with_prefix(prefix[0], all_keys), with_prefix(prefix[1], all_values)
        mask = segment_mask(
            first, length, self.retrieve_every, 0 if prefix is None else prefix[0].shape[0], tokens.device
        )
        y = self.attention.output(attend(queries, all_keys, all_values, mask).flatten(-2))

        m, memory = self.memory(self.memory_norm(y), state.memory)
        place = first + length
        state = state._replace(memory=memory, context=(h, own), place=place)
        if place == self.segment_len:  # the next segment begins: it reads what the memory knows now
            memory = memory.close_chunk()
            state = state._replace(memory=memory, recalled=memory.memory.weights, context=None, place=0)
        return self.gate(y, m), state

    def _token_of_rows(
        self,
        tokens: Tensor,
        recall_queries: Tensor,
        queries: Tensor,
        own: AttentionState,
        prefix: tuple[Tensor, Tensor] | None,
        rotary: tuple[Tensor, Tensor],
        state: MACState,
    ) -> tuple[Tensor, MACState]:
        """`_segment` for one token of each row, the rows at different places of their segments."""
        assert tokens.shape[1] == 1, "rows at different places go on one token at a time"
        assert state.row_places is not None
        assert state.context is not None
        places, every = state.row_places, self.retrieve_every
        retrieved = self.memory.recall(state.recalled, recall_queries, tokens)
        h_keys, h_values = self.attention.keys_and_values(retrieved)
        # A retrieved token that does not stay is put where the next one goes, and is not seen.
        h = _put(state.context[0], AttentionState(rotate(h_keys, rotary), h_values), places // every)
        own = _put(state.context[1], own, places)
        seen = torch.cat((_first(h.keys, (places + 1) // every), _first(own.keys, places + 1)), dim=1)
        all_keys, all_values = torch.cat((h.keys, own.keys), dim=1), torch.cat((h.values, own.values), dim=1)
        if prefix is not None:
            all_keys, all_values = with_prefix(prefix[0], all_keys), with_prefix(prefix[1], all_values)
            seen = F.pad(seen, (prefix[0].shape[0], 0), value=True)
        y = self.attention.output(attend(queries, all_keys, all_values, seen[:, None, None]).flatten(-2))
        m, layer = self.memory(self.memory_norm(y), state.memory)

        places = (places + 1) % self.segment_len
        ended = places == 0
        at = ended[:, None, None, None]
        memory = layer.memory
        recalled = tuple(torch.where(at, w, r) for w, r in zip(memory.weights, state.recalled, strict=True))
        anchor = tuple(torch.where(at, w, a) for w, a in zip(memory.weights, memory.anchor, strict=True))
        offsets = memory.row_offsets
        if offsets is not None:
            memory = memory._replace(anchor=anchor, row_offsets=offsets.masked_fill(ended, 0))
        state = MACState(layer._replace(memory=memory), recalled, state.recall_tail, (h, own), 0, places)
        return self.gate(y, m), state


def _put(context: AttentionState, new: AttentionState, at: Tensor) -> AttentionState:
    """`context` [b, s, ...] with the one token of `new` at place `at` [b] of each row; beyond s: nowhere."""
    here = (torch.arange(context.keys.shape[1], device=at.device) == at[:, None])[..., None, None]
    return AttentionState(torch.where(here, new.keys, context.keys), torch.where(here, new.values, context.values))


def _first(keys: Tensor, count: Tensor) -> Tensor:
    """keys [b, s, ...], count [b] -> bool [b, s]: the first `count` of each row."""
    return torch.arange(keys.shape[1], device=count.device) < count[:, None]


def _at(rotary: tuple[Tensor, Tensor], tokens: slice) -> tuple[Tensor, Tensor]:
    """The rotary table of some of its tokens."""
    return rotary[0][..., tokens, :, :], rotary[1][..., tokens, :, :]
