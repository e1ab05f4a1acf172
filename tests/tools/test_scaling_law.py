"""tools/scaling_law.py as a user runs it: a whole study of really tiny models, killed half way; and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.tiny import SEQ_LEN, make_dataset, tiny_tree
from titans_pretrain.config import load_config
from titans_pretrain.scaling.fit import fit
from tools.scaling_law import main

ROOT = Path(__file__).resolve().parents[2]


def write_study(folder: Path, **changes: Any) -> Path:
    """Six runs of one transformer block on a dataset of some thousand tokens."""
    make_dataset(folder / "data")
    tree = tiny_tree(
        folder / "data", folder / "runs", model__variant="transformer", model__num_layers=1, model__hidden_dim=32
    )
    tree["cluster"] = {"gpus_per_node": 0}
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    study: dict[str, Any] = {
        "name": "tiny",
        "dir": str(folder / "studies"),
        "config": str(folder / "base.yaml"),
        "variants": {"full": ["model.variant=transformer"]},
        "sizes": {f"d{dim}": [f"model.dim={dim}"] for dim in (16, 24, 32)},
        "budgets": {"tokens_per_parameter": [0.5, 1.5]},
        "batch": {"tokens": 4 * SEQ_LEN},
        "learning_rate": {"base": 1e-2, "by": "dim", "reference": 16, "exponent": 0.5},
        "bootstrap": 10,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def command(*words: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "tools/scaling_law.py", *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def done(studies: Path) -> dict[str, float]:
    """Finished runs, and when their metrics were last written."""
    return {path.parent.name: (path.parent / "metrics.jsonl").stat().st_mtime for path in studies.glob("tiny/*/DONE")}


@pytest.mark.slow
def test_a_study_runs_unattended_and_goes_on_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    studies = tmp_path / "studies"
    first = command("all", str(path))
    end = time.monotonic() + 200
    while len(done(studies)) < 2 or len(list(studies.glob("tiny/*/metrics.jsonl"))) < 3:
        assert time.monotonic() < end
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.kill()
    first.communicate()
    before = done(studies)
    assert 2 <= len(before) < 6

    second = command("all", str(path))
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert f"6 runs, {6 - len(before)} to do" in said
    after = done(studies)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before, "a finished run was trained once more"
    assert "6 points, 0 runs left out" in said
    folder = studies / "tiny"
    plots = {file.name for file in (folder / "plots").iterdir()}
    assert plots == {
        f"{name}.{kind}" for name in ("loss_vs_compute", "isoflop", "residuals") for kind in ("png", "svg")
    }

    # What was collected is what the runs' metrics say, and what was fitted is the fit of that.
    points = json.loads((folder / "points.json").read_text())["points"]
    for point in points:
        rows = [json.loads(line) for line in (folder / point["run"] / "metrics.jsonl").read_text().splitlines()]
        assert point["loss"] == [row["valid_loss"] for row in rows if "valid_loss" in row][-1]
        assert point["tokens"] == [row["tokens"] for row in rows if "loss" in row][-1]
    law = json.loads((folder / "fit.json").read_text())["series"]["full"]["law"]
    columns = zip(*[(p["parameters"]["non_embedding"], p["tokens"], p["loss"]) for p in points], strict=True)
    assert law == pytest.approx(fit(*columns).law.constants())

    main(["launch", str(path)])
    assert "6 runs, 0 to do" in capsys.readouterr().out
    best = tmp_path / "best.yaml"
    main(["predict", str(path), "--flops", "1e10", "--out", str(best), "--mfu", "0.5", "--peak-tflops", "0.01"])
    assert "device-hours at 50.0 % of 0.01 TFLOP/s (--mfu and --peak-tflops)" in capsys.readouterr().out
    config = load_config(best)
    assert config.model.dim in (16, 24, 32)
    assert config.run.name == "best"

    # An edited study does not mix with the runs of the one before.
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "overrides": ["optimizer.beta2=0.9"]}))
    with pytest.raises(SystemExit):
        main(["launch", str(path)])
    assert "optimizer.beta2 is 0.95 in the run, 0.9 in the study" in capsys.readouterr().err


def test_grid_prints_and_writes_only_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(["grid", str(path), "--tflops", "0.001", "--startup", "10"])
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "full-d24-1.5x" in said
    assert "6 runs, " in said
    assert "device-hours" in said
    main(["grid", str(path), "--write"])
    configs = sorted((tmp_path / "studies" / "tiny" / "configs").iterdir())
    assert len(configs) == 6
    for config in configs:
        assert load_config(config).run_dir == tmp_path / "studies" / "tiny" / config.stem


def test_runs_go_to_slurm_as_one_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, overrides=["cluster.processes_per_node=2"], parallel=3)
    main(["launch", str(path), "--slurm", "--dry-run"])
    said = capsys.readouterr().out
    assert "--array=0-5%3" in said
    assert "--job-name=tiny" in said
    assert "2 data ranks" in said


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_study(tmp_path))
    for words, says in (
        (["fit", path], "points.json: run `tools/scaling_law.py collect` first"),
        (["predict", path, "--flops", "1e12"], "points.json: run `tools/scaling_law.py collect` first"),
        (["plot", path], "points.json: run `tools/scaling_law.py collect` first"),
        (["launch", path, "--dry-run"], "--dry-run is for --slurm"),
        (["grid", str(tmp_path / "none.yaml")], "cannot read study"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        shown = capsys.readouterr()
        assert says in shown.err
        assert shown.err.count("\n") == 1
    main(["collect", path])
    said = capsys.readouterr().out
    assert "0 points, 6 runs left out" in said
    assert "left out: full-d16-0.5x: not started: no metrics.jsonl" in said
    with pytest.raises(SystemExit):
        main(["fit", path])
    assert "there are no points in" in capsys.readouterr().err
