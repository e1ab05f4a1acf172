"""Whole models: causality to the bit, decoding equals the parallel forward, persistent tokens, signals, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.tiny import VOCAB, random_tokens, tiny_model
from titans_pretrain.config import BASELINE_VARIANTS, RECURRENT_VARIANTS, TITANS_VARIANTS, VARIANTS
from titans_pretrain.model import Titans

# Each of the memory's options takes another path through a block at least once.
OPTIONS = {
    "default": {},
    "plain": dict(memory_residual_norm=False, num_persistent=0),
    "linear": dict(memory_depth=1, memory_per_layer_gates=False, conv_kernel=1),
    "no_momentum": dict(memory_momentum=False, memory_theta_scaling="none"),
    "no_forgetting": dict(memory_forgetting=False, memory_depth=3),
    "to_zero": dict(memory_forget_toward="zero", retrieve_every=3, mal_residual=False, memory_heads=1),
}


H3_CASES = [(variant, dict(arrangement="h3", **OPTIONS[options])) for variant in ("lmm", "mal") for options in OPTIONS]
"""The memory's other arrangement, in the variants that have it."""
WHOLE = [*((variant, {}) for variant in VARIANTS), *(case for case in H3_CASES if len(case[1]) == 1)]
"""Every variant, and every arrangement of it, with the defaults."""


def logits_of(model: Titans, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits from feeding `tokens` in pieces of the given lengths (repeated), the state carried."""
    state, outputs, start, turn = None, [], 0, 0
    while start < tokens.shape[1]:
        stop = start + pieces[turn % len(pieces)]
        hidden, state = model.hidden(tokens[:, start:stop], state)
        outputs.append(model.logits(hidden))
        start, turn = stop, turn + 1
    return torch.cat(outputs, dim=1)


def assert_pieces_equal_whole(model: Titans, tolerance: float) -> None:
    """Largest difference of any logit, relative to the largest logit."""
    tokens = random_tokens(2, 75)
    whole = logits_of(model, tokens, [75])
    for pieces in ([1], [7, 1, 19, 2]):
        difference = (logits_of(model, tokens, pieces) - whole).abs().max()
        assert difference < tolerance * whole.abs().max()


TITANS_CASES = [(variant, options) for variant in TITANS_VARIANTS for options in OPTIONS]


@pytest.mark.parametrize(
    ("variant", "options"),
    [*TITANS_CASES, *((v, "default") for v in BASELINE_VARIANTS), *((v, "linear") for v in RECURRENT_VARIANTS)],
)
@torch.no_grad()
def test_decoding_equals_parallel_forward(variant: str, options: str) -> None:
    check_decoding(variant, OPTIONS[options])


@pytest.mark.parametrize(("variant", "changes"), H3_CASES)
@torch.no_grad()
def test_decoding_equals_parallel_forward_in_the_h3_arrangement(variant: str, changes: dict[str, Any]) -> None:
    check_decoding(variant, changes)


def check_decoding(variant: str, changes: dict[str, Any]) -> None:
    model = tiny_model(variant, **changes)
    assert_pieces_equal_whole(model, 1e-5)
    assert_pieces_equal_whole(model.double(), 1e-12)  # what differs in fp32 is rounding and nothing else


@pytest.mark.parametrize(("variant", "changes"), WHOLE)
@pytest.mark.parametrize("place", [0, 7, 8, 19, 20, 33, 74])
@torch.no_grad()
def test_a_token_changes_no_earlier_output(variant: str, changes: dict[str, Any], place: int) -> None:
    model = tiny_model(variant, **changes)
    tokens = random_tokens(2, 75)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    before, after = logits_of(model, tokens, [75]), logits_of(model, changed, [75])
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@pytest.mark.parametrize(("variant", "changes"), WHOLE)
def test_every_parameter_gets_a_gradient(variant: str, changes: dict[str, Any]) -> None:
    model = tiny_model(variant, **changes)
    tokens = random_tokens(2, 45)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("variant", "changes"), WHOLE)
def test_activation_checkpointing_changes_nothing(variant: str, changes: dict[str, Any]) -> None:
    tokens = random_tokens(2, 45)
    gradients = []
    for recompute in (False, True):
        model = tiny_model(variant, **changes)
        model.activation_checkpointing = recompute
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_signals(variant: str) -> None:
    model = tiny_model(variant)
    tokens = random_tokens(2, 45)
    model.set_signals(True)
    model(tokens[:, :-1], tokens[:, 1:])
    signals = model.signals()
    names = {"surprise", "theta_mean", "eta_mean", "alpha_mean", "state_norm", "momentum_norm"}
    assert set(signals) == {f"block_{i}/{name}" for i in range(2) for name in names}
    assert all(torch.isfinite(value) and value > 0 for value in signals.values())
    assert abs(signals["block_0/eta_mean"] - 0.5) < 0.1  # the gates start at their biases
    assert signals["block_0/alpha_mean"] < 0.004
    assert tiny_model("transformer").signals() == {}


def test_bf16_is_close_to_fp32() -> None:
    tokens = random_tokens(2, 45)
    for variant in VARIANTS:
        model = tiny_model(variant)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        half = model.to(torch.bfloat16)(tokens[:, :-1], tokens[:, 1:])
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, loss, rtol=0.01, atol=0.0)
