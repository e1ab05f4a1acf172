"""The Recurrent Memory Transformer (arXiv 2207.06881, its decoder): what passes from segment to segment of a sequence, and how.

The sequence is cut into segments of L = config.segment_len tokens. Each runs through the whole stack of blocks as one input
[memory | segment | memory]: m = config.num_memory_tokens vectors in front, which the segment reads, and the same vectors
again behind it, to be written. What stands there after the last block is the memory of the next segment; the first
segment's is learned. So the next segment's first block needs this one's last, and the recurrence belongs to the model, not to
a block: `Titans` hands its blocks to `SegmentRecurrence`.

What the paper leaves open, and what holds here (docs/method.md section 2):

- Front vectors see each other, in both directions, as in the authors' code; tokens see the front and the tokens before them;
  the vectors behind see everything, each other included, and nobody sees them. No token sees a later one by any way.
- Rotary positions count from the beginning of a segment's input, 0 .. L + 2m - 1, so that every segment looks alike and no
  length is new.
- What was written passes through an RMS norm of its own: the residual stream of a pre-norm network grows with depth, and
  would grow from segment to segment.
- Gradients flow through all segments of a row (back-propagation through time, not truncated: a training row has few).
- The last segment of a training row writes nothing, for there is no one to read it.

Shapes: b batch, t time, c channels, h heads, d head_dim, m memory tokens, L segment length, s places of a segment's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.attention import Attention, AttentionState
from titans_pretrain.model.attention_scores import attend
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import FeedForward, RMSNorm, rotary_table, rotate
from titans_pretrain.model.sequence import LocalSequence


class RMTBlock(nn.Module):
    """Pre-norm attention over what a mask shows, and SwiGLU: a Transformer block, over the input of one segment."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.resolved_hidden_dim)
        self.attention = Attention(config, None, sequence)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: AttentionState | None, visible: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """x [b, t, c], the keys and values so far [b, s, h, d] of the segment's input, and what each query sees of those and
        its own: bool [t, s + t] or [b, 1, t, s + t] -> [b, t, c] and keys and values [b, s + t, h, d]."""
        attention, h = self.attention, self.mixer_norm(x)
        queries = rotate(attention.heads(attention.query(h)), rotary)
        keys, values = attention.keys_and_values(h)
        keys = rotate(keys, rotary)
        if state is not None:
            keys, values = torch.cat((state.keys, keys), dim=1), torch.cat((state.values, values), dim=1)
        x = x + attention.output(attend(queries, keys, values, visible).flatten(-2))
        return x + self.feed_forward(self.feed_forward_norm(x)), AttentionState(keys, values)


class RMTState(NamedTuple):
    """State of the whole stack inside a segment, whose memory its blocks have read already."""

    memory: Tensor
    """[b, m, c]: the memory this segment reads, and at its end writes."""
    caches: tuple[AttentionState, ...]
    """Of each block, the keys and values of the segment's input so far: memory, then tokens."""
    place: int
    """Tokens of the open segment already consumed."""
    row_places: Tensor | None = None
    """int64 [b]: the place of each row where rows differ, which then go on one token at a time; `place` is 0. The caches
    then have room for a whole segment, filled from its beginning; what a row has not filled is not seen."""


class MemoryTokens(nn.Module):
    """What the first segment reads. weight: [m, c]."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self, batch: int) -> Tensor:
        """-> [batch, m, c]."""
        return self.weight.expand(batch, -1, -1)


def visible_places(first: int, stop: int, memory_tokens: int, segment_len: int, device: torch.device) -> Tensor:
    """What the places first .. stop - 1 of a segment's input [memory | segment | memory] see of its places 0 .. stop - 1:
    those before them and themselves, and within either memory also those after.

    Returns:
        bool [stop - first, stop].
    """
    key = torch.arange(stop, device=device)
    query = key[first:, None]
    behind = memory_tokens + segment_len
    in_front = (query < memory_tokens) & (key < memory_tokens)
    return (key <= query) | in_front | ((query >= behind) & (key >= behind))


class SegmentRecurrence(nn.Module):
    """Runs sequences through a stack of `RMTBlock`s, segment by segment."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.memory_tokens = MemoryTokens(config.num_memory_tokens, config.dim)
        self.memory_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.count = config.num_memory_tokens
        self.segment_len = config.segment_len
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta

    def forward(
        self,
        x: Tensor,
        blocks: Iterable[nn.Module],
        run: Callable[..., Tensor],
        documents: Documents | None = None,
    ) -> Tensor:
        """Whole sequences, for training. x [b, t, c] -> [b, t, c].

        Args:
            run: called as run(block, x, rotary, visible) -> x after the block.
            documents: on the segment grid; a document begins with the learned memory.
        """
        blocks, initial = list(blocks), self.memory_tokens(x.shape[0])
        memory, length = initial, x.shape[1]
        rotary, visible = self._places(0, self._end(length), x.device)
        outputs = []
        for start in range(0, length, self.segment_len):
            if documents is not None and start > 0:
                anew = documents.starts[:, start // self.segment_len, None, None]
                memory = torch.where(anew, initial, memory)
            segment = x[:, start : start + self.segment_len]
            stop = self.count + segment.shape[1]
            if start + self.segment_len < length:
                whole = torch.cat((memory, segment, memory), dim=1)
                for block in blocks:
                    whole = run(block, whole, rotary, visible)
                memory = self.memory_norm(whole[:, stop:])
            else:
                whole = torch.cat((memory, segment), dim=1)
                last = (rotary[0][:stop], rotary[1][:stop]), visible[:stop, :stop].contiguous()
                for block in blocks:
                    whole = run(block, whole, *last)
            outputs.append(whole[:, self.count : stop])
        return torch.cat(outputs, dim=1)

    def advance(self, x: Tensor, blocks: Iterable[nn.Module], state: RMTState | None) -> tuple[Tensor, RMTState]:
        """The next tokens x [b, t, c] of each sequence -> [b, t, c] and the state after them. None: they are the first."""
        blocks = list(blocks)
        if state is not None and state.row_places is not None:
            return self._token_of_rows(x, blocks, state)
        memory, caches, place = (self.memory_tokens(x.shape[0]), (), 0) if state is None else state[:3]
        outputs, start = [], 0
        while start < x.shape[1]:
            stop = min(x.shape[1], start + self.segment_len - place)
            ends = place + stop - start == self.segment_len
            own = x[:, start:stop]
            first = self.count + place if caches else 0
            parts = [own] if caches else [memory, own]
            out, caches = self._run(torch.cat([*parts, memory] if ends else parts, dim=1), blocks, caches, first)
            skipped = self.count + place - first
            outputs.append(out[:, skipped : skipped + stop - start])
            place += stop - start
            if ends:
                memory, caches, place = self.memory_norm(out[:, -self.count :]), (), 0
            start = stop
        if not caches:  # so that a state needs no block to be joined with others
            _, caches = self._run(memory, blocks, caches, 0)
        return torch.cat(outputs, dim=1), RMTState(memory, caches, place)

    def _token_of_rows(self, x: Tensor, blocks: list[nn.Module], state: RMTState) -> tuple[Tensor, RMTState]:
        """`advance` for one token of each row, the rows at different places of their segments."""
        assert x.shape[1] == 1, "rows at different places go on one token at a time"
        assert state.row_places is not None
        places = self.count + state.row_places
        rotary = rotary_table(places[:, None], self.head_dim, self.rope_theta)
        room = torch.arange(self.count + self.segment_len, device=x.device)
        # The token is the last key, and goes to its place afterwards.
        visible = torch.cat((room < places[:, None], torch.ones_like(places[:, None], dtype=torch.bool)), dim=1)
        caches = []
        for block, cache in zip(blocks, state.caches, strict=True):
            x, (keys, values, _) = block(x, rotary, cache, visible[:, None, None])
            here = (room == places[:, None])[..., None, None]
            caches.append(
                AttentionState(
                    torch.where(here, keys[:, -1:], cache.keys), torch.where(here, values[:, -1:], cache.values)
                )
            )
        memory, row_places = state.memory, (state.row_places + 1) % self.segment_len
        ended = (row_places == 0).nonzero()[:, 0]
        if len(ended):  # one question to the device a token, against two memories through all blocks
            memory, caches = self._next_segment(ended, blocks, memory, caches)
        return x, RMTState(memory, tuple(caches), 0, row_places)

    def _next_segment(
        self, rows: Tensor, blocks: list[nn.Module], memory: Tensor, caches: list[AttentionState]
    ) -> tuple[Tensor, list[AttentionState]]:
        """Write the memory of the rows `rows`, whose segments are full, and let the blocks read it for the next."""
        full = tuple(AttentionState(cache.keys[rows], cache.values[rows]) for cache in caches)
        out, _ = self._run(memory[rows], blocks, full, self.count + self.segment_len)
        written = self.memory_norm(out)
        _, read = self._run(written, blocks, (), 0)
        begun = []
        for cache, new in zip(caches, read, strict=True):
            keys, values = cache.keys.clone(), cache.values.clone()
            keys[rows, : self.count], values[rows, : self.count] = new.keys, new.values
            begun.append(AttentionState(keys, values))
        return memory.index_copy(0, rows, written), begun

    def _run(
        self, x: Tensor, blocks: list[nn.Module], caches: tuple[AttentionState, ...], first: int
    ) -> tuple[Tensor, tuple[AttentionState, ...]]:
        """x [b, t, c], places first .. first + t of a segment's input, through all blocks; () where first is 0."""
        rotary, visible = self._places(first, first + x.shape[1], x.device)
        after = []
        for i, block in enumerate(blocks):
            x, cache = block(x, rotary, caches[i] if caches else None, visible)
            after.append(cache)
        return x, tuple(after)

    def _places(self, first: int, stop: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The rotary table of places first .. stop, and what they see."""
        positions = torch.arange(first, stop, device=device)
        rotary = rotary_table(positions, self.head_dim, self.rope_theta)
        return rotary, visible_places(first, stop, self.count, self.segment_len, device)

    def _end(self, length: int) -> int:
        """Places of the longest input of a segment in rows of `length` tokens."""
        return self.count + (length if length <= self.segment_len else self.segment_len + self.count)
