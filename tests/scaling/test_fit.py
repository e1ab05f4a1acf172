"""Does the fit find laws that are known, say how sure it is, and refuse what cannot hold one?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize

from tests.scaling.points import REFIT, REFIT_ERRORS, chinchilla_points, noisy
from titans_pretrain.errors import UserError
from titans_pretrain.scaling.fit import DELTA, _Points, bootstrap, fit, hold_out, huber
from titans_pretrain.scaling.law import CONSTANTS, CostCurve, Law, optimum

LAWS = [Law(1.7, 400.0, 1500.0, 0.34, 0.37), Law(2.5, 60.0, 900.0, 0.25, 0.33), Law(1.2, 5000.0, 300.0, 0.5, 0.28)]


def wide_grid() -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e6, 3e10, 10), np.geomspace(1e8, 1e12, 10))
    return n.ravel(), d.ravel()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", range(3))
def test_noise_of_half_a_percent_leaves_the_constants(law: Law, seed: int) -> None:
    n, d = wide_grid()
    found = fit(n, d, noisy(law, n, d, 0.005, seed)).law
    assert pytest.approx(law.E, rel=0.02) == found.E
    assert found.alpha == pytest.approx(law.alpha, abs=0.02)
    assert found.beta == pytest.approx(law.beta, abs=0.02)


@pytest.mark.parametrize("law", [*LAWS, REFIT])
def test_without_noise_the_constants_are_exact(law: Law) -> None:
    n, d = wide_grid()
    found = fit(n, d, law.loss(n, d))
    for name in CONSTANTS:
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-4)
    assert found.warnings == []


@pytest.mark.parametrize("seed", range(4))
def test_points_of_the_published_refit_give_it_back(seed: int) -> None:
    n, d, losses = chinchilla_points(0.004, seed)
    assert len(n) == 240
    found = fit(n, d, losses).law
    for name, error in REFIT_ERRORS.items():
        assert abs(getattr(found, name) - getattr(REFIT, name)) < 1.96 * error, (name, found)


def test_runs_that_went_wrong_hardly_move_it() -> None:
    """Huber's sum: a tenth of the losses 10 % too high moves E by less than the 2 % a sum of squares would."""
    n, d = wide_grid()
    losses = noisy(LAWS[0], n, d, 0.002, 0)
    losses[::10] *= 1.1
    found = fit(n, d, losses).law
    assert pytest.approx(LAWS[0].E, rel=0.01) == found.E
    assert found.alpha == pytest.approx(LAWS[0].alpha, abs=0.02)


def test_no_other_search_finds_a_smaller_sum() -> None:
    """Against the paper's own way: all five constants as logarithms, from the truth and from starts around it."""
    n, d, losses = chinchilla_points(0.004, 11)
    found = fit(n, d, losses)

    def total(x: np.ndarray) -> float:
        law = Law(np.exp(x[0]), np.exp(x[1]), np.exp(x[2]), x[3], x[4])
        return huber(np.log(losses) - np.log(law.loss(n, d)))

    truth = np.array([np.log(REFIT.E), np.log(REFIT.A), np.log(REFIT.B), REFIT.alpha, REFIT.beta])
    generator = np.random.default_rng(0)
    for _ in range(3):
        start = truth + generator.normal(0, 0.02, 5)
        other = minimize(total, start, method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-12, "xatol": 1e-9})
        assert found.huber <= other.fun * (1 + 1e-4)
    assert found.huber == pytest.approx(huber(found.residuals), rel=1e-6)


def test_linear_part_and_gradient_are_those_of_the_huber_sum() -> None:
    """What makes the search right and fast; the last descent would hide a mistake in the first, and lose by one in itself."""
    n, d, losses = chinchilla_points(0.01, 2)
    losses[::7] *= 1.1  # here least squares and Huber's sum part
    points = _Points(n, d, losses)
    exponents = np.array([0.3, 0.4])
    total, x = points.projected(exponents)

    def of_linear(linear: np.ndarray) -> float:
        return huber(points.residuals(np.concatenate([linear, exponents])))

    options = {"maxiter": 4000, "fatol": 1e-12, "xatol": 1e-9}
    assert total <= minimize(of_linear, x[:3], method="Nelder-Mead", options=options).fun * 1.005
    slope = points._huber_and_gradient(x)[1]
    measured = approx_fprime(x, lambda at: points._huber_and_gradient(at)[0], 1e-7)
    assert slope == pytest.approx(measured, rel=1e-3, abs=1e-3)


def test_huber_is_the_definition() -> None:
    assert huber(np.array([DELTA / 2])) == pytest.approx(DELTA**2 / 8)
    assert huber(np.array([-3 * DELTA])) == pytest.approx(DELTA * (3 * DELTA - DELTA / 2))


def test_bootstrap_intervals_hold_the_truth_and_follow_the_noise() -> None:
    n, d = wide_grid()
    widths = []
    for noise in (0.002, 0.008):
        losses = noisy(LAWS[0], n, d, noise, 3)
        found = bootstrap(fit(n, d, losses), n, d, losses, 40, seed=1)
        low, high = found.interval("alpha")
        assert low < LAWS[0].alpha < high
        widths.append(high - low)
        again = bootstrap(fit(n, d, losses), n, d, losses, 5, seed=1)
        assert again.samples == found.samples[:5], "the seed decides"
    assert 2 < widths[1] / widths[0] < 8


def test_the_largest_budget_is_foretold() -> None:
    n, d, losses = chinchilla_points(0.002, 5)
    held = (n * d * 6 > 2.9e21).tolist()
    names = [str(i) for i in range(len(n))]
    out = hold_out(n, d, losses, names, held, "3e21")
    assert len(out.names) == 26
    assert out.error < 0.004
    bent = np.where(held, losses * 1.05, losses)
    assert hold_out(n, d, bent, names, held, "3e21").error == pytest.approx(0.047, abs=0.01)


def test_what_cannot_hold_a_law_is_refused_in_a_sentence() -> None:
    n, d = wide_grid()
    y = LAWS[0].loss(n, d)
    with pytest.raises(UserError, match=r"mag has 1 different model sizes in 10 finished runs.*`sizes`"):
        fit(n[n == n[0]], d[n == n[0]], y[n == n[0]], "mag")
    with pytest.raises(UserError, match=r"1 different numbers of training tokens.*`budgets`"):
        fit(n[d == d[0]], d[d == d[0]], y[d == d[0]], "mag")
    with pytest.raises(UserError, match=r"in mag N and D move together"):
        fit(n[n * d < 2e15], 1e16 / n[n * d < 2e15], y[n * d < 2e15], "mag")
    with pytest.raises(UserError, match=r"mag has 5 finished runs, but five constants need at least 6"):
        fit(n[::11][:5], d[::11][:5], y[::11][:5], "mag")


def test_a_loss_that_does_not_fall_with_tokens_is_told() -> None:
    n, d = wide_grid()
    assert any("does not fall with the tokens" in said for said in fit(n, d, 2 + 400 / n**0.34).warnings)


def test_optimum_is_the_closed_form() -> None:
    """For 6 N D the best N is G (C / 6)^(beta / (alpha + beta)): Hoffmann et al., equation 4."""
    law, flops = REFIT, 5.76e23
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    best = optimum(law, flops, lambda n: 6 * n, 1e6, 1e14)
    assert best.parameters == pytest.approx(g * (flops / 6) ** (law.beta / (law.alpha + law.beta)), rel=1e-4)
    assert best.parameters * best.tokens * 6 == pytest.approx(flops)
    assert not best.at_edge
    assert optimum(law, flops, lambda n: 6 * n, 1e6, 1e8).at_edge


def test_cost_curve_goes_through_its_points_and_on() -> None:
    curve = CostCurve([1e6, 1e8, 1e7, 1e7], [8e6, 6.3e8, 7e7, 7e7])
    assert curve(1e7) == pytest.approx(7e7)
    assert 8e6 < curve(3e6) < 7e7
    assert curve(1e9) == pytest.approx(6.3e8 * 9)
    assert CostCurve([1e6], [7e6])(1e7) == pytest.approx(7e7)
