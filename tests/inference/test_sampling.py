"""Does sampling keep the tokens it should, draw them as often as it should, and repeat with a seed?"""

from __future__ import annotations

import math

import pytest
import torch

from titans_pretrain.errors import UserError
from titans_pretrain.inference.sampling import SamplingOptions, probabilities, sample

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]  # probabilities 0.15 0.5 0.05 0.3


def kept(logits: torch.Tensor, **options: float) -> set[int]:
    return set(probabilities(logits, SamplingOptions(**options)).nonzero().flatten().tolist())  # type: ignore[arg-type]


def test_defaults_are_the_softmax() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probabilities(logits, SamplingOptions()), logits.double().softmax(0), rtol=1e-12, atol=0)


def test_temperature_divides_the_logits() -> None:
    torch.testing.assert_close(
        probabilities(LOGITS, SamplingOptions(temperature=0.5)), (LOGITS.double() * 2).softmax(0), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("k", "expected"), [(1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3}), (0, {0, 1, 2, 3})]
)
def test_top_k(k: int, expected: set[int]) -> None:
    assert kept(LOGITS, top_k=k) == expected
    assert probabilities(LOGITS, SamplingOptions(top_k=k)).sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (0.99, {0, 1, 2, 3})],
)
def test_top_p_is_the_smallest_set_that_reaches_p(p: float, expected: set[int]) -> None:
    assert kept(LOGITS, top_p=p) == expected


def test_top_p_counts_mass_after_temperature_and_top_k() -> None:
    # Of the first two alone the mass is 0.625 and 0.375: 0.6 of it is the first.
    assert kept(LOGITS, top_k=2, top_p=0.6) == {1}
    assert kept(LOGITS, top_p=0.6) == {1, 3}
    assert kept(LOGITS, temperature=100.0, top_p=0.6) == {0, 1, 3}
    distribution = probabilities(LOGITS, SamplingOptions(top_k=2))
    torch.testing.assert_close(
        distribution[[1, 3]], torch.tensor([0.625, 0.375], dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_greedy_takes_the_likeliest_and_the_lowest_id_of_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for options in (SamplingOptions(temperature=0), SamplingOptions(temperature=0, top_k=3, top_p=0.5)):
        assert sample(LOGITS, options, generator) == 1
        assert sample(torch.tensor([0.0, 2.0, 2.0, 1.0]), options, generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    def draws(seed: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(LOGITS, SamplingOptions(), generator) for _ in range(count)]

    assert draws(1, 50) == draws(1, 50)
    assert draws(1, 50) != draws(2, 50)
    counts = torch.bincount(torch.tensor(draws(3, 4000)), minlength=4) / 4000
    # five standard deviations of a share of 4000 draws are at most 0.04
    torch.testing.assert_close(counts, torch.tensor([0.15, 0.5, 0.05, 0.3]), rtol=0, atol=0.04)


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert kept(logits, temperature=5.0) == {1}


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(UserError, match="not finite"):
        probabilities(torch.tensor(bad), SamplingOptions())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_bad_options_are_refused(options: dict, name: str) -> None:
    with pytest.raises(UserError, match=name):
        SamplingOptions(**options)
