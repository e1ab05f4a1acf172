"""How does a training checkpoint become a model to use? `export` writes a folder that generate.py and load_export read.

    python tools/convert_checkpoint.py export RUN OUT [--checkpoint step_N] [--dtype fp32|bf16] [--overwrite]

The export is written beside OUT, a fresh process checks that it computes the logits that the trainer's own model computed
when it saved, and only then is it given its name. Nothing is left at OUT when that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import titans_pretrain
from titans_pretrain.config import config_from_dict
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import DTYPES, EXPORT_NAMES, is_export, write_export
from titans_pretrain.inference.verify import Comparison
from titans_pretrain.train.checkpoint import find_checkpoints, find_damage, full_fp32_weights, read_manifest


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert training checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_export(commands)
    options = parser.parse_args(arguments)
    options.run(options)


# ---------------------------------------------------------------------------------------------------------------- export


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a folder for inference: weights, config, tokenizer; verified against the trainer's logits",
    )
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="run folder (its newest complete checkpoint) or one checkpoint folder"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--checkpoint", default="", metavar="step_N", help="which checkpoint of the run folder")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="fp32",
        help="how weights are stored (default fp32, the master weights)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where the export is verified (default: CUDA if there)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an exported model")
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> None:
    """Write, verify, rename."""
    out: Path = options.out
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists; choose another folder, or pass --overwrite to replace an exported model")
    if out.exists() and not is_export(out):
        raise UserError(
            f"--overwrite replaces exported models only, and {out} is not one; choose another folder or remove it yourself"
        )
    checkpoint = choose_checkpoint(options.source, options.checkpoint)
    manifest = read_manifest(checkpoint)
    weights = full_fp32_weights(checkpoint)
    config = config_from_dict(manifest["config"])
    facts = {
        "checkpoint": checkpoint.name,
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "precision": config.engine.precision,
        "dataset_fingerprint": manifest["dataset_fingerprint"],
        "tokenizer_sha256": manifest["tokenizer_sha256"],
    }
    temporary = out.with_name(out.name + ".tmp")
    clear_leftover(temporary)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Rounded weights can only be compared loosely, so a bf16 export is first written and compared unrounded.
        for dtype in dict.fromkeys(("fp32", options.dtype)):
            shutil.rmtree(temporary, ignore_errors=True)
            write_export(temporary, config, weights, checkpoint / "tokenizer.model", facts, dtype)
            precision = config.engine.precision
            comparison = verify_in_fresh_process(
                temporary, checkpoint / "logits.safetensors", precision, options.device
            )
            if not comparison.agree:
                raise UserError(
                    f"the export does not compute what the trainer computed ({dtype} weights, {comparison}); "
                    f"{out} was not written"
                )
            print(f"{dtype} weights verified against the trainer's model: {comparison}")
        put_in_place(temporary, out)
    except OSError as error:
        raise UserError(f"the export could not be written to {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parameters = json.loads((out / "config.json").read_text())["parameters"]
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"exported {checkpoint} to {out}: {parameters / 1e6:.2f} M parameters in {options.dtype}, {size / 1e6:.1f} MB"
    )


def choose_checkpoint(source: Path, wanted: str) -> Path:
    """The undamaged checkpoint folder that RUN and --checkpoint name."""
    if (source / "manifest.json").is_file():
        if wanted:
            raise UserError(
                f"--checkpoint {wanted} chooses among a run's checkpoints, but {source} is one checkpoint; drop one of the two"
            )
        return undamaged(source)
    if not (source / "checkpoints").is_dir():
        what = "is neither a run folder (no checkpoints in it) nor a complete checkpoint (no manifest.json)"
        raise UserError(f"{source} {what if source.exists() else 'does not exist'}")
    if not wanted:
        found = find_checkpoints(source, say=lambda line: print(line, file=sys.stderr), newest_only=True)
        if not found:
            raise UserError(f"{source} has no complete checkpoint to export")
        return found[0]
    number = wanted.removeprefix("step_")
    names = sorted(p.name for p in (source / "checkpoints").glob("step_*") if (p / "manifest.json").is_file())
    for name in names:
        if number.isdecimal() and name == f"step_{int(number):08d}":
            return undamaged(source / "checkpoints" / name)
    raise UserError(
        f"--checkpoint {wanted}: {source} has no such checkpoint; it has {', '.join(names) or 'none that is complete'}"
    )


def undamaged(checkpoint: Path) -> Path:
    damage = find_damage(checkpoint)
    if damage is not None:
        raise UserError(f"{checkpoint} is damaged: {damage}")
    return checkpoint


def verify_in_fresh_process(folder: Path, logits_file: Path, precision: str, device: str) -> Comparison:
    """Compare in a new interpreter, which knows only what is in the files."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [
        sys.executable,
        "-m",
        "titans_pretrain.inference.verify",
        str(folder),
        str(logits_file),
        precision,
        device,
    ]
    root = str(Path(titans_pretrain.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        return Comparison(**json.loads(result.stdout))
    except (ValueError, TypeError):
        last = (result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"])[-1]
        raise UserError(f"the export could not be verified: {last.removeprefix('error: ')}") from None


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`. An export already there is moved aside first and deleted last, never lost half-way."""
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(out.name + ".old")
    clear_leftover(old)
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def clear_leftover(folder: Path) -> None:
    """Remove what a killed export left at `folder`, and nothing that could be somebody's."""
    if not folder.exists():
        return
    if not folder.is_dir() or {file.name for file in folder.iterdir()} - set(EXPORT_NAMES):
        raise UserError(f"{folder} is in the way and is not what a killed export leaves; move it or choose another OUT")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
