"""Does an independent implementation agree? titans-pytorch's NeuralMemory, where its update rule is ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.memory import MemoryOptions, MemoryState, memory_scan
from titans_pretrain.memory.titans_pytorch import import_state

pytest.importorskip("titans_pytorch")
from titans_pytorch import NeuralMemory

HEADS, HEAD_DIM, CHUNK = 2, 8, 8


@pytest.fixture(autouse=True)
def float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def build(depth: int, **settings: Any) -> NeuralMemory:
    torch.manual_seed(depth)
    shape = dict(depth=depth, expansion_factor=2.0)
    plain = dict(chunk_size=1, batch_size=CHUNK, mem_model_norm_add_residual=False, default_step_transform_max_lr=0.1)
    return NeuralMemory(
        HEADS * HEAD_DIM, dim_head=HEAD_DIM, heads=HEADS, default_model_kwargs=shape, **{**plain, **settings}
    )


def ours(theirs: NeuralMemory, x: Tensor, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
    """Their projections and way out around our scan."""
    seq, batch = theirs.store_norm(x), len(x)
    k, v, q = (
        theirs.split_heads(layer(seq)).transpose(1, 2)
        for layer in (theirs.to_keys, theirs.to_values, theirs.to_queries)
    )
    depth = len(theirs.memory_model_parameters)

    def gate(value: Tensor) -> Tensor:  # [(b h), t] -> [b, t, h, l]
        return value.unflatten(0, (batch, HEADS)).transpose(1, 2)[..., None].expand(-1, -1, -1, depth)

    step = theirs.adaptive_step_transform(theirs.to_adaptive_step(seq))
    log_gamma = torch.nn.functional.logsigmoid(-theirs.to_decay_factor(seq).squeeze(-1))
    log_eta = None
    if theirs.to_momentum is not None:
        log_eta = gate(torch.nn.functional.logsigmoid(theirs.to_momentum(seq)[0].squeeze(-1)))
    read, state = memory_scan(
        q,
        k,
        v,
        gate(log_gamma),
        log_eta,
        gate(2 / HEAD_DIM * step),
        tuple(theirs.memory_model_parameters),
        None,
        None,
        state,
        MemoryOptions(CHUNK, forget_toward="zero"),
    )
    values = read.transpose(1, 2) * theirs.retrieve_gate(theirs.retrieve_norm(x))
    return theirs.combine_heads(theirs.merge_heads(values)), state


def assert_close(mine: Tensor, other: Tensor) -> None:
    assert (mine - other).abs().max() <= 1e-10 * other.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_same_reads_and_the_same_memory(depth: int) -> None:
    theirs = build(depth)
    x = torch.randn(2, 3 * CHUNK + 5, HEADS * HEAD_DIM)
    expected, after = theirs(x)
    read, state = ours(theirs, x, None)
    assert_close(read, expected)
    imported = import_state(after, HEADS, CHUNK)
    assert imported.offset == state.offset == 5
    for mine, other in zip(state[:3], imported[:3], strict=True):
        for a, b in zip(mine, other, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("cut", [CHUNK, CHUNK + 3])
def test_a_state_goes_on_here(cut: int) -> None:
    theirs = build(2)
    x = torch.randn(2, 3 * CHUNK, HEADS * HEAD_DIM)
    expected, _ = theirs(x)
    _, state = theirs(x[:, :cut])
    read, _ = ours(theirs, x[:, cut:], import_state(state, HEADS, CHUNK))
    assert_close(read, expected[:, cut:])


def test_other_memories_are_refused() -> None:
    x = torch.randn(1, CHUNK + 3, HEADS * HEAD_DIM)

    def refused(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            import_state(build(2, **settings)(x)[1], HEADS, CHUNK)
        return str(caught.value)

    assert "3 tokens wait" in refused(chunk_size=4)
    assert "norm.gamma" in refused(mem_model_norm_add_residual=True)
    assert "momentum of order 2" in refused(momentum_order=2)
    with pytest.raises(UserError, match="2 memories, which 3 heads"):
        import_state(build(2)(x)[1], 3, CHUNK)
