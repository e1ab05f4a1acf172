"""Which model does a command mean by RUN_OR_EXPORT, and what is it, down to its weights' fingerprint?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titans_pretrain.config import Config, config_from_dict
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import DTYPES, is_export, load_export
from titans_pretrain.model import Titans
from titans_pretrain.train.checkpoint import read_manifest
from titans_pretrain.train.saved_state import StoredWeights
from tools.choose_checkpoint import choose_checkpoint


class Loaded(NamedTuple):
    """A model in evaluation mode, in this process."""

    model: Titans
    tokenizer: Tokenizer
    config: Config
    training: dict[str, Any]
    """step and tokens, as far as known."""
    export: Path | None
    """Its folder, where it is one."""


def load_model(source: Path, checkpoint: str = "", device: str = "cpu", dtype: str = "") -> Loaded:
    """The model of an exported folder, of a run folder (its newest complete checkpoint, or `checkpoint`) or of a checkpoint.

    Args:
        dtype: fp32 or bf16, what it computes in; "": as stored, which for a checkpoint is fp32.

    Raises:
        UserError: it is none of these, or it is damaged.
    """
    if is_export(source):
        if checkpoint:
            raise UserError(
                f"--checkpoint {checkpoint} chooses among a run's checkpoints, but {source} is an export; drop one of the two"
            )
        export = load_export(source, device, dtype)
        return Loaded(export.model, export.tokenizer, export.info.config, _facts(export.info.training), source)
    folder = choose_checkpoint(source, checkpoint)
    manifest = read_manifest(folder)
    config = config_from_dict(manifest["config"])
    tokenizer = Tokenizer(folder / "tokenizer.model")
    model = Titans(config.model.resolved())
    weights = StoredWeights(folder, manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model = model.to(device=device, dtype=DTYPES[dtype or "fp32"])
    return Loaded(model.eval().requires_grad_(False), tokenizer, config, _facts(manifest), None)


def fingerprint(model: Titans) -> str:
    """Hex SHA-256 over names, shapes and fp32 values of all parameters: the same for a checkpoint and its fp32 export."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _facts(known: dict[str, Any]) -> dict[str, Any]:
    return {key: known[key] for key in ("step", "tokens") if key in known}
