"""What the tests of recurrences ask: outputs, states and gradients of the whole, in pieces, and document by document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scan = Callable[..., tuple[Tensor, Tensor]]
LENGTHS = [1, 63, 64, 100, 200]


def outcome(scan: Scan, per_token: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    """Outputs, last state, and the gradient of every input, of a loss in which every number counts differently."""
    inputs = [x.detach().clone().requires_grad_() for x in (*per_token, state)]
    out, after = scan(*inputs)
    weights = (torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in (out, after))
    loss = sum((x * w).sum() for x, w in zip((out, after), weights, strict=True))
    assert isinstance(loss, Tensor)
    return [out.detach(), after.detach(), *torch.autograd.grad(loss, inputs)]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), place
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0), place


def in_pieces(scan: Scan, cuts: Sequence[int]) -> Scan:
    """`scan` with the state carried over `cuts`."""

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *per_token, state = inputs
        outputs = []
        for start, stop in zip((0, *cuts), (*cuts, per_token[0].shape[1]), strict=True):
            out, state = scan(*(x[:, start:stop] for x in per_token), state)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    return run


def document_by_document(scan: Scan, starts: Tensor) -> Scan:
    """`scan` of every document by itself, of which only a row's first, if it goes on, finds a state."""

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *per_token, state = inputs
        outputs, after = [], []
        for row, begins in enumerate(starts):
            cuts = [0, *(i for i in begins.nonzero()[:, 0].tolist() if i), starts.shape[1]]
            parts, last = [], state[row : row + 1]
            for start, stop in itertools.pairwise(cuts):
                if begins[start]:
                    last = torch.zeros_like(last)
                out, last = scan(*(x[row : row + 1, start:stop] for x in per_token), last)
                parts.append(out)
            outputs.append(torch.cat(parts, dim=1))
            after.append(last)
        return torch.cat(outputs), torch.cat(after)

    return run


def document_starts(length: int) -> Tensor:
    """Two rows: documents of one token, several in a chunk, over chunks; the second row begins inside one."""
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, [i for i in (0, 1, 2, 30, 64, 70, 191) if i < length]] = True
    starts[1, [i for i in (63, 65, 128) if i < length]] = True
    return starts
