"""A dataset of a few thousand tokens and a model of a few thousand parameters: real in every part, only small."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.config import Config, config_from_dict
from titans_pretrain.data.manifest import Manifest, SplitEntry, dtype_for, write_manifest
from titans_pretrain.data.writer import ShardWriter, unigram_entropy

VOCAB_SIZE = 61
SEQ_LEN = 32


def make_dataset(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: bytes = b"a tokenizer",
    sequences: int = 200,
    doc_tokens: int = 0,
    shard_tokens: int = 1 << 20,
    block_tokens: int = 1 << 11,
) -> Path:
    """Shards of a noisy cycle through the vocabulary, which a model learns in a few steps; in one document, or in ones of
    `doc_tokens` (a shard ends with a document)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    writers = {}
    for split, count in (("train", sequences), ("valid", 20)):
        steps = generator.choice([1, 2, 5], size=count * SEQ_LEN + 1, p=[0.8, 0.1, 0.1])
        tokens = (np.cumsum(steps) % VOCAB_SIZE).astype(np.uint16)
        with ShardWriter(folder, split, VOCAB_SIZE, shard_tokens=shard_tokens, block_tokens=block_tokens) as writer:
            for doc in np.split(tokens, range(doc_tokens, len(tokens), doc_tokens)) if doc_tokens else [tokens]:
                writer.write(doc, np.array([len(doc)]))
        writers[split] = writer
    manifest = Manifest(
        dtype=dtype_for(VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        bos_id=1,
        eos_id=2,
        unigram_entropy=unigram_entropy(writers["train"].token_counts),
        options={},
        splits={s: SplitEntry(w.num_tokens, 1, 4 * w.num_tokens, tuple(w.shards)) for s, w in writers.items()},
    )
    write_manifest(folder, manifest)
    return folder


def tiny_tree(data: Path, runs: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """Config sections; overrides are written section__key=value."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "variant": "mag",
            "num_layers": 2,
            "dim": 32,
            "num_heads": 2,
            "hidden_dim": 64,
            "window": 16,
            "segment_len": 16,
            "num_persistent": 4,
            "memory_chunk": 16,
            "memory_expansion": 2.0,
        },
        "data": {"path": str(data), "seq_len": SEQ_LEN, "batch_tokens": 8 * SEQ_LEN},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"tokens": 20 * 8 * SEQ_LEN, "warmup_fraction": 0.1},
        "parallel": {},
        "engine": {"zero_stage": 1, "precision": "fp32", "loss_chunk": 100},
        "checkpoint": {"interval": 0},
        "log": {"interval": 5, "tensorboard": False, "peak_tflops": 0.01},
        "eval": {"interval": 0, "tokens": 10 * SEQ_LEN},
        "run": {"dir": str(runs), "device": "cpu"},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return tree


def tiny_config(data: Path, runs: Path, **overrides: Any) -> Config:
    return config_from_dict(tiny_tree(data, runs, **overrides))


def all_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What a run measured of the model: not the rows about its checkpoints, of which a run in pieces has more."""
    return [row for row in all_metrics(run_dir) if "checkpoint_step" not in row]


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, in order, as written."""
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]
