"""Rows that hold several documents: each is computed as if it were alone, and nothing passes from one to another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from tests.model.test_titans import OPTIONS
from tests.model.tiny import VOCAB, random_tokens, tiny_config, tiny_model
from titans_pretrain.config import BASELINE_VARIANTS, VARIANTS
from titans_pretrain.model import Titans, attention_scores
from titans_pretrain.model.documents import extend_pieces, find_documents
from titans_pretrain.model.layers import IGNORED_LABEL

LENGTH = 75
BOUNDS = {
    1: [[0, 1, 4, 33, 34, LENGTH], [0, 18, LENGTH]],
    8: [[0, 8, 24, 64, LENGTH], [0, 40, LENGTH]],
    20: [[0, 20, 60, LENGTH], [0, 40, LENGTH]],
    40: [[0, 40, LENGTH], [0, LENGTH]],
}
BOUNDS[4] = BOUNDS[8]
"""Where documents begin and end, by the model's grid: documents of one token or piece, long ones, and an open end."""


def packed(grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels and document starts of two rows; a document's last token predicts nothing."""
    tokens = random_tokens(2, LENGTH)
    labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORED_LABEL)
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, bounds in enumerate(BOUNDS[grid]):
        starts[row, bounds[:-1]] = True
        labels[row, [b - 1 for b in bounds[1:]]] = IGNORED_LABEL
    return tokens, labels, starts


def documents_of(grid: int) -> list[tuple[int, slice]]:
    """(row, tokens) of every document."""
    return [(row, slice(*pair)) for row, bounds in enumerate(BOUNDS[grid]) for pair in itertools.pairwise(bounds)]


def gradients(model: Titans) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        *((variant, changes) for variant in ("mac", "mag") for changes in OPTIONS.values()),
        *((variant, {}) for variant in ("mal", "lmm", *BASELINE_VARIANTS)),
        ("gated_deltanet", dict(conv_kernel=1, memory_heads=1)),
        ("mal", dict(num_persistent=1, window=3)),
        ("lmm", dict(arrangement="h3")),
        ("lmm", dict(memory_chunk=1, conv_kernel=5, num_persistent=2)),
        ("lmm", dict(memory_forget_toward="zero", num_persistent=2)),
        ("mac", dict(segment_len=8, memory_chunk=6, conv_kernel=5)),
        ("mac", dict(segment_len=4, memory_chunk=3, conv_kernel=6)),
    ],
)
def test_a_packed_row_is_its_documents_alone(
    variant: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, and every parameter's gradient."""
    monkeypatch.setattr(attention_scores, "QUERY_BLOCK", 32)
    model = tiny_model(variant, num_layers=1 if changes else 2, **changes).double()
    tokens, labels, starts = packed(model.config.document_grid)
    total = 0.0
    for row, part in documents_of(model.config.document_grid):
        loss = model(tokens[row : row + 1, part], labels[row : row + 1, part])
        loss.backward()
        total += loss.item()
    expected = gradients(model)

    loss = model(tokens, labels, starts)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-13)
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        difference = (gradient - expected[name]).abs().max()
        assert difference < 1e-11 * expected[name].abs().max() + 1e-14, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_passes_from_one_document_to_another(variant: str) -> None:
    """To the bit: neither a token's change forward, nor a gradient backward."""
    model = tiny_model(variant)
    tokens, labels, starts = packed(model.config.document_grid)
    kept: dict[str, Tensor] = {}
    model.embedding.register_forward_hook(lambda m, i, x: kept.update(embedded=x.requires_grad_()))
    model.norm.register_forward_hook(lambda m, i, x: kept.update(hidden=x))
    documents = documents_of(model.config.document_grid)
    row, part = documents[1]
    inside = torch.zeros_like(starts)
    inside[row, part] = True

    model(tokens, labels, starts)
    hidden = kept["hidden"]
    (passed,) = torch.autograd.grad(hidden[inside].square().sum(), kept["embedded"])
    assert not passed[~inside].any()
    assert passed[inside].abs().amax(-1).min() > 0
    model(torch.where(inside, (tokens + 1) % VOCAB, tokens), labels, starts)
    assert torch.equal(kept["hidden"][~inside], hidden[~inside])
    assert (kept["hidden"] != hidden).any(-1).equal(inside)


def loss_and_gradients(model: Titans, length: int = LENGTH) -> dict[str, Tensor]:
    loss = model(*(x[:, :length] for x in packed(model.config.document_grid)))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_blocks_change_nothing(variant: str) -> None:
    model = tiny_model(variant, num_layers=1)
    plain = loss_and_gradients(model)
    model.activation_checkpointing = True
    for name, x in loss_and_gradients(model).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("variant", ["lmm", "transformer", "gated_deltanet_swa"])
def test_compiled_blocks_change_nothing(variant: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(variant)
    plain = loss_and_gradients(model, 41)
    model.compile_blocks("aot_eager")
    for name, x in loss_and_gradients(model, 41).items():
        torch.testing.assert_close(x, plain[name], rtol=1e-5, atol=1e-5 * x.abs().max().item(), msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_one_document_is_a_row(variant: str) -> None:
    """A row's beginning begins a document, said or not."""
    model = tiny_model(variant).double()
    tokens, labels, starts = packed(1)
    expected = model(tokens, labels).item()
    starts[:] = False
    assert model(tokens, labels, starts).item() == pytest.approx(expected, rel=1e-14)
    starts[:, 0] = True
    assert model(tokens, labels, starts).item() == pytest.approx(expected, rel=1e-14)


def test_signals_of_rows_of_documents() -> None:
    model = tiny_model("mag")
    model.set_signals(True)
    model(*packed(8))
    assert all(torch.isfinite(value) for value in model.signals().values())


@pytest.mark.parametrize("length", [0, 3, 5, 17])
@pytest.mark.parametrize("grid", [1, 8, 20])
def test_pieces_see_their_own_document_and_what_is_before_it(grid: int, length: int) -> None:
    config = tiny_config("lmm", memory_chunk=grid)
    documents = find_documents(packed(grid)[2], config, torch.float32)
    x = torch.randn(2, LENGTH, 3)
    for earlier in (None, torch.randn(length, 3)):
        pieces = extend_pieces(x, earlier, length, documents)
        assert pieces.shape == (2, -(-LENGTH // grid), length + grid, 3)
        for row, part in documents_of(grid):
            alone = torch.cat((x.new_zeros(length, 3) if earlier is None else earlier, x[row, part]))
            for first in range(part.start, part.stop, grid):
                own = alone[first - part.start :][: length + grid]
                assert torch.equal(pieces[row, first // grid, : len(own)], own)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 12, 100])
def test_masks_show_the_window_of_the_own_document(
    window: int | None, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_scores, "QUERY_BLOCK", 32)
    places = find_documents(packed(1)[2], tiny_config("transformer"), torch.float32).places
    masks = attention_scores.document_masks(places, window, prefix, torch.bfloat16)
    expected = torch.zeros(2, LENGTH, prefix + LENGTH, dtype=torch.bool)
    expected[..., :prefix] = True
    for row, part in documents_of(1):
        for i in range(part.start, part.stop):
            expected[row, i, prefix + max(part.start, i + 1 - (window or LENGTH)) : prefix + i + 1] = True
    size = window or 32
    for start, mask in zip(range(0, LENGTH, size), masks, strict=True):
        assert mask.dtype == torch.bfloat16
        assert mask.stride(-2) % 8 == 0
        stop = min(start + size, LENGTH)
        first = 0 if window is None else max(0, start - window + 1)
        own = torch.cat((expected[:, start:stop, :prefix], expected[:, start:stop, prefix + first : prefix + stop]), -1)
        assert torch.equal(mask[:, 0] == 0, own)
        assert torch.equal(mask[:, 0] == -torch.inf, ~own)


def test_document_starts_that_do_not_fit_are_named() -> None:
    tokens, labels, starts = packed(8)
    starts[1, 41] = True
    with pytest.raises(ValueError, match=r"token 41 of row 1.*not a multiple of 8 \(model.memory_chunk\)"):
        tiny_model("mag")(tokens, labels, starts)
    with pytest.raises(ValueError, match=r"not a multiple of 20 \(model.segment_len\)"):
        tiny_model("mac")(tokens, labels, starts)
    tiny_model("transformer")(tokens, labels, starts)
    for bad in (starts[:, :-1], starts.long()):
        with pytest.raises(ValueError, match=r"document_starts must be bool \[2, 75\]"):
            tiny_model("lmm")(tokens, labels, bad)
