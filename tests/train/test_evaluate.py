"""The validation loss is the mean over the same tokens under every layout and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_config, tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.data.mixture import Sources
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import TokenStream
from titans_pretrain.errors import UserError
from titans_pretrain.model import Titans
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights, read_manifest
from titans_pretrain.train.evaluate import Evaluation


@pytest.mark.parametrize("variant", ["mac", "mal", "sliding_window"])
def test_every_layout_gives_the_mean_over_the_first_sequences(variant: str, dataset: Path, tmp_path: Path) -> None:
    """7 sequences of one length and 3 of thrice the length, over 2 ranks in micro-batches of 2: rows are left over in both."""

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__variant=variant,
            model__num_layers=1,
            model__memory_depth=1,
            data__micro_batch=2,
            schedule__tokens=8 * SEQ_LEN,
            eval__tokens=7 * SEQ_LEN + 5,
            eval__length_multiples=[1, 3],
            run__name=name,
            **overrides,
        )

    trees = [tree("stage_1"), tree("stage_3", engine__zero_stage=3, engine__deepspeed=sharded(300))]
    assert run_distributed(train_job, 2, *trees) == [None, None]

    (checkpoint,) = find_checkpoints(tmp_path / "stage_1")
    model = Titans(config_from_dict(read_manifest(checkpoint)["config"]).model)
    model.load_state_dict(full_fp32_weights(checkpoint))
    for multiple, count, name in ((1, 7, "valid_loss"), (3, 2, "valid_loss_x3")):
        stream = TokenStream(ShardSet.open(dataset), "valid", multiple * SEQ_LEN, seed=0, shuffle=False)
        rows = torch.stack([torch.from_numpy(stream.sample(index)) for index in range(count)])
        with torch.no_grad():
            logits = model.logits(model.hidden(rows[:, :-1])[0])
        expected = float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        for run in ("stage_1", "stage_3"):
            assert read_metrics(tmp_path / run)[-1][name] == pytest.approx(expected, abs=2e-5), (run, name)
            assert name.replace("loss", "perplexity") in read_metrics(tmp_path / run)[-1]


def test_fewer_sequences_than_ranks(dataset: Path, tmp_path: Path) -> None:
    def tree(name: str) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__variant="transformer",
            schedule__tokens=8 * SEQ_LEN,
            eval__tokens=1,
            run__name=name,
        )

    assert run_distributed(train_job, 1, tree("alone")) == [None]
    assert run_distributed(train_job, 4, tree("four")) == [None] * 4
    alone, four = (read_metrics(tmp_path / name)[-1]["valid_loss"] for name in ("alone", "four"))
    assert four == pytest.approx(alone, abs=1e-5)


def test_validation_split_too_short_for_the_length(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, eval__length_multiples=[1, 21])
    with pytest.raises(UserError, match=r"valid split.*length_multiples"):
        Evaluation(config, Sources.of(config.data, [ShardSet.open(dataset)]), Grid(0, 1, torch.device("cpu")))
