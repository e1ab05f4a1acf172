"""Random inputs of the memory at a size a token loop can take, and how results are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory import MemoryOptions, MemoryState, memory_scan


class Problem(NamedTuple):
    """The tensor arguments of `memory_scan`, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gamma: Tensor | None
    log_eta: Tensor | None
    theta: Tensor
    initial_weights: tuple[Tensor, ...]
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def tokens(self, start: int, stop: int) -> Problem:
        per_token = (x if x is None else x[:, start:stop] for x in self[:6])
        return Problem(*per_token, *self[6:])  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        return [*(x for x in (*self[:6], *self[7:]) if x is not None), *self.initial_weights]  # type: ignore[misc]

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(cast(x, dtype) for x in self))  # type: ignore[arg-type]

    def require_grad(self) -> Problem:
        for x in self.tensors():
            x.requires_grad_()
        return self


def cast(x: Any, dtype: torch.dtype) -> Any:
    if x is None:
        return None
    return tuple(w.to(dtype) for w in x) if isinstance(x, tuple) else x.to(dtype)


def make_problem(
    length: int,
    depth: int = 2,
    *,
    batch: int = 1,
    heads: int = 2,
    width: int = 4,
    hidden: int = 6,
    norm: bool = True,
    momentum: bool = True,
    forgetting: bool = True,
    shared_gates: bool = False,
    seed: int = 0,
) -> Problem:
    """Float64; keys of unit length; alpha about 0.02, eta about 0.5, theta up to 0.2; every token its own gates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def gate() -> Tensor:
        x = normal(batch, length, heads, 1 if shared_gates else depth)
        return x.expand(-1, -1, -1, depth).contiguous()

    widths = [width, *[hidden] * (depth - 1), width]
    return Problem(
        q=F.normalize(normal(batch, length, heads, width), dim=-1),
        k=F.normalize(normal(batch, length, heads, width), dim=-1),
        v=normal(batch, length, heads, width),
        log_gamma=F.logsigmoid(gate() + 4.0) if forgetting else None,
        log_eta=F.logsigmoid(gate()) if momentum else None,
        theta=0.2 * torch.sigmoid(gate()),
        initial_weights=tuple(normal(heads, a, b) / a**0.5 for a, b in itertools.pairwise(widths)),
        norm_weight=1.0 + 0.2 * normal(heads, width) if norm else None,
        norm_bias=0.2 * normal(heads, width) if norm else None,
    )


def make_state(problem: Problem, offset: int, seed: int = 1) -> MemoryState:
    """A state in mid-chunk: weights that have moved away from the anchor, and momentum."""
    generator = torch.Generator().manual_seed(seed)
    batch = problem.q.shape[0]

    def moved(scale: float, base: float = 1.0) -> tuple[Tensor, ...]:
        return tuple(
            base * w + scale * torch.randn(batch, *w.shape, dtype=w.dtype, generator=generator)
            for w in problem.initial_weights
        )

    return MemoryState(moved(0.3), moved(0.2, base=0.0), moved(0.3), offset)


@torch.no_grad()
def make_fresh(problem: Problem, seed: int = 2) -> MemoryState:
    """What a document starts from other than the initial weights: one row, at the start of a chunk."""
    one_row = problem._replace(q=problem.q[:1])
    weights, momentum, *_ = make_state(one_row, 0, seed)
    return MemoryState(weights, momentum, weights, 0)


def scan_in_parts(
    problem: Problem, cuts: Iterable[int], options: MemoryOptions, state: MemoryState | None = None, path: str = "auto"
) -> tuple[Tensor, MemoryState]:
    """The sequence cut at `cuts`, the state carried from part to part."""
    bounds = [0, *cuts, problem.q.shape[1]]
    outputs = []
    for start, stop in itertools.pairwise(bounds):
        out, state = memory_scan(*problem.tokens(start, stop), state, options, path=path)
        outputs.append(out)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def state_tensors(state: MemoryState) -> list[Tensor]:
    return [*state.weights, *state.momentum, *state.anchor]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value (absolute where all expected values are zero)."""
    scale = expected.abs().max().item() or 1.0
    return (found - expected).abs().max().item() / scale


def assert_same(
    found: tuple[Tensor, MemoryState], expected: tuple[Tensor, MemoryState], tolerance: float = 1e-10
) -> None:
    """Outputs and every tensor of the final state agree; so does the place in the chunk."""
    assert found[1].offset == expected[1].offset
    pairs = zip([found[0], *state_tensors(found[1])], [expected[0], *state_tensors(expected[1])], strict=True)
    for index, (a, b) in enumerate(pairs):
        assert a.shape == b.shape
        assert error(a, b) < tolerance, f"tensor {index}"
