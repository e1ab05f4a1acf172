"""Which checkpoint does a command mean by RUN and --checkpoint?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import find_checkpoints, find_damage


def add_source(parser: argparse.ArgumentParser) -> None:
    """The two arguments that `choose_checkpoint` takes."""
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="run folder (its newest complete checkpoint) or one checkpoint folder"
    )
    parser.add_argument("--checkpoint", default="", metavar="step_N", help="which checkpoint of the run folder")


def choose_checkpoint(source: Path, wanted: str, check: bool = True) -> Path:
    """The checkpoint folder that RUN and --checkpoint name.

    Args:
        check: read and checksum it; else it need only have a manifest.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (source / "manifest.json").is_file():
        if wanted:
            raise UserError(
                f"--checkpoint {wanted} chooses among a run's checkpoints, but {source} is one checkpoint; drop one of the two"
            )
        return undamaged(source) if check else source
    if not (source / "checkpoints").is_dir():
        what = "is neither a run folder (no checkpoints in it) nor a complete checkpoint (no manifest.json)"
        raise UserError(f"{source} {what if source.exists() else 'does not exist'}")
    if not wanted and not check:
        folders = sorted(p for p in (source / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit())
        if not folders:
            raise UserError(f"{source} has no checkpoint")
        return folders[-1]
    if not wanted:
        found = find_checkpoints(source, say=lambda line: print(line, file=sys.stderr), newest_only=True)
        if not found:
            raise UserError(f"{source} has no complete checkpoint")
        return found[0]
    number = wanted.removeprefix("step_")
    names = sorted(p.name for p in (source / "checkpoints").glob("step_*") if (p / "manifest.json").is_file())
    for name in names:
        if number.isdecimal() and name == f"step_{int(number):08d}":
            return choose_checkpoint(source / "checkpoints" / name, "", check)
    raise UserError(
        f"--checkpoint {wanted}: {source} has no such checkpoint; it has {', '.join(names) or 'none that is complete'}"
    )


def undamaged(checkpoint: Path) -> Path:
    """`checkpoint`, once every file is as its manifest says."""
    damage = find_damage(checkpoint)
    if damage is not None:
        raise UserError(f"{checkpoint} is damaged: {damage}")
    return checkpoint
