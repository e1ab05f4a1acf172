"""What tools/status.py says of a run at every stage of its life."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, make_dataset, tiny_tree
from titans_pretrain.train.lifecycle import record_fault
from tools.status import main, status


def test_a_run_through_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tree(**overrides: Any) -> dict[str, dict[str, Any]]:
        settings = {"model__variant": "transformer", "schedule__tokens": 6 * 8 * SEQ_LEN, "checkpoint__interval": 2}
        return tiny_tree(data, tmp_path, **{**settings, **overrides})

    data = make_dataset(tmp_path / "data")
    run = tmp_path / "run"
    assert run_distributed(train_job, 2, tree(run__stop_after=3)) == [None, None]
    found = status(run)
    assert (found["state"], found["step"], found["steps"], found["last_checkpoint"]) == ("dead", 3, 6, "step_00000003")
    assert found["seconds_left"] == pytest.approx(3 * 8 * SEQ_LEN / found["tokens_per_second"])

    # As if two ranks were in step 4, and then one of them silent.
    for rank, age in ((0, 0), (1, 0)):
        beat = {"rank": rank, "host": "a", "pid": os.getpid(), "step": 4, "phase": "update", "life": 2, "attempt": 1}
        file = run / "heartbeat" / f"rank_{rank:05d}.json"
        file.write_text(json.dumps({**beat, "since": time.time(), "time": time.time() - age}))
    assert status(run)["state"] == "running"
    assert (status(run)["lives"], status(run)["attempt"]) == (3, 1)
    file.write_text(json.dumps({**beat, "since": time.time() - 99, "time": time.time() - 99}))
    record_fault(run, "hang", text="rank 1 does not run")
    main([str(run), "--ranks"])
    text = capsys.readouterr().out
    assert "stuck, rank 1 is silent" in text
    assert "hang 1" in text
    assert "rank 1 does not run" in text
    (run / "heartbeat" / "rank_00000.json").write_text(file.read_text().replace('"rank": 1', '"rank": 0'))
    assert status(run)["state"] == "dead"
    (run / "PREEMPTED").write_text(json.dumps({"step": 3, "signal": "SIGUSR2"}))
    assert "after SIGUSR2" in status(run)["why"]
    (run / "STOP").touch()
    assert status(run)["state"] == "stopped"
    (run / "STOP").unlink()

    assert run_distributed(train_job, 2, tree()) == [None, None]
    main([str(run), "--json", "--watch", "5"])
    assert json.loads(capsys.readouterr().out)["state"] == "done"


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it has no config.yaml\n"
