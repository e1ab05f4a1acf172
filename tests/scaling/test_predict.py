"""Do checks, predictions and plots follow a law that is known?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.scaling.points import law_points, point, study
from titans_pretrain.config import config_to_yaml, load_config
from titans_pretrain.errors import UserError
from titans_pretrain.model.cost import flops_per_token
from titans_pretrain.scaling import analysis
from titans_pretrain.scaling.grid import all_series, counts, make_grid, shape
from titans_pretrain.scaling.isoflop import valleys
from titans_pretrain.scaling.law import Law, optimum
from titans_pretrain.scaling.plot import plot
from titans_pretrain.scaling.predict import measured_speed, predict

LAW = Law(2.0, 60.0, 400.0, 0.3, 0.32)


def six(n: float) -> float:
    return 6 * n


def test_parabolas_agree_with_the_law_they_come_from() -> None:
    points = law_points(LAW)
    found = valleys(points, LAW, six, "non_embedding", equal=True)
    assert [f"{valley.flops:.0e}" for valley in found] == ["1e+16", "1e+17", "1e+18"]
    for valley in found:
        best = optimum(LAW, valley.flops, six, 1e3, 1e12)
        assert valley.best_parameters == pytest.approx(best.parameters, rel=0.25)
        assert valley.best_loss == pytest.approx(best.loss, rel=0.005)
        assert valley.verdict == ""


def test_a_law_that_disagrees_is_warned_of() -> None:
    points = law_points(LAW)
    wrong = dataclasses.replace(LAW, A=2 * LAW.A)
    assert any(
        "do not trust the split" in valley.verdict for valley in valleys(points, wrong, six, "non_embedding", True)
    )
    high = dataclasses.replace(LAW, E=1.1 * LAW.E)
    assert all("lowest loss is" in valley.verdict for valley in valleys(points, high, six, "non_embedding", True))
    one_side = [
        p for p in points if p.parameters["non_embedding"] > 1.1 * optimum(LAW, p.flops, six, 1e3, 1e12).parameters
    ]
    assert all("has no lowest point" in valley.verdict for valley in valleys(one_side, LAW, six, "non_embedding", True))


def test_without_equal_compute_losses_are_interpolated() -> None:
    sizes = np.geomspace(1e6, 1e8, 6)
    points = [point(n, d, LAW.loss(n, d), budget=f"{d:g}") for n in sizes for d in np.geomspace(1e8, 1e10, 5)]
    found = valleys(points, LAW, six, "non_embedding", equal=False)
    assert found
    for valley in found:
        assert valley.interpolated
        assert len(valley.parameters) >= 3
        for n, loss in zip(valley.parameters, valley.losses, strict=True):
            assert loss == pytest.approx(LAW.loss(n, valley.flops / (6 * n)), rel=0.01)
    assert valleys([p for p in points if p.parameters["non_embedding"] < 3e6], LAW, six, "non_embedding", False) == []


def test_analysis_is_written_and_read(tmp_path: Path) -> None:
    given = study(dir=str(tmp_path), budgets={"flops": [1e16, 1e17, 1e18]})
    points = law_points(LAW, noise=0.001)
    given.folder.mkdir()
    found = analysis.analyse(given, points, "mag", "non_embedding", samples=10)
    assert found.held_out is not None
    assert found.held_out.budget == "1e+18"
    assert found.held_out.error < 0.01
    assert found.remarks == ()
    analysis.write(given, [found])
    again = analysis.read(given, points)[0]
    assert again.fit.law == found.fit.law
    assert again.fit.samples == found.fit.samples
    assert again.valleys == found.valleys
    assert again.held_out == found.held_out
    with pytest.raises(UserError, match=r"fitted to other runs"):
        analysis.read(given, points[1:])
    with pytest.raises(UserError, match=r"mag has 1 different model sizes"):
        analysis.analyse(given, points[:1], "mag", "non_embedding", 0)
    few = [p for p in points if p.budget != "1e+18"][:8]
    assert any(
        "no test on the largest budget" in said for said in analysis.analyse(given, few, "mag", "total", 0).remarks
    )


@pytest.fixture
def trained(tmp_path: Path):
    """A study whose runs, on its own dial, came to LAW."""
    given = study(
        dir=str(tmp_path),
        budgets={"flops": [1e13, 1e14, 1e15]},
        batch={"tokens": 2048, "reference": 1e6, "exponent": 0.5},
        learning_rate={"base": 3e-3, "reference": 1e5, "exponent": 0.3},
    )
    points = [
        point(
            run.counts["non_embedding"],
            run.tokens,
            float(LAW.loss(run.counts["non_embedding"], run.tokens)),
            run=run.name,
            size=run.size,
            budget=run.budget,
            flops_per_token=run.flops_per_token,
        )
        for run in make_grid(given, 0).points
    ]
    given.folder.mkdir()
    return given, points, analysis.analyse(given, points, "mag", "non_embedding", samples=8)


def test_prediction_is_the_best_run_on_the_dial(trained, tmp_path: Path) -> None:
    given, points, fitted = trained
    flops = 5e16
    found = predict(given, fitted, flops, 0)
    assert max(p.flops for p in points) < flops / 40
    shapes = [shape(given, all_series(given)[0], given.dial.words(layers), 0) for layers in range(1, 40)]
    sizes = np.array([of.counts["non_embedding"] for of in shapes])
    losses = LAW.loss(sizes, flops / np.array([of.flops_per_token for of in shapes]))
    for budget in np.geomspace(flops / 2, flops * 2, 5):
        best = np.argmin(LAW.loss(sizes, budget / np.array([of.flops_per_token for of in shapes])))
        config = predict(
            given, dataclasses.replace(fitted, fit=dataclasses.replace(fitted.fit, samples=())), budget, 0
        ).config
        assert config.model.num_layers == int(best) + 1, "of all sizes on the dial"
    assert found.best.loss == pytest.approx(losses.min(), rel=2e-3)
    model = found.config.model
    assert model.dim == 32 * model.num_layers
    assert found.parameters == counts(model)["non_embedding"]
    assert found.run_flops == pytest.approx(flops, rel=0.01)
    assert found.run_flops == found.tokens * flops_per_token(model, found.config.data.seq_len)
    assert found.loss == pytest.approx(losses.min(), rel=1e-3)
    assert found.loss_interval is not None
    low, high = found.loss_interval
    assert low <= found.loss * 1.0001
    assert high >= found.loss * 0.9999
    assert found.config.optimizer.learning_rate == pytest.approx(3e-3 * (found.parameters / 1e5) ** -0.3, rel=1e-3)
    path = tmp_path / "best.yaml"
    path.write_text(config_to_yaml(found.config))
    assert load_config(path) == found.config


def test_far_predictions_are_warned_of(trained) -> None:
    given, _, fitted = trained
    assert any("far beyond what was measured" in said for said in predict(given, fitted, 1e18, 0).warnings)
    assert predict(given, fitted, 1e15, 0).warnings == ()
    sizes = {f"d{dim}": [f"model.dim={dim}", "model.num_heads=2", "model.num_layers=2"] for dim in (32, 64)}
    listed = dataclasses.replace(given, dial=None, sizes={name: tuple(words) for name, words in sizes.items()})
    assert any("lies beyond the study's largest" in said for said in predict(listed, fitted, 5e16, 0).warnings)


def test_hours_follow_the_largest_size() -> None:
    points = [point(1e6, 1e9, 3.0, mfu=0.1), point(1e7, 1e9, 2.5, mfu=0.4)]
    speed = measured_speed(points, "non_embedding", None, None)
    assert speed is not None
    assert speed.mfu == 0.4
    assert speed.hours(0.4 * 100e12 * 3600) == pytest.approx(1.0)
    assert speed.flops(2.0) == pytest.approx(0.4 * 100e12 * 7200)
    given = measured_speed(points, "non_embedding", 0.5, 989.0)
    assert given is not None
    assert (given.mfu, given.peak_tflops) == (0.5, 989.0)
    assert measured_speed([point(1e6, 1e9, 3.0, mfu=0.0)], "total", None, 989.0) is None


def test_plots_are_pictures(trained) -> None:
    given, _, fitted = trained
    files = plot(given, [fitted])
    assert sorted(path.name for path in files) == sorted(
        f"{name}.{kind}" for name in ("loss_vs_compute", "isoflop", "residuals") for kind in ("png", "svg")
    )
    for path in files:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in plot(given, [fitted])] == before, "the same points, the same files"
