"""Document starts reach the model in training, in evaluation and in the search for a bad layer; and who is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.tiny import write_dataset
from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, VOCAB_SIZE, read_metrics, tiny_config, tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.data.manifest import Packing
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import MicroBatch
from titans_pretrain.errors import UserError
from titans_pretrain.layout import Layout
from titans_pretrain.model import Titans, initialize
from titans_pretrain.train import evaluate
from titans_pretrain.train.loop import check_documents, open_sources


def make_batch() -> MicroBatch:
    tokens = torch.randint(VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = labels[0, 9:16] = -100
    starts = torch.zeros(2, SEQ_LEN, dtype=torch.bool)
    starts[:, 0] = starts[0, 16] = True
    return MicroBatch(tokens, labels, starts)


def run_engines(*trees: dict[str, Any]) -> list[tuple[float, float, float, int]]:
    """Per tree: the training loss, the gradient norm, the validation loss, and how many passes of the search for a bad layer
    were told where documents start."""
    from titans_pretrain.train.engine import Engine
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.watch import describe_failure

    grid = join(find_environment(), "cpu").lay_out(Layout(1))
    found = []
    for tree in trees:
        config = config_from_dict(tree)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCAB_SIZE))
        model = Titans(config.model)
        initialize(model, seed=0)
        engine = Engine(config, model, grid)
        batch = make_batch()
        loss = float(engine.forward_backward(batch.tokens, batch.labels, 1.0, batch.document_starts))
        norm = engine.step(0.0)
        evaluate._batch = lambda stream, indices, rows, document_starts: make_batch()
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tokens=2 * SEQ_LEN))
        valid = evaluate.Evaluation(config, open_sources(config), grid).run(engine)["valid_loss"]

        told = []
        forward = model.forward
        model.forward = lambda *given, told=told, forward=forward: (told.append(given[2]), forward(*given))[1]  # type: ignore[method-assign]
        assert "does not repeat" in describe_failure(engine, [batch], 1.0, grid)
        found.append((loss, norm, valid, sum(x is not None for x in told)))
    return found


def test_document_starts_reach_the_model(dataset: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        data__batch_tokens=2 * SEQ_LEN, data__reset_at_documents=True, model__num_layers=1, optimizer__clip=0.0
    )
    trees = [
        tiny_tree(
            dataset,
            tmp_path,
            **changes,
            model__variant=variant,
            engine__zero_stage=stage,
            engine__deepspeed=sharded(0) if stage == 3 else {},
        )
        for variant, stage in (("mag", 0), ("mag", 3), ("mac", 1))
    ]
    (found,) = run_distributed(run_engines, 1, *trees)
    for tree, (loss, norm, valid, told) in zip(trees, found, strict=True):
        config = config_from_dict(tree).model
        model = Titans(dataclasses.replace(config, vocab_size=VOCAB_SIZE))
        initialize(model, seed=0)
        batch = make_batch()
        expected = model(*batch)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-4)
        assert valid == pytest.approx(loss / int((batch.labels != -100).sum()), rel=1e-5)
        assert told == 2
        assert abs(expected - model(batch.tokens, batch.labels)) > 1e-3, "documents must matter here"


@pytest.mark.parametrize(
    ("packing", "changes", "parts"),
    [
        (None, {}, ["packing concat", "--packing bestfit --seq-len 32 --align 16", "data.reset_at_documents=false"]),
        ({"kind": "concat"}, {}, ["packing concat"]),
        (
            {"kind": "bestfit", "seq_len": 32, "align": 8},
            {},
            ["model.memory_chunk (16)", "multiples of 8", "--align 16"],
        ),
        (
            {"kind": "bestfit", "seq_len": 32, "align": 24},
            dict(model__variant="mac", model__segment_len=32),
            ["model.segment_len (32)", "multiples of 24"],
        ),
    ],
)
def test_a_dataset_whose_documents_begin_elsewhere_is_refused(
    packing: dict[str, Any] | None, changes: dict[str, Any], parts: list[str], dataset: Path, tmp_path: Path
) -> None:
    shards = ShardSet.open(dataset)
    options = {} if packing is None else {"packing": packing}
    shards.manifest = dataclasses.replace(shards.manifest, options=options)
    check_documents(tiny_config(dataset, tmp_path, **changes), shards)
    with pytest.raises(UserError) as caught:
        check_documents(tiny_config(dataset, tmp_path, data__reset_at_documents=True, **changes), shards)
    assert all(part in str(caught.value) for part in [*parts, str(dataset)]), str(caught.value)


def test_a_dataset_that_fits_is_taken(dataset: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(dataset)
    for align, changes in (
        (16, {}),
        (32, dict(model__variant="mac", model__segment_len=16, model__memory_chunk=12)),
        (1, dict(model__variant="transformer")),
    ):
        packing = {"kind": "bestfit", "seq_len": 32, "align": align}
        shards.manifest = dataclasses.replace(shards.manifest, options={"packing": packing})
        check_documents(tiny_config(dataset, tmp_path, data__reset_at_documents=True, **changes), shards)


def test_a_run_on_packed_rows_learns_from_whole_documents(tmp_path: Path) -> None:
    """Real shards, two processes: the losses are those of the same documents, and differ from those without resets."""
    generator = np.random.default_rng(0)
    documents = [
        (generator.integers(3, VOCAB_SIZE) + np.arange(generator.integers(4, 40))) % (VOCAB_SIZE - 3) + 3
        for _ in range(300)
    ]
    packing = Packing(seq_len=SEQ_LEN, align=16, pad=2)
    data = write_dataset(
        tmp_path / "data",
        documents[:270],
        documents[270:],
        vocab_size=VOCAB_SIZE,
        shard_tokens=64 * SEQ_LEN,
        packing=packing,
    )
    runs = {"apart": True, "together": False}
    trees = [
        tiny_tree(
            data,
            tmp_path,
            schedule__tokens=12 * 8 * SEQ_LEN,
            model__num_layers=1,
            run__name=name,
            data__reset_at_documents=reset,
        )
        for name, reset in runs.items()
    ]
    assert run_distributed(train_job, 2, *trees) == [None, None]
    first, last = {}, {}
    for name in runs:
        rows = read_metrics(tmp_path / name)
        first[name], *_, last[name] = (row["valid_loss"] for row in rows if "valid_loss" in row)
        assert last[name] < first[name] - 0.3
    assert first["apart"] != first["together"]
