"""How a run survives: checkpoints that are whole or absent, found again by themselves, refused where they do not fit.

A checkpoint folder step_00001000 holds DeepSpeed's files (`deepspeed/`), each rank's random states (`rank_N.pt`), the
tokenizer, the logits of a fixed validation prefix (`logits.safetensors`, for tools that convert the weights) and
`manifest.json`, written last, with the size and SHA-256 of every other file. The folder is written as step_00001000.tmp
and renamed when all of it is on disk; whatever dies before that costs nothing older.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from titans_pretrain.config import Config, config_from_dict, config_to_dict
from titans_pretrain.data.atomic import sha256_of, sync_directory
from titans_pretrain.data.mixture import Sources
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.durable import write_file
from titans_pretrain.train.saved_state import SavedState, StoredWeights

if TYPE_CHECKING:  # reading a checkpoint's manifest must not import DeepSpeed
    from titans_pretrain.train.engine import Engine

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
LOGITS = "logits.safetensors"
UNFINISHED = ".tmp"

SPEED_ONLY = ("compile",)
"""Keys of the model section that do not change what the model computes."""


@dataclass(frozen=True)
class Progress:
    """Where a run is. With the config and the seed this decides everything that follows."""

    step: int = 0
    """Optimizer steps made."""
    position: int = 0
    """Number of the next training sequence in the stream of data."""
    tokens: int = 0
    """Tokens trained on; the schedule is a function of it."""


# -------------------------------------------------------------------------------------------------------------- publishing


def commit(folder: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into `folder`, whose other files are on disk, and give it its name.

    Raises:
        OSError: as the file system does.
    """
    text = json.dumps(manifest, indent=1).encode()
    write_file(folder / MANIFEST, lambda file: file.write(text))
    for directory in [folder, *(p for p in folder.iterdir() if p.is_dir())]:
        sync_directory(directory)
    folder.rename(final)
    sync_directory(final.parent)


def prune(run_dir: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` finished checkpoints (0 keeps all) and those at multiples of `keep_every` steps."""
    if keep_last == 0:
        return
    for folder in finished_folders(run_dir / "checkpoints")[keep_last:]:
        if keep_every and step_of(folder) % keep_every == 0:
            continue
        # Renamed first: a prune that is killed leaves an unfinished folder, not a damaged checkpoint.
        with contextlib.suppress(OSError):
            shutil.rmtree(folder.rename(folder.with_name(folder.name + UNFINISHED)))


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def finished_folders(checkpoints: Path) -> list[Path]:
    """Folders that have their final name, newest first."""
    return sorted((p for p in checkpoints.glob("step_*") if p.name.removeprefix("step_").isdigit()), reverse=True)


# ---------------------------------------------------------------------------------------------------------------- finding


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: there is none, it is not JSON, or it is of another format.
    """
    path = Path(checkpoint) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {MANIFEST} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}")
    manifest["layout"].setdefault("tensor", 1)  # before there was tensor parallelism
    return manifest


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, comparing every file with the manifest; None when it is whole."""
    try:
        files = read_manifest(checkpoint)["files"]
    except UserError as error:
        return str(error)
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        for name, digest in zip(files, pool.map(lambda n: sha256_of(checkpoint / n), files), strict=True):
            if digest != files[name]["sha256"]:
                return f"the contents of {name} do not have the manifest's SHA-256"
    return None


def find_checkpoints(run_dir: Path, say: Callable[[str], Any] = print, newest_only: bool = False) -> list[Path]:
    """Complete, undamaged checkpoints of a run folder, newest first; `say` is told what was skipped and why.

    Args:
        newest_only: stop at the first good one; checksumming them all can take minutes.
    """
    found = []
    for folder in finished_folders(Path(run_dir) / "checkpoints"):
        damage = find_damage(folder)
        if damage is not None:
            say(f"skipping {folder}: {damage}")
            continue
        found.append(folder)
        if newest_only:
            break
    return found


def choose_resume(run_dir: Path, resume: str, say: Callable[[str], Any]) -> Path | None:
    """The checkpoint to continue from by `run.resume`, None for a fresh start. Run by one rank.

    Raises:
        UserError: run.resume=never where checkpoints exist, or a path that is not a whole checkpoint or would leave a
            newer one of another history beside the new ones.
    """
    if resume == "auto":
        found = find_checkpoints(run_dir, say, newest_only=True)
        return found[0] if found else None
    existing = finished_folders(run_dir / "checkpoints")
    if resume == "never":
        if existing:
            raise UserError(
                f"run.resume is never but {existing[0]} exists; set run.resume=auto to continue it, or another run.name"
            )
        return None
    chosen = Path(resume)
    damage = find_damage(chosen) if chosen.is_dir() else "there is no such folder"
    if damage is not None:
        raise UserError(f"cannot resume from run.resume={resume}: {damage}")
    if read_manifest(chosen).get("weights_only"):
        raise UserError(f"run.resume={resume} has weights and no run to continue; set run.init_from={resume} instead")
    newer = [p for p in existing if p.name > chosen.name]
    if newer:
        raise UserError(
            f"run.resume={resume} would go back behind {newer[0]}, which a later run.resume=auto would take up again; "
            "move that folder away, or set another run.name"
        )
    return chosen


def clear_remains(run_dir: Path, start_from: Path | None, say: Callable[[str], Any]) -> None:
    """Delete what killed saves left behind; rename damaged checkpoints newer than `start_from`, which would otherwise count
    among those to keep and push out whole ones."""
    for folder in sorted((run_dir / "checkpoints").glob("step_*" + UNFINISHED)):
        say(f"removing {folder}: its save never finished")
        shutil.rmtree(folder, ignore_errors=True)
    for folder in finished_folders(run_dir / "checkpoints"):
        if start_from is None or folder.name > start_from.name:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            say(f"renaming {folder} to {folder.rename(aside).name}")


# --------------------------------------------------------------------------------------------------------------- resuming


def check_fits(checkpoint: Path, manifest: Mapping[str, Any], config: Config, sources: Sources) -> None:
    """Refuse to continue with another model or tokenizer; course.py compares the data.

    Raises:
        UserError: naming the key and both values.
    """
    saved, now = (asdict(c.model.resolved()) for c in (config_from_dict(manifest["config"]), config))
    if manifest["tokenizer_sha256"] != sources.tokenizer_sha256:
        where = "data.sources" if config.data.sources else "data.path"
        raise UserError(
            f"{checkpoint} was trained with tokenizer {manifest['tokenizer_sha256'][:12]}, but {where} "
            f"{sources.sources[0].shards.path} has tokenizer {sources.tokenizer_sha256[:12]} (SHA-256); set {where} back or "
            "start a new run.name"
        )
    for key, value in now.items():
        if key not in SPEED_ONLY and saved.get(key) != value:
            raise UserError(
                f"{checkpoint} was trained with model.{key}={saved.get(key)}, but the config says {value}; "
                "set it back or start a new run.name"
            )


def layout_of(config: Config, grid: Grid) -> dict[str, Any]:
    """What decides which rank holds which part of the state. How replicas share rows and tokens does not."""
    return {
        "world_size": grid.world_size,
        "tensor": grid.tensor.size,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
    }


def fits_layout(manifest: Mapping[str, Any], config: Config, grid: Grid) -> bool:
    """Whether every rank finds what it holds in a file of its own, or in stage 0 in the one copy."""
    layout, here = manifest["layout"], layout_of(config, grid)
    # Without ZeRO every replica has the whole state, so another number of them may share it.
    free = ("world_size",) if here["zero_stage"] == 0 else ()
    return all(layout[key] == value for key, value in here.items() if key not in free)


def layout_text(layout: Mapping[str, Any]) -> str:
    """One line on who wrote a checkpoint, by its manifest's layout."""
    if layout["zero_stage"] is None:
        return f"whole parameters, engine.precision={layout['precision']}"
    return (
        f"{layout['world_size']} process{'es' if layout['world_size'] != 1 else ''}, "
        f"parallel.tensor={layout['tensor']}, engine.zero_stage={layout['zero_stage']}, "
        f"engine.precision={layout['precision']}"
    )


def changed_settings(manifest: Mapping[str, Any], config: Config) -> list[str]:
    """Settings that may differ on resume and do, as `key: old -> new`, for the log."""
    saved, now = manifest["config"], config_to_dict(config)
    return [
        f"{section}.{key}: {saved.get(section, {}).get(key)} -> {value}"
        for section, values in now.items()
        for key, value in values.items()
        if section != "run" and saved.get(section, {}).get(key) != value
    ]


def load_checkpoint(
    checkpoint: Path, manifest: Mapping[str, Any], config: Config, engine: Engine, grid: Grid
) -> str | None:
    """Restore weights, optimizer state and random states into a fresh engine. Collective; `check_fits` comes first.

    Returns:
        a line for the log where another layout wrote the checkpoint.
    """
    line = None
    if fits_layout(manifest, config, grid):
        engine.load(checkpoint)
    else:
        engine.place(SavedState(checkpoint, manifest))
        line = f"resharded: saved as {layout_text(manifest['layout'])}; now {layout_text(layout_of(config, grid))}"
    if grid.rank < manifest["layout"]["world_size"]:
        states = torch.load(checkpoint / f"rank_{grid.rank}.pt", map_location="cpu", weights_only=False)
        _restore_random_states(states, grid.device)
    else:  # a rank that did not exist: a state of its own, the same whenever this checkpoint is resumed so
        torch.manual_seed(hash((manifest["config"]["run"]["seed"], manifest["step"], grid.rank)) % (1 << 63))
    return line


def random_states(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the global state is what must be restored)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def full_fp32_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Full fp32 master weights of a checkpoint, by state_dict name (a tied head under both of its names).

    Works for every ZeRO stage and world size, in one process without a process group.

    Raises:
        UserError: the folder is not a complete checkpoint.
    """
    return {name: w.clone() for name, w in StoredWeights(Path(checkpoint), read_manifest(checkpoint)).items()}
