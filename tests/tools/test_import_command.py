"""An export made into a checkpoint again goes on training from where it was, under another layout too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.inference.tiny import train_tokenizer
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, make_dataset, read_metrics, tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.inference.export import write_export
from titans_pretrain.train.checkpoint import full_fp32_weights, read_manifest
from titans_pretrain.train.saved_state import StoredWeights
from tools.convert_checkpoint import main


def test_an_import_goes_on_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(tmp_path)
    data = make_dataset(tmp_path / "data", tokenizer=tokenizer.read_bytes())

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        settings = {
            "model__variant": "lmm",
            "model__num_layers": 1,
            "model__vocab_size": Tokenizer(tokenizer).vocab_size,
            "model__tie_embeddings": True,
            "data__batch_tokens": 4 * SEQ_LEN,
            "schedule__tokens": 8 * 4 * SEQ_LEN,
            "run__name": name,
        }
        return tiny_tree(data, tmp_path / "runs", **{**settings, **overrides})

    assert run_distributed(train_job, 2, tree("first", run__stop_after=4, parallel__tensor=2)) == [None, None]
    main(["export", str(tmp_path / "runs" / "first"), str(tmp_path / "out")])
    main(["import", str(tmp_path / "out"), str(tmp_path / "again")])
    main(["verify", str(tmp_path / "again")])
    assert "is whole" in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "runs" / "first" / "checkpoints").iterdir()
    before, after = full_fp32_weights(checkpoint), full_fp32_weights(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
    manifests = [read_manifest(folder) for folder in (checkpoint, tmp_path / "again")]
    for key in ("step", "position", "tokens", "data", "dataset_fingerprint", "tokenizer_sha256"):
        assert manifests[0][key] == manifests[1][key], key

    # Under ZeRO 3 on two data ranks; the next loss is that of the same weights, the next ones of fresh moments.
    trees = [
        tree("unbroken"),
        tree("second", run__resume=str(tmp_path / "again"), engine__zero_stage=3),
    ]
    assert run_distributed(train_job, 2, *trees) == [None, None]
    unbroken, second = (
        [row for row in read_metrics(tmp_path / "runs" / name) if "loss" in row] for name in ("unbroken", "second")
    )
    assert [row["step"] for row in second] == [5, 6, 7, 8]
    assert second[0]["loss"] == pytest.approx(unbroken[4]["loss"], rel=1e-5)
    assert second[0]["lr"] == unbroken[4]["lr"]
    assert second[0]["tokens"] == unbroken[4]["tokens"]
    assert second[-1]["loss"] < second[0]["loss"] + 0.2

    # What was imported can be exported, and an export without progress is refused.
    main(["export", str(tmp_path / "again"), str(tmp_path / "once_more")])
    config, manifest = config_from_dict(manifests[1]["config"]), manifests[1]
    weights = StoredWeights(tmp_path / "again", manifest)
    write_export(tmp_path / "bare", config, weights, tokenizer, {"step": 4})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "bare"), str(tmp_path / "no")])
    assert "does not say where its run stood (tokens, position" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    facts = json.loads((tmp_path / "once_more" / "titans_export.json").read_text())["training"]
    assert facts["position"] == manifest["position"]
