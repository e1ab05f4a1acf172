"""How the closed form cuts a sequence: into pieces, which it computes at once, and segments, which it keeps states for.

A piece is the tokens of one chunk that lie in the call, or in a chunk longer than TILE those of one tile of it. A segment
is several pieces in a row: the forward pass stores the state at its start, the backward pass rebuilds the rest from there.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from titans_pretrain.memory.gates import PieceGates, piece_gates
from titans_pretrain.memory.path import ScanInputs

TILE = 64
"""Longest piece in tokens: no gate matrix is larger than TILE x TILE."""

SEGMENT_WIDTHS = 2
"""A segment is at least this many times as many tokens as the memory's widest layer has channels. W and S of one layer
are then, spread over the segment's tokens, at most as large as q at each token (2 * in * out <= SEGMENT_WIDTHS * in *
widest), whatever the chunk."""


class Piece(NamedTuple):
    """Tokens start .. start + size - 1 of the call."""

    start: int
    size: int
    chunk: int | None
    """Which of the chunks that begin in the call begins here; None: the piece goes on in the open chunk."""

    @property
    def stop(self) -> int:
        return self.start + self.size


def tile_length(chunk_size: int) -> int:
    """Tokens of a full piece: a chunk, or TILE tokens of a longer chunk."""
    return min(chunk_size, TILE)


def cut_pieces(length: int, offset: int, chunk_size: int) -> list[Piece]:
    """The pieces of `length` tokens that begin `offset` tokens into a chunk."""
    pieces: list[Piece] = []
    start, chunks = 0, 0
    while start < length:
        size = min(length - start, chunk_size - offset, TILE)
        pieces.append(Piece(start, size, chunks if offset == 0 else None))
        chunks += offset == 0
        start, offset = start + size, (offset + size) % chunk_size
    return pieces


def cut_segments(inputs: ScanInputs, offset: int, chunk_size: int) -> list[list[Piece]]:
    """Whole chunks until there are enough tokens; a chunk that alone has more is cut between tiles, and begins a segment:
    its first state is the anchor of all its segments."""
    enough = SEGMENT_WIDTHS * max(w.shape[-1] for w in inputs.initial_weights)
    segments: list[list[Piece]] = []
    tokens = enough
    for piece in cut_pieces(inputs.q.shape[1], offset, chunk_size):
        begins, long = piece.chunk is not None, chunk_size > enough
        if not segments or (begins and long) or (tokens >= enough and (begins or long)):
            segments.append([])
            tokens = 0
        segments[-1].append(piece)
        tokens += piece.size
    return segments


def per_head(x: Tensor, start: int, stop: int) -> Tensor:
    """[b, t, h, c] -> [b * h, stop - start, c], a view where batch and heads can be joined without a copy."""
    return x[:, start:stop].transpose(1, 2).flatten(0, 1)


def per_token(x: Tensor, heads: int) -> Tensor:
    """[b * h, t, c] -> [b, t, h, c], a view."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


class GateRun(NamedTuple):
    """The gates of consecutive pieces of one size, computed together."""

    start: int
    stop: int
    log_gamma: Tensor | None
    """[pieces * l, b * h, T], the layers of a piece side by side, as the next two and all of `gates`."""
    log_eta: Tensor | None
    theta: Tensor
    gates: PieceGates


def gate_runs(inputs: ScanInputs, pieces: list[Piece]) -> list[GateRun]:
    """The gates of a segment's pieces, in as few runs as possible."""
    runs = []
    for _, group in itertools.groupby(pieces, key=lambda piece: piece.size):
        run = list(group)
        start, stop = run[0].start, run[-1].stop

        def split(x: Tensor, start: int = start, stop: int = stop, count: int = len(run)) -> Tensor:
            return x[:, start:stop].unflatten(1, (count, -1)).permute(1, 4, 0, 3, 2).flatten(2, 3).flatten(0, 1)

        log_gamma = None if inputs.log_gamma is None else split(inputs.log_gamma)
        log_eta = None if inputs.log_eta is None else split(inputs.log_eta)
        theta = split(inputs.theta)
        runs.append(GateRun(start, stop, log_gamma, log_eta, theta, piece_gates(log_gamma, log_eta, theta)))
    return runs


def gates_per_token(x: Tensor, layers: int, heads: int) -> Tensor:
    """[pieces * l, b * h, T] -> [b, pieces * T, h, l]"""
    return x.unflatten(0, (-1, layers)).unflatten(2, (-1, heads)).permute(2, 0, 4, 3, 1).flatten(1, 2)
