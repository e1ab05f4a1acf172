"""The learning rate as a function of tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.config import OptimizerConfig, ScheduleConfig
from titans_pretrain.train.schedule import learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=2.0)


def rate(tokens: int, **schedule: object) -> float:
    return learning_rate(tokens, ScheduleConfig(tokens=1000, **schedule), OPTIMIZER)  # type: ignore[arg-type]


def test_cosine() -> None:
    settings = {"warmup_fraction": 0.1, "final_fraction": 0.1}
    assert rate(50, **settings) == pytest.approx(1.0)
    assert rate(100, **settings) == pytest.approx(2.0)
    assert rate(550, **settings) == pytest.approx(0.1 * 2 + 0.9)
    assert rate(325, **settings) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rate(1000, **settings) == rate(5000, **settings) == pytest.approx(0.2)


def test_wsd() -> None:
    settings = {"kind": "wsd", "warmup_fraction": 0.2, "decay_fraction": 0.4, "final_fraction": 0.0}
    assert rate(100, **settings) == pytest.approx(1.0)
    assert rate(200, **settings) == rate(400, **settings) == rate(600, **settings) == 2.0
    assert rate(800, **settings) == pytest.approx(1.0)
    assert rate(1000, **settings) == rate(1200, **settings) == 0.0


@given(
    kind=st.sampled_from(["cosine", "wsd"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    tokens=st.integers(0, 1000),
)
def test_rises_then_falls_within_bounds(kind: str, warmup: float, decay: float, final: float, tokens: int) -> None:
    decay = min(decay, 1 - warmup)
    settings = {"kind": kind, "warmup_fraction": warmup, "decay_fraction": decay, "final_fraction": final}
    here, there = rate(tokens, **settings), rate(tokens + 1, **settings)
    assert 0 <= here <= 2 + 1e-12
    if tokens + 1 < 1000 * warmup:
        assert there >= here
    elif tokens > 1000 * warmup:
        assert there <= here + 1e-12
        assert there >= 2 * final - 1e-9
