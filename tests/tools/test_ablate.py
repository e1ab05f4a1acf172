"""Does an ablation run what it says, once, and tell of its runs what they were, those that diverged included?"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.tiny import make_dataset, read_metrics, tiny_tree
from tools.ablate import main, read
from tools.ablation_results import Outcome, State, markdown, plot, spread

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("ablate")

EXPLODING = {"model.memory_residual_norm": False, "model.memory_theta_max": 1.0e6, "model.memory_theta_scaling": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of two settings and two seeds, run once."""
    folder = tmp_path_factory.mktemp("ablation")
    data = make_dataset(folder / "data")
    tree = tiny_tree(data, folder / "runs", model__variant="lmm", eval__length_multiples=[1, 4])
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    write(folder)
    main(["run", str(folder / "ablation.yaml"), "--parallel", "2"])
    return folder


def write(folder: Path, **changes: Any) -> Path:
    said = {
        "name": "tiny",
        "config": str(folder / "base.yaml"),
        "seeds": 2,
        "overrides": ["schedule.tokens=2560", "cluster.gpus_per_node=0"],
        "stable": {"after_step": 2, "gradient_norm": 1000},
        "settings": {"as it is": {}, "Exploding!": EXPLODING},
    }
    path = folder / ("changed.yaml" if changes else "ablation.yaml")
    path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False))
    return path


def test_the_table_says_what_the_runs_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", str(folder / "ablation.yaml")])
    text = capsys.readouterr().out
    assert (folder / "runs" / "tiny" / "tiny.md").read_text() == text
    header, _, good, exploding, _, *notes = text.splitlines()
    assert "validation loss at 32 | validation loss at 128" in header
    assert "largest gradient norm after step 2" in header
    rows = [read_metrics(folder / "runs" / "tiny" / f"as_it_is-seed{seed}") for seed in (0, 1)]
    assert rows[0] != rows[1], "the seed has an effect"
    short, long = ([row[-1][key] for row in rows] for key in ("valid_loss", "valid_loss_x4"))
    norm = max(row["grad_norm"] for run in rows for row in run if "loss" in row and row["step"] > 2)
    cells = [cell.strip() for cell in good.strip("|").split("|")]
    assert cells == [
        *("as it is", "-", f"{statistics.mean(short):.4f} ± {statistics.stdev(short):.4f}"),
        *(f"{statistics.mean(long):.4f} ± {statistics.stdev(long):.4f}", f"{norm:.3g}", "0 of 2", "0"),
    ]
    cells = [cell.strip() for cell in exploding.strip("|").split("|")]
    assert cells[0] == "Exploding!"
    assert "`model.memory_theta_max=1000000.0`" in cells[1]
    assert cells[2:4] == ["-", "-"]
    assert cells[5] == "2 of 2"
    for seed, note in enumerate(notes):
        assert note.startswith(f"- Exploding!, seed {seed}: diverged: ")
        fault = json.loads(
            (folder / "runs" / "tiny" / f"exploding-seed{seed}" / "faults.jsonl").read_text().splitlines()[0]
        )
        assert note.endswith(fault["text"])
        assert "nan" in note or "inf" in note


def test_again_repeats_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> dict[Path, int]:
        files = (folder / "runs").rglob("*")
        return {
            file: file.stat().st_mtime_ns for file in files if file.name in ("metrics.jsonl", "local.txt", "FAILED")
        }

    before = written()
    assert len(before) >= 8
    main(["run", str(folder / "ablation.yaml")])
    assert "4 runs, 0 to do" in capsys.readouterr().out
    assert written() == before


def test_strict_is_for_defaults_that_must_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["table", str(folder / "ablation.yaml"), "--strict"])
    assert exit_.value.code == 1
    assert "2 of 4 runs are not stable" in capsys.readouterr().err
    main(["table", str(write(folder, settings={"as it is": {}})), "--strict"])
    with pytest.raises(SystemExit):  # the same runs against a limit they break
        main(["table", str(write(folder, settings={"as it is": {}}, stable={"gradient_norm": 1e-3})), "--strict"])
    assert "as it is, seed 1: unstable: the gradient norm reached" in capsys.readouterr().out


def test_a_finished_run_is_not_told_as_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", str(write(folder, settings={"as it is": {"model.memory_depth": 1}}))])
    assert "was run with other settings" in capsys.readouterr().err


def test_the_plot_is_two_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(folder / "ablation.yaml")])
    png, svg = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_every_way_a_run_can_end_has_its_place(tmp_path: Path) -> None:
    nan = math.nan
    outcomes = {
        "a": [Outcome("a, seed 0", State.STABLE, "", {8: 1.0, 64: 2.0}, 0.5)],
        "b": [
            Outcome("b, seed 0", State.UNSTABLE, "the gradient norm reached 9", {8: 3.0, 64: 4.0}, 9.0),
            Outcome("b, seed 1", State.DIVERGED, "the validation loss is nan at 64 tokens", {8: 3.5, 64: nan}, 0.1),
            Outcome("b, seed 2", State.MISSING, "running", {}, nan),
            Outcome("b, seed 3", State.FAILED, "no space left", {}, nan),
        ],
    }
    lines = markdown(outcomes, {"a": {}, "b": {"model.dim": 3}}, 0, 5.0).splitlines()
    assert lines[2] == "| a | - | 1.0000 | 2.0000 | 0.5 | 0 of 1 | 0 |"
    assert lines[3] == "| b | `model.dim=3` | 3.0000 | 4.0000 | 9 | 1 of 2 | 1 |"
    assert lines[4:] == [
        "",
        "- b, seed 0: unstable: the gradient norm reached 9",
        "- b, seed 1: diverged: the validation loss is nan at 64 tokens",
        "- b, seed 2: missing: running",
        "- b, seed 3: failed: no space left",
    ]
    assert spread([1.0, 2.0]) == "1.5000 ± 0.7071"
    assert all(path.exists() for path in plot(outcomes, tmp_path / "x", "x"))


BAD = {
    "unknown key": ({"setting": {}}, "must have the keys name, config and settings"),
    "list of settings": ({"settings": ["a"]}, "settings must be a mapping"),
    "seeds": ({"seeds": 0}, "seeds must be a whole number of 1 or more, not 0"),
    "stable": ({"stable": {"norm": 3}}, "stable must be"),
    "one folder": ({"settings": {"a b": {}, "A_b": {}}}, "two settings would both be in folders a_b-seedN"),
    "unknown setting": ({"settings": {"a": {"model.depht": 1}}}, "depht"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_ablation_is_one_sentence(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = BAD[name]
    with pytest.raises(SystemExit):
        main(["table", str(write(folder, **changes))])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["demo", "stability"])
def test_the_ablations_here_can_be_run(name: str) -> None:
    ablation = read(Path("configs/ablation") / f"{name}.yaml")
    assert len({run.config.run_dir for runs in ablation.runs.values() for run in runs}) == sum(
        map(len, ablation.runs.values())
    )
