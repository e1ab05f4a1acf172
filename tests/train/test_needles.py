"""Are the needle scores in a run's metrics those of its model in one process, under every layout?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.inference.tiny import train_tokenizer
from tests.tools.test_convert_checkpoint import make_dataset
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_config, tiny_tree
from titans_pretrain.config import EvalConfig, config_from_dict
from titans_pretrain.data.mixture import Sources
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.haystack import NOISE, Haystack, Words
from titans_pretrain.evaluation.needle import TASKS, Needles
from titans_pretrain.evaluation.scoring import Scoring, judge
from titans_pretrain.model import Titans
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights, read_manifest
from titans_pretrain.train.evaluate import Evaluation
from titans_pretrain.train.report import _board_name

LENGTHS = [400]
COUNT = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage_3": dict(engine__zero_stage=3, engine__deepspeed=sharded(300)),
    "tensor": dict(parallel__tensor=2),
    "sequence": dict(parallel__sequence=2),
}


@pytest.fixture(scope="module")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needles")
    return make_dataset(folder / "data", train_tokenizer(folder))


def test_every_layout_gives_what_one_process_computes(real_dataset: Path, tmp_path: Path) -> None:
    """5 needles on 2 ranks in micro-batches of 2, in pieces of 32 tokens that cut answers."""

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        return tiny_tree(
            real_dataset,
            tmp_path,
            **dict(
                model__variant="mag",
                model__num_layers=1,
                data__micro_batch=2,
                schedule__tokens=2 * 8 * SEQ_LEN,
                eval__tokens=SEQ_LEN,
                eval__needle_lengths=LENGTHS,
                eval__needle_samples=COUNT,
                run__name=name,
                **overrides,
            ),
        )

    trees = [tree(name, **overrides) for name, overrides in LAYOUTS.items()]
    assert run_distributed(train_job, 2, *trees) == [None, None]

    (checkpoint,) = find_checkpoints(tmp_path / "tensor")
    model = Titans(config_from_dict(read_manifest(checkpoint)["config"]).model)
    model.load_state_dict(full_fp32_weights(checkpoint))
    words = Words(Tokenizer(real_dataset / "tokenizer.model"))
    needles = Needles(TASKS["niah_single_1"], words, Haystack(words, NOISE, ""), seed=0)
    for length in LENGTHS:
        samples = [needles.sample(length, (i + 0.5) / COUNT, i) for i in range(COUNT)]
        judged = judge(
            model, samples, Scoring(piece=1000), new_tokens=1, num_tokens=words.tokenizer.vocab_size, eos_id=-1
        )
        tokens = sum(len(sample.answer_ids) for sample in samples)
        for run in LAYOUTS:
            row = read_metrics(tmp_path / run)[-1]
            assert row[f"needle_nll/{length}"] == pytest.approx(sum(j.nll for j in judged) / tokens, abs=3e-5), run
            assert row[f"needle_accuracy/{length}"] == sum(j.correct_tokens for j in judged) / tokens, run
            assert f"needle_nll/{length}" in read_metrics(tmp_path / run)[0], "nothing before the first step"
            assert "valid_perplexity" in row


@pytest.mark.parametrize("task", TASKS)
def test_prose_comes_from_the_validation_split(task: str, real_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(real_dataset, tmp_path, eval__needle_lengths=[900], eval__needle_task=task)
    shards = ShardSet.open(real_dataset)
    evaluation = Evaluation(config, Sources.of(config.data, [shards]), Grid(0, 1, torch.device("cpu")))
    assert evaluation._needles is not None
    ((tokens, labels), *_) = evaluation._needles.batches[900]
    text = Tokenizer(shards.tokenizer_path).decode(tokens[0].tolist())
    assert ("The sky is blue." in text) == (task == "niah_single_1")
    assert ("memory learns at test time" in text) == (TASKS[task].haystack == "prose")
    assert "A special magic" in text
    assert int((labels[0] != -100).sum()) > 5


def test_refusals(real_dataset: Path, dataset: Path, tmp_path: Path) -> None:
    def build(data: Path, **overrides: Any) -> None:
        config = tiny_config(data, tmp_path, **overrides)
        Evaluation(config, Sources.of(config.data, [ShardSet.open(data)]), Grid(0, 1, torch.device("cpu")))

    with pytest.raises(UserError, match=r"niah_single_1 does not fit in 100 tokens.*eval.needle_lengths"):
        build(real_dataset, eval__needle_lengths=[100])
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        build(dataset, eval__needle_lengths=[900])
    with pytest.raises(UserError, match=r"eval.needle_lengths must be whole numbers of 1 or more, not \[0\]"):
        build(real_dataset, eval__needle_lengths=[0])
    with pytest.raises(UserError, match=r"eval.needle_task must be one of niah_single_1"):
        build(real_dataset, eval__needle_task="niah")


def test_config_and_evaluation_name_the_same_tasks() -> None:
    (field,) = [f for f in dataclasses.fields(EvalConfig) if f.name == "needle_task"]
    assert list(field.metadata["choices"]) == list(TASKS)


def test_names_in_tensorboard() -> None:
    assert _board_name("needle_accuracy/1024") == "needle/accuracy_at_1024"
