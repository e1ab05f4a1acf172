"""What preflight finds: differences that are really there, on real ranks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.tiny import SEQ_LEN, tiny_tree


def preflight_job(
    tree: dict[str, Any], fault: str, folder: str, skip: tuple[str, ...] = ()
) -> list[tuple[str, bool, str]]:
    """Findings on this rank; rank 1 has the fault."""
    import torch.distributed as dist

    from titans_pretrain.config import config_from_dict
    from titans_pretrain.layout import choose_layout
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.preflight import preflight

    config = config_from_dict(tree)
    grid = join(find_environment(), "cpu")
    grid = grid.lay_out(choose_layout(config, grid.world_size))
    clock = time.time
    if grid.rank == 1:
        if fault == "package":
            sys.path.insert(0, folder)
        elif fault == "clock":
            clock = lambda: time.time() + 300  # noqa: E731
        elif fault == "sum":
            honest = dist.all_reduce

            def wrong(x: Any, *args: Any, **kwargs: Any) -> Any:
                answer = honest(x, *args, **kwargs)
                x[7] += 1
                return answer

            dist.all_reduce = wrong
    findings = preflight(config, grid, skip=skip, megabytes=0.1, clock=clock)
    return [(finding.check, finding.ok, finding.text) for finding in findings]


def bad(answers: list[list[tuple[str, bool, str]]]) -> list[tuple[str, str]]:
    assert all(answer == answers[0] for answer in answers), "all ranks say the same"
    return [(check, text) for check, ok, text in answers[0] if not ok]


def test_sound_machines_pass(dataset: Path, tmp_path: Path) -> None:
    answers = run_distributed(preflight_job, 4, tiny_tree(dataset, tmp_path, parallel__tensor=2), "", "")
    assert bad(answers) == []
    said = {check: text for check, _, text in answers[0]}
    assert list(said) == ["versions", "devices", "clock", "disk", "run folder", "data", "all-reduce", "matmul"]
    sums = [text for check, _, text in answers[0] if check == "all-reduce"]
    assert [text.split(" ranks")[0] for text in sums] == ["all", "data", "tensor"]
    assert bad(run_distributed(preflight_job, 1, tiny_tree(dataset, tmp_path), "", "")) == []


def test_another_package_version(dataset: Path, tmp_path: Path) -> None:
    info = tmp_path / "site" / "numpy-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    tree = tiny_tree(dataset, tmp_path, data__batch_tokens=3 * SEQ_LEN)
    answers = run_distributed(preflight_job, 3, tree, "package", str(tmp_path / "site"), ("matmul",))
    ((check, text),) = bad(answers)
    assert check == "versions"
    assert text.startswith("numpy is 0.0.1 on ")
    assert "install the same on all nodes" in text


def test_a_clock_five_minutes_off(dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset, tmp_path, data__batch_tokens=3 * SEQ_LEN)
    ((check, text),) = bad(run_distributed(preflight_job, 3, tree, "clock", "", ("matmul",)))
    assert check == "clock"
    assert "clock is off by +300.0 s" in text


def test_another_run_folder(dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset, Path("runs"), run__name="preflight_test")
    (tmp_path / "runs").mkdir()
    elsewhere = os.getcwd()
    answers = run_distributed(folder_job, 2, tree, str(tmp_path))
    ((check, text),) = bad(answers)
    assert check == "run folder"
    assert "does not see what" in text
    assert os.getcwd() == elsewhere
    assert not list(tmp_path.rglob(".preflight_*")), "probes are removed"


def folder_job(tree: dict[str, Any], folder: str) -> list[tuple[str, bool, str]]:
    """Rank 0 in one folder, rank 1 in another: run.dir is relative."""
    mine = Path(folder) / f"node_{os.environ['RANK']}"
    mine.mkdir()
    os.chdir(mine)
    (mine / "runs" / "preflight_test").mkdir(parents=True)
    import titans_pretrain.train.preflight as module

    module.VISIBLE_SECONDS = 1.0
    return preflight_job(tree, "", "", ("matmul",))


@pytest.mark.parametrize("layout", [{}, {"parallel__tensor": 2}])
def test_a_wrong_sum(layout: dict[str, int], dataset: Path, tmp_path: Path) -> None:
    answers = run_distributed(preflight_job, 2, tiny_tree(dataset, tmp_path, **layout), "sum", "", ("matmul",))
    assert {check for check, _ in bad(answers)} == {"all-reduce"}
    assert all("rank 1 on" in text and "got a wrong sum" in text for _, text in bad(answers))


def test_an_unknown_check_is_named(dataset: Path, tmp_path: Path) -> None:
    from tests.distributed import RankFailed

    with pytest.raises(RankFailed, match="no check is called clocks; there are versions"):
        run_distributed(preflight_job, 1, tiny_tree(dataset, tmp_path), "", "", ("clocks",))
