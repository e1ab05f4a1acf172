"""Does the scaling benchmark run real jobs, and say what a layout it cannot run is refused for?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.tools.test_plan import tree
from tools.benchmark_training import _covered, main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    small = dict(model__num_layers=1, model__dim=64, model__vocab_size=256, data__micro_batch=0, model__memory_chunk=32)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(**small)))
    return path


def test_layouts_are_measured_and_the_refused_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = ["data=1", "tensor=3", "sequence=2 memory=hand_off"]
    main(
        [
            str(config),
            "--layouts",
            *layouts,
            "--weak",
            "--steps",
            "2",
            "--warmup",
            "1",
            "--json",
            str(tmp_path / "found.json"),
        ]
    )
    alone, refused, pair = json.loads((tmp_path / "found.json").read_text())
    assert alone["efficiency"] == 1.0
    assert alone["communication"] < 0.02
    assert alone["tokens_per_second"] == pytest.approx(1024 / alone["seconds_per_step"])
    assert "parallel.tensor (3)" in refused["refused"]
    assert pair["ranks"] == 2
    assert pair["tokens_per_second"] == pytest.approx(2048 / pair["seconds_per_step"])
    assert pair["efficiency"] == pytest.approx(pair["tokens_per_second"] / 2 / alone["tokens_per_second"])
    assert 0.0 < pair["communication"] < 1.0
    text = capsys.readouterr().out
    assert "1 data x 2 sequence ranks, memory by hand_off" in text
    assert "tensor=3: " in text


def test_overlapping_times_count_once() -> None:
    assert _covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--layouts"),
        (["--layouts", "data=1", "--steps", "0"], "--steps must be above 0"),
    ],
)
def test_mistakes_are_told(arguments: list[str], words: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(config), *arguments])
    assert words in capsys.readouterr().err


def test_a_misspelt_layout_is_told_and_the_next_goes_on(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(config), "--layouts", "tensr=2", "tensor=64"])
    text = capsys.readouterr().out
    assert "not 'tensr=2'" in text
    assert "parallel.tensor (64)" in text
