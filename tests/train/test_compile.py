"""model.compile in a real run: same losses, checkpoints that resume without it, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import traced_train_job
from tests.train.tiny import SEQ_LEN, losses, read_metrics, tiny_config, tiny_tree
from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights
from titans_pretrain.train.compiler import check_compiler


def test_a_compiled_run_equals_a_plain_one_and_resumes_as_one(dataset: Path, tmp_path: Path) -> None:
    """Through DeepSpeed ZeRO-1, with signals and recomputed activations, then on from its checkpoint as written."""

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__num_layers=1,
            data__batch_tokens=2 * SEQ_LEN,
            schedule__tokens=4 * 2 * SEQ_LEN,
            log__interval=2,
            eval__tokens=SEQ_LEN,
            engine__activation_checkpointing=True,
            run__name=name,
            **overrides,
        )

    plain, compiled = tree("plain"), tree("compiled", model__compile=True)
    compiled["run"]["stop_after"] = 2
    resumed = tree("compiled")
    assert run_distributed(traced_train_job, 1, plain, compiled, resumed) == [None]
    rows, expected_rows = (read_metrics(tmp_path / name) for name in ("compiled", "plain"))
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses(tmp_path / "plain"), abs=1e-5, rel=0)
    assert len(losses(tmp_path / "plain")) == 4
    signals = [{name: x for name, x in row.items() if name.startswith("block_")} for row in (rows[2], expected_rows[2])]
    assert signals[0] == pytest.approx(signals[1], rel=1e-4)
    assert signals[0]
    found, expected = (full_fp32_weights(find_checkpoints(tmp_path / name)[0]) for name in ("compiled", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


def test_zero_3_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model.compile=true.*engine.zero_stage=3.*use engine.zero_stage=2 or model.co"
    ):
        tiny_config(Path("data"), Path("runs"), model__compile=True, engine__zero_stage=3)


@pytest.mark.parametrize(
    ("device", "missing"), [("cpu", r"a C\+\+ compiler"), ("cuda", "a C compiler|the package triton")]
)
def test_a_missing_compiler_is_one_sentence(device: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match=f"model.compile=true needs ({missing}).*; install it or set model.compile=false"
    ):
        check_compiler(torch.device(device))
