"""Compiled blocks: the losses, gradients and signals of the blocks as written, from one graph, under the same names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.model.tiny import random_tokens, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.model import Titans


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Programs of other tests' models would count as recompilations of the same function."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Titans, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(tokens, tokens)
    loss.backward()
    found = {"loss": loss.detach()}
    found.update((name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5 * x.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("variant", "changes"), [*((variant, {}) for variant in VARIANTS), ("lmm", dict(arrangement="h3"))]
)
def test_compiled_blocks_change_nothing(variant: str, changes: dict[str, Any]) -> None:
    model = tiny_model(variant, num_layers=2, **changes)
    tokens = random_tokens(2, 30)
    names = list(model.state_dict())
    expected = loss_and_gradients(model, tokens)
    model.compile_blocks("aot_eager")
    assert_close(loss_and_gradients(model, tokens), expected)
    programs = 2 if variant == "rmt" else 1  # the last segment writes no memory
    assert counters["stats"]["unique_graphs"] == programs  # both layers share it, and nothing breaks it
    model.activation_checkpointing = True
    assert_close(loss_and_gradients(model, tokens), expected)
    assert counters["stats"]["unique_graphs"] == programs
    assert list(model.state_dict()) == names

    hidden, _ = model.hidden(tokens)
    model.run_as_written()
    assert torch.equal(model.hidden(tokens)[0], hidden)


def test_signals_come_out_of_compiled_blocks() -> None:
    model = tiny_model("lmm", num_layers=2)
    tokens, others = random_tokens(2, 30), random_tokens(2, 30, seed=2)
    model.set_signals(True)
    expected = []
    for batch in (tokens, others):
        loss_and_gradients(model, batch)
        expected.append(model.signals())
    assert expected[0] != expected[1]

    model.compile_blocks("aot_eager")
    for activation_checkpointing in (False, True):
        model.activation_checkpointing = activation_checkpointing
        for batch, signals in zip((tokens, others), expected, strict=True):
            model.set_signals(True)
            loss_and_gradients(model, batch)
            assert_close(model.signals(), signals)
            model.set_signals(False)
            loss_and_gradients(model, batch)
    assert counters["stats"]["unique_graphs"] == 2


def test_bf16_and_a_whole_memory_of_options_compile() -> None:
    model = tiny_model(
        "lmm", num_layers=1, memory_depth=3, memory_momentum=False, memory_forget_toward="zero"
    ).bfloat16()
    tokens = random_tokens(1, 20)
    expected = loss_and_gradients(model, tokens)
    model.compile_blocks("aot_eager")
    found = loss_and_gradients(model, tokens)
    assert found["loss"] == pytest.approx(expected["loss"].item(), rel=1e-3)
