"""Does a whole run on split models and split sequences, stopped and resumed, train what one process trains, and save it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, VOCAB_SIZE, read_metrics, tiny_tree
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights, read_manifest

STEPS = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    # 6 heads, of which each rank has 3; 61 pieces of vocabulary, of which each has 31.
    "tensor": dict(parallel__tensor=2, model__num_heads=6, model__dim=48, engine__zero_stage=1),
    # The window and the convolutions look back over the border; gradient chunks of 12 lie across it.
    "sequence": dict(parallel__sequence=2, parallel__memory="hand_off", model__variant="mal", model__memory_chunk=12),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_in_pieces_under_a_layout_is_the_run_of_one_process(name: str, dataset: Path, tmp_path: Path) -> None:
    def tree(run: str, **overrides: Any) -> dict[str, Any]:
        common = dict(
            schedule__tokens=STEPS * 8 * SEQ_LEN,
            optimizer__learning_rate=1e-3,
            optimizer__eps=1e-3,
            data__micro_batch=4,
            eval__interval=3,
            checkpoint__interval=2,
            parallel__check_interval=2,
            run__name=run,
        )
        return tiny_tree(dataset, tmp_path, **{**LAYOUTS[name], **common, **overrides})

    pieces = [tree("pieces", run__stop_after=3), tree("pieces")]
    assert run_distributed(train_job, 2, tree("whole"), *pieces) == [None, None]
    assert run_distributed(train_job, 1, tree("alone", parallel__tensor=1, parallel__sequence=1)) == [None]

    rows = {run: read_metrics(tmp_path / run) for run in ("whole", "pieces", "alone")}
    assert len(rows["whole"]) == len(rows["alone"]) == len(rows["pieces"])
    for own, again, alone in zip(rows["whole"], rows["pieces"], rows["alone"], strict=True):
        for key in ("step", "tokens", "loss", "grad_norm", "valid_loss", "block_0/surprise"):
            assert own.get(key) == again.get(key), (own["step"], key)
            if key in alone:
                # Surprise under hand_off is the mean over shards that end at other places of a chunk.
                assert own[key] == pytest.approx(alone[key], rel=1e-4 if "surprise" not in key else 0.1), key

    checkpoints = {run: find_checkpoints(tmp_path / run)[0] for run in rows}
    weights = {run: full_fp32_weights(folder) for run, folder in checkpoints.items()}
    assert weights["alone"]["embedding.weight"].shape[0] == VOCAB_SIZE
    for parameter, alone in weights["alone"].items():
        assert torch.equal(weights["whole"][parameter], weights["pieces"][parameter]), parameter
        torch.testing.assert_close(weights["whole"][parameter], alone, rtol=1e-3, atol=1e-5, msg=parameter)
    assert read_manifest(checkpoints["whole"])["layout"]["tensor"] == (2 if name == "tensor" else 1)


def test_a_run_goes_on_under_another_split_of_the_model_and_of_rows(dataset: Path, tmp_path: Path) -> None:
    common = dict(schedule__tokens=STEPS * 8 * SEQ_LEN, model__variant="lmm", run__name="moved")

    def tree(**overrides: Any) -> dict[str, Any]:
        return tiny_tree(dataset, tmp_path, **common, **overrides)

    assert run_distributed(train_job, 2, tree(parallel__tensor=2, run__stop_after=2)) == [None, None]
    assert run_distributed(train_job, 2, tree(parallel__sequence=2, run__stop_after=1)) == [None, None]
    assert run_distributed(train_job, 2, tree(parallel__data=2)) == [None, None]
    run = tmp_path / "moved"
    # Ranks of one group and of two share the optimizer state alike: only the first change moves tensors.
    assert (run / "log" / "rank_0.txt").read_text().count("resharded: ") == 1
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, STEPS + 1))
