"""Blocks against the paper's text written out plainly, with the same parameters but none of the blocks' own control flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.tiny import random_tokens, tiny_model
from titans_pretrain.memory import begin_chunk, memory_read, memory_scan
from titans_pretrain.model.blocks import MACBlock
from titans_pretrain.model.layers import rotary_table, rotate
from titans_pretrain.model.neural_memory import MemoryLayerState


def plain_mac(block: MACBlock, x: Tensor) -> Tensor:
    """The MAC mixer by its definition (method.md section 2), one row, attention as explicit sums over visible tokens."""
    memory, attention, length = block.memory, block.attention, block.segment_len
    tokens = block.mixer_norm(x)
    queries_to_memory, _ = memory.queries(tokens, None, memory.sequence)
    state: MemoryLayerState | None = None
    outputs = []
    for start in range(0, x.shape[1], length):
        segment = tokens[:, start : start + length]
        weights = tuple(memory.initial_weights) if state is None else tuple(w[0] for w in state.memory.weights)
        h = memory.leave(
            memory_read(
                queries_to_memory[:, start : start + length],
                tuple(w[None] for w in weights),
                memory.inner_norm_weight,
                memory.inner_norm_bias,
                memory.options,
            ),
            segment,
        )
        rows = []
        for i in range(segment.shape[1]):
            table = [rotary_table(torch.tensor([start + j]), attention.head_dim, 10000.0) for j in range(i + 1)]
            q = rotate(attention.heads(attention.query(segment[:, i : i + 1])), table[i])
            context: list = []
            if block.persistent is not None:
                context += [(p, None) for p in block.persistent]
            context += [(h[0, j], j) for j in range(i + 1) if j % block.retrieve_every == block.retrieve_every - 1]
            context += [(segment[0, j], j) for j in range(i + 1)]
            scores, values = [], []
            for token, place in context:
                k = attention.heads(attention.key(token))[None, None]
                k = k if place is None else rotate(k, table[place])
                scores.append((q * k).sum(-1) / attention.head_dim**0.5)
                values.append(attention.heads(attention.value(token)))
            shares = torch.stack(scores)[:, 0, 0].softmax(dim=0)
            rows.append(attention.output((shares[..., None] * torch.stack(values)).sum(0).flatten()))
        y = torch.stack(rows)[None]
        m, state = memory(block.memory_norm(y), state or _fresh(block, y))
        state = state._replace(memory=begin_chunk(state.memory))
        outputs.append(block.gate(y, m))
    return x + torch.cat(outputs, dim=1)


def _fresh(block: MACBlock, y: Tensor) -> MemoryLayerState:
    zeros = y.new_zeros(1, block.memory.query_conv.halo, y.shape[-1])
    return MemoryLayerState((zeros, zeros, zeros), block.memory.initial_memory(1))


@pytest.mark.parametrize("retrieve_every", [1, 3])
@pytest.mark.parametrize("num_persistent", [0, 3])
@torch.no_grad()
def test_mac_equals_its_definition(retrieve_every: int, num_persistent: int) -> None:
    model = tiny_model(
        "mac", segment_len=7, memory_chunk=4, retrieve_every=retrieve_every, num_persistent=num_persistent
    )
    block = model.blocks[0]
    x = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3))
    mixed, _ = block.mix(x, rotary_table(torch.arange(24), 16, 10000.0), None)
    torch.testing.assert_close(mixed, plain_mac(block, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_persistent_tokens_in_front_of_every_row_are_the_shared_initial_state() -> None:
    """Scanning the persistent tokens once with one row equals putting them in front of each row."""
    memory = tiny_model("lmm").blocks[0].memory
    persistent = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 21, 32, generator=torch.Generator().manual_seed(2))
    shared, _ = memory(x, memory.start(3, persistent))
    _, state = memory(persistent.expand(3, -1, -1))
    in_front, _ = memory(x, state.close_chunk())
    torch.testing.assert_close(shared, in_front, rtol=1e-5, atol=1e-6)
    without, _ = memory(x)
    assert (shared - without).abs().max() > 1e-3  # they do reach the sequence


@torch.no_grad()
def test_the_h3_arrangement_equals_its_definition() -> None:
    """q * memory(shift(k), shift(k) * v), the shift a filter over four tokens, by the token-by-token recurrence."""
    memory = tiny_model("lmm", arrangement="h3").double().blocks[0].memory
    memory.read_norm.weight.add_(torch.linspace(-0.5, 0.5, 32).view(2, 16))
    x = torch.randn(2, 21, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = memory.query(x), memory.key(x), memory.value(x)
    taps = memory.key_conv.weight
    shifted = torch.zeros_like(k)
    for t in range(21):
        for back in range(min(t + 1, 4)):
            shifted[:, t] += taps[:, 3 - back] * k[:, t - back]
    unit_q, unit_k = (y.view(2, 21, 2, 16) / y.view(2, 21, 2, 16).norm(dim=-1, keepdim=True) for y in (q, shifted))
    read, _ = memory_scan(
        unit_q,
        unit_k,
        (shifted * v).view(2, 21, 2, 16),
        *memory.gates(x),
        tuple(memory.initial_weights),
        memory.inner_norm_weight,
        memory.inner_norm_bias,
        None,
        memory.options,
        path="reference",
    )
    scale = torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-5)
    expected = memory.output((read * scale * memory.read_norm.weight).flatten(-2) * q)
    torch.testing.assert_close(memory(x)[0], expected, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_theta_scaling_and_maximum() -> None:
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    scaled = tiny_model("lmm").blocks[0].memory.gates(x)
    bare = tiny_model("lmm", memory_theta_scaling="none").blocks[0].memory.gates(x)
    assert scaled[1] is not None
    torch.testing.assert_close(scaled[2], bare[2] * (1 - scaled[1].exp()))
    assert bare[2].max() < 1 / 16  # theta_max defaults to 1 / memory head_dim
    assert tiny_model("lmm", memory_theta_max=3.0).blocks[0].memory.gates(x)[2].max() > 0.5


@torch.no_grad()
def test_sliding_window_forgets_beyond_the_window_and_memory_does_not() -> None:
    """With two layers a change reaches 2 * (window - 1) tokens ahead through windows; the memory carries it further."""
    reach = {}
    for variant in ("sliding_window", "mag"):
        model = tiny_model(variant)
        tokens = random_tokens(1, 60)
        changed = tokens.clone()
        changed[0, 0] = (changed[0, 0] + 1) % 61
        difference = (model.hidden(tokens)[0] - model.hidden(changed)[0]).abs().amax(-1)[0]
        reach[variant] = int(difference.nonzero().max())
    assert reach["sliding_window"] == 2 * (12 - 1)
    assert reach["mag"] == 59
