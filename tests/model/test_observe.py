"""Does a model tell of each token what its memories made of it, and compute the same as when nobody looks?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.memory.problem import Problem, error
from tests.memory.test_surprise import defined
from tests.model.tiny import random_tokens, tiny_model
from titans_pretrain.memory import MemoryState
from titans_pretrain.model import Titans, initialize
from titans_pretrain.model.neural_memory import TokenSignals, memory_options
from titans_pretrain.model.sequence import LocalSequence

MEMORIES = ("mac", "mag", "mal", "lmm")


class Recorder(LocalSequence):
    """Keeps what each scan of more than the persistent tokens was given."""

    def __init__(self) -> None:
        self.scans: list[tuple[Problem, MemoryState | None]] = []

    def memory_scan(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if args[0].shape[1] > 5:
            self.scans.append((Problem(*args[:9]), args[9]))
        return super().memory_scan(*args, **kwargs)


@pytest.mark.parametrize("variant", ["mag", "mal", "lmm"])
def test_signals_are_those_of_the_models_own_scan(variant: str) -> None:
    """Float64: the inputs of each block's scan are taken from an ordinary forward and put through the definition."""
    config = tiny_model(variant).config
    recorder = Recorder()
    model = Titans(config, sequence=recorder)
    initialize(model, seed=0)
    model = model.double().requires_grad_(False)
    tokens = random_tokens(2, 29)
    model.hidden(tokens)
    assert len(recorder.scans) == config.num_layers
    _, _, found = model.observe(tokens)
    for i, (problem, state) in enumerate(recorder.scans):
        losses, norms = defined(problem, state, memory_options(config))
        assert error(found[i].inner_loss, losses) < 1e-11
        assert error(found[i].gradient_norm, norms) < 1e-11
        assert problem.log_gamma is not None
        assert problem.log_eta is not None
        assert found[i].alpha is not None
        assert found[i].eta is not None
        assert error(found[i].alpha, 1 - problem.log_gamma.exp()) < 1e-11
        assert error(found[i].eta, problem.log_eta.exp()) < 1e-11
        assert error(found[i].theta, problem.theta) < 1e-11


@pytest.mark.parametrize("variant", MEMORIES)
def test_observed_in_parts_equals_observed_at_once_and_unobserved(variant: str) -> None:
    model = tiny_model(variant).double().requires_grad_(False)
    tokens = random_tokens(1, 67)
    hidden, _ = model.hidden(tokens)
    once, _, whole = model.observe(tokens)
    assert error(once, hidden) < 1e-12
    state, parts = None, []
    for start, stop in ((0, 13), (13, 40), (40, 41), (41, 67)):
        _, state, found = model.observe(tokens[:, start:stop], state)
        parts.append(found)
    assert list(whole) == [0, 1]
    for i, signals in whole.items():
        for name, expected in zip(TokenSignals._fields, signals, strict=True):
            assert isinstance(expected, Tensor)
            assert expected.shape[:2] == (1, 67)
            joined = torch.cat([getattr(part[i], name) for part in parts], dim=1)
            assert error(joined, expected) < 1e-10, name
    assert not any(block.memory.collect_tokens or block.memory.token_signals for block in model.blocks)


def test_without_momentum_forgetting_or_memory() -> None:
    model = tiny_model("lmm", memory_momentum=False, memory_forgetting=False)
    signals = model.observe(random_tokens(1, 20))[2][0]
    assert signals.eta is None
    assert signals.alpha is None
    assert not signals.gradient_norm.requires_grad
    assert tiny_model("transformer").observe(random_tokens(1, 20))[2] == {}
