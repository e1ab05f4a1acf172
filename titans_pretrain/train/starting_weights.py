"""How does a new run begin with weights that are there already (run.init_from)? Weights only: the optimizer, the schedule and
the data begin anew, under any layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.config import Config, config_from_dict
from titans_pretrain.data.mixture import Sources
from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import SPEED_ONLY, find_damage, read_manifest
from titans_pretrain.train.saved_state import SavedState


class StartingWeights(SavedState):
    """The weights in a checkpoint folder, as the state of an optimizer that has made no step."""

    @property
    def step(self) -> float:
        return 0.0

    def slice_of(self, name: str, kind: str, rank: int, size: int, start: int = 0, count: int | None = None) -> Tensor:
        weight = super().slice_of(name, "weight", rank, size, start, count)
        return weight if kind == "weight" else torch.zeros_like(weight)


def check_starting_weights(folder: Path, config: Config, sources: Sources) -> str:
    """Refuse a folder whose weights are not those of the config's model, or belong to another tokenizer. Run by one rank.

    Returns:
        one line for the log.

    Raises:
        UserError: naming the key and both values.
    """
    damage = find_damage(folder) if folder.is_dir() else "there is no such folder"
    if damage is not None:
        raise UserError(f"cannot start from run.init_from={folder}: {damage}")
    manifest = read_manifest(folder)
    saved, now = (asdict(c.model.resolved()) for c in (config_from_dict(manifest["config"]), config))
    for key, value in now.items():
        if key not in SPEED_ONLY and saved.get(key) != value:
            raise UserError(
                f"run.init_from={folder} has weights of a model with model.{key}={saved.get(key)}, but the config says "
                f"{value}; set model.{key} so, or choose other weights"
            )
    theirs, ours = manifest["tokenizer_sha256"], sources.tokenizer_sha256
    if theirs and theirs != ours:
        raise UserError(
            f"run.init_from={folder} was trained with tokenizer {theirs[:12]}, but {sources.sources[0].shards.path} has "
            f"tokenizer {ours[:12]} (SHA-256); build the dataset with the tokenizer of the weights"
        )
    unknown = "" if theirs else "; which tokenizer they were trained with is not known"
    return f"starting with the weights of {folder}, saved at step {manifest['step']}{unknown}"


def starting_weights(folder: Path) -> StartingWeights:
    """For `Engine.place`; `check_starting_weights` comes first."""
    manifest: Mapping[str, Any] = read_manifest(folder)
    return StartingWeights(folder, manifest)
