"""How is a checkpoint written so that no layout is in it? One file per parameter, with its full weight and both moments.

Such a folder is a checkpoint like any other: a run resumes from it under every layout. It is made from a run's checkpoint
(`tools/convert_checkpoint.py reshape`) one parameter at a time, so the host needs memory for a few of the largest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import LOGITS, TOKENIZER, UNFINISHED, commit, read_manifest
from titans_pretrain.train.saved_state import KINDS, WHOLE_FOLDER, SavedState, whole_file


def write_whole(
    out: Path,
    names: Iterable[str],
    read: Callable[[str, str], Tensor],
    step: float,
    manifest: Mapping[str, Any],
    others: Mapping[str, Path],
) -> None:
    """Write the checkpoint folder `out`, complete or not at all.

    Args:
        names: of all parameters, a tied one once.
        read: (name, one of KINDS) -> the full fp32 tensor.
        step: updates the optimizer has made.
        manifest: of a checkpoint, its `layout` with zero_stage None; `files` is filled in here.
        others: files to copy beside the parameters, by their names in the checkpoint.

    Raises:
        UserError: `out` exists, or the disk is full.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder or remove it")
    folder = out.with_name(out.name + UNFINISHED)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / WHOLE_FOLDER).mkdir(parents=True)
        files = {}
        for name in names:
            path = whole_file(folder / WHOLE_FOLDER, name)
            tensors = {kind: read(name, kind).contiguous() for kind in KINDS}
            safetensors.torch.save_file(tensors, path, metadata={"step": repr(float(step))})
            files[f"{WHOLE_FOLDER}/{path.name}"] = _finish(path)
        for name, source in others.items():
            shutil.copyfile(source, folder / name)
            files[name] = _finish(folder / name)
        commit(folder, out, {**manifest, "files": dict(sorted(files.items()))})
    except (OSError, SafetensorError) as error:  # the second is how safetensors reports a full disk
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error}; nothing of it is kept") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _finish(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def reshape(checkpoint: Path, out: Path) -> None:
    """Write the whole and undamaged `checkpoint` without its layout as the folder `out`, file by file.

    Raises:
        UserError: as `write_whole`.
    """
    manifest = read_manifest(checkpoint)
    saved = SavedState(checkpoint, manifest)
    layout = {**manifest["layout"], "tensor": 1, "zero_stage": None}
    ranks = [f"rank_{rank}.pt" for rank in range(layout["world_size"])]
    others = {name: checkpoint / name for name in (*ranks, TOKENIZER, LOGITS) if (checkpoint / name).is_file()}
    write_whole(out, saved.shapes, saved.whole, saved.step, {**manifest, "layout": layout}, others)
