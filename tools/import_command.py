"""How does an exported model go on training? `import` makes a checkpoint of it, which a run resumes from under any layout.

An export has the weights and where the run stood, not the optimizer's moments: they begin at zero, and the optimizer counts
its updates anew. Everything else continues: step, tokens, learning rate, the next sequence of the data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from titans_pretrain.config import Config, config_to_dict
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import TOKENIZER_NAME, load_export
from titans_pretrain.model import Titans
from titans_pretrain.train.checkpoint import FORMAT, LOGITS, TOKENIZER
from titans_pretrain.train.whole import write_whole

PROGRESS = ("step", "tokens", "position", "data", "dataset_fingerprint", "tokenizer_sha256")
"""What of an export's training facts a checkpoint's manifest needs."""


def add_import(commands: Any) -> None:
    """`import EXPORT CHECKPOINT`."""
    parser = commands.add_parser(
        "import", help="make a checkpoint of an exported model, to continue its training; moments begin at zero"
    )
    parser.add_argument("export", metavar="EXPORT", type=Path, help="folder written by `export`")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to create")
    parser.set_defaults(run=run_import)


def run_import(options: argparse.Namespace) -> None:
    """Write OUT.

    Raises:
        UserError: the export is damaged, or from before exports said where the run stood; OUT exists or cannot be written.
    """
    model, _, info = load_export(options.export, dtype="fp32")
    missing = [key for key in PROGRESS if key not in info.training]
    if missing:
        raise UserError(
            f"{options.export} does not say where its run stood ({', '.join(missing)} missing in its training facts); "
            "export again from the checkpoint"
        )
    facts = {key: info.training[key] for key in PROGRESS}
    write_imported(options.out, model, info.config, facts, {TOKENIZER: options.export / TOKENIZER_NAME})
    if info.dtype != "fp32":
        print(f"note: the export has {info.dtype} weights; what was rounded away when it was written is lost")
    print(
        f"imported {options.export} to {options.out}: step {facts['step']}, {facts['tokens']:,} tokens, moments zero; "
        f"continue with run.resume={options.out}"
    )


def write_imported(
    out: Path, model: Titans, config: Config, facts: Mapping[str, Any], others: Mapping[str, Path], seq_len: int = 0
) -> None:
    """Write the weights of `model` as a checkpoint without layout whose moments are zero.

    Args:
        facts: of the manifest, what PROGRESS names and more.
        others: files to copy into the checkpoint.
        seq_len: tokens of the logits that exports are checked against. 0: data.seq_len.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    parameters = dict(model.named_parameters())

    def read(name: str, kind: str) -> Tensor:
        return parameters[name].detach() if kind == "weight" else torch.zeros_like(parameters[name])

    layout = {"world_size": 0, "tensor": 1, "zero_stage": None, "precision": config.engine.precision}
    manifest = {"format": FORMAT, **facts, "config": config_to_dict(config), "layout": layout}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        # A checkpoint has logits of some tokens, for exports to be checked against; these are this model's own.
        tokens = torch.arange(seq_len or config.data.seq_len)[None] % config.model.vocab_size
        logits = model.logits(model.hidden(tokens)[0]).float()
        file = Path(scratch) / LOGITS
        safetensors.torch.save_file({"tokens": tokens, "logits": logits}, file)
        write_whole(out, parameters, read, 0.0, manifest, {LOGITS: file, **others})
