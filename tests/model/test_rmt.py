"""The Recurrent Memory Transformer: equal to its definition written out, and what passes between segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.tiny import VOCAB, random_tokens, tiny_model
from titans_pretrain.model import Titans
from titans_pretrain.model.layers import IGNORED_LABEL, rotary_table, rotate
from titans_pretrain.model.rmt import visible_places
from titans_pretrain.model.titans import state_bytes

MEMORY, SEGMENT = 3, 20


def tiny_rmt(seed: int = 0) -> Titans:
    model = tiny_model("rmt", seed, num_memory_tokens=MEMORY, segment_len=SEGMENT).double()
    with torch.no_grad():  # ones would hide a norm that is left out
        model.segments.memory_norm.weight.add_(torch.linspace(-0.5, 0.5, 32))  # type: ignore[union-attr]
    return model


def plain_block(block: torch.nn.Module, x: Tensor, sees: list[list[int]]) -> Tensor:
    """One block over one row of a segment's input x [s, c]; sees[i]: the places that place i attends to."""
    h, attention = block.mixer_norm(x), block.attention
    rotary = rotary_table(torch.arange(len(x)), 16, 10000.0)
    q, k = (rotate(layer(h).view(1, -1, 2, 16), rotary)[0] for layer in (attention.query, attention.key))
    v = attention.value(h).view(-1, 2, 16)
    mixed = []
    for i, places in enumerate(sees):
        scores = torch.einsum("hd,shd->hs", q[i], k[places]) / 4.0
        mixed.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[places]).flatten())
    x = x + attention.output(torch.stack(mixed))
    h = block.feed_forward_norm(x)
    return x + block.feed_forward.down(F.silu(block.feed_forward.gate(h)) * block.feed_forward.up(h))


def plain_rmt(model: Titans, tokens: Tensor) -> Tensor:
    """One row of tokens [t] -> hidden states [t, c], as the paper has it."""
    memory, hidden = model.segments.memory_tokens.weight, []  # type: ignore[union-attr]
    for segment in tokens.split(SEGMENT):
        read, own = list(range(MEMORY)), [MEMORY + i for i in range(len(segment))]
        write = [MEMORY + len(segment) + i for i in range(MEMORY)]
        sees = [read] * MEMORY
        sees += [read + own[: i + 1] for i in range(len(segment))]
        sees += [read + own + write] * MEMORY
        x = torch.cat((memory, model.embedding(segment), memory))
        for block in model.blocks:
            x = plain_block(block, x, sees)
        hidden.append(model.norm(x[own]))
        memory = model.segments.memory_norm(x[write])  # type: ignore[union-attr]
    return torch.cat(hidden)


@pytest.mark.parametrize("length", [75, 60, SEGMENT, 7])
def test_rmt_equals_its_definition(length: int) -> None:
    model = tiny_rmt()
    tokens = random_tokens(2, length)
    labels = tokens.roll(-1, 1)
    expected = torch.stack([plain_rmt(model, row) for row in tokens])
    torch.testing.assert_close(model.hidden(tokens)[0], expected, rtol=1e-10, atol=1e-10)
    loss = F.cross_entropy(model.logits(expected).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels), loss, rtol=1e-10, atol=1e-10)


def test_what_each_place_sees() -> None:
    """Two memory vectors in front, three tokens, two behind."""
    shown = visible_places(0, 7, 2, 3, torch.device("cpu")).int().tolist()
    assert shown == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert visible_places(3, 5, 2, 3, torch.device("cpu")).int().tolist() == [row[:5] for row in shown[3:5]]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_flow_through_all_segments(recompute: bool) -> None:
    """The loss of the fourth segment alone, with respect to the tokens of the first: by autograd, and by small steps."""
    model = tiny_rmt()
    model.activation_checkpointing = recompute
    tokens = random_tokens(1, 4 * SEGMENT)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    labels[:, 3 * SEGMENT :] = (tokens[:, 3 * SEGMENT :] + 1) % VOCAB
    step = torch.zeros(1, 4 * SEGMENT, 32, dtype=torch.float64, requires_grad=True)
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: output + step)
    loss = model(tokens, labels)
    (gradient,) = torch.autograd.grad(loss, step)
    assert gradient[0, :SEGMENT].abs().amax(-1).min() > 0
    handle.remove()

    direction = torch.randn(1, SEGMENT, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    losses = []
    for sign in (1, -1):
        moved = F.pad(sign * 1e-4 * direction, (0, 0, 0, 3 * SEGMENT))
        handle = model.embedding.register_forward_hook(lambda module, inputs, output, moved=moved: output + moved)
        losses.append(model(tokens, labels).item())
        handle.remove()
    slope = (losses[0] - losses[1]) / 2e-4
    assert slope == pytest.approx((gradient[:, :SEGMENT] * direction).sum().item(), rel=1e-5)
    assert abs(slope) > 1e-6


def loss_after_learning_to_recall(seed: int, detached: bool) -> float:
    """The first of 24 tokens, of eight kinds, is the label of the last, two segments later; between them is nothing."""
    model = tiny_model("rmt", seed, num_memory_tokens=4, segment_len=8)
    if detached:
        model.segments.memory_norm.register_forward_hook(lambda module, inputs, memory: memory.detach())  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(60):
        tokens = torch.full((32, 24), 8)
        tokens[:, 0] = torch.randint(8, (32,), generator=generator)
        labels = torch.full_like(tokens, IGNORED_LABEL)
        labels[:, -1] = tokens[:, 0]
        loss = model(tokens, labels) / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def test_training_finds_what_to_remember_and_not_without_the_gradient_through_segments() -> None:
    """Of chance's 2.08 nats. Two seeds of five come so far in as many steps; the first does where this was written."""
    assert any(loss_after_learning_to_recall(seed, detached=False) < 0.5 for seed in range(6))
    assert loss_after_learning_to_recall(0, detached=True) > 1.7


@torch.no_grad()
def test_only_the_memory_passes_to_the_next_segment() -> None:
    """Another text before with the same memory gives the same text after, to the bit."""
    model = tiny_rmt()
    tokens = random_tokens(1, 2 * SEGMENT)
    _, first = model.hidden(tokens[:, :SEGMENT])
    _, other = model.hidden((tokens[:, :SEGMENT] + 1) % VOCAB)
    (mine,), (theirs,) = first.blocks, other.blocks
    assert not torch.equal(mine.memory, theirs.memory)
    swapped = other._replace(blocks=(mine,))
    after = [model.hidden(tokens[:, SEGMENT:], state)[0] for state in (first, swapped, other)]
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], after[2])


@torch.no_grad()
def test_the_state_grows_within_a_segment_and_no_further() -> None:
    model = tiny_rmt()
    state, sizes = None, []
    for token in random_tokens(1, 3 * SEGMENT).split(1, dim=1):
        _, state = model.hidden(token, state)
        sizes.append(state_bytes(state))
    place, vectors = 2 * 2 * 32 * 8, MEMORY * 32 * 8  # keys and values of two blocks; the memory itself
    assert sizes == [vectors + place * (MEMORY + i % SEGMENT) for i in range(1, 3 * SEGMENT + 1)]
