"""What can be done with a training checkpoint? `export` makes a model to use of it, a folder that generate.py and load_export
read, `import` a checkpoint of that again, `import-llama` starting weights of a Hugging Face folder; `inspect`, `verify` and
`reshape` are in checkpoint_commands.py.

    python tools/convert_checkpoint.py export RUN OUT [--checkpoint step_N] [--dtype fp32|bf16] [--overwrite]
    python tools/convert_checkpoint.py import EXPORT OUT
    python tools/convert_checkpoint.py import-llama FOLDER OUT [--variant transformer|mag|mal] [--set model.key=value ...]
    python tools/convert_checkpoint.py inspect|verify RUN [--checkpoint step_N]
    python tools/convert_checkpoint.py reshape RUN OUT [--checkpoint step_N]

The export is written beside OUT, a fresh process checks that it computes the logits that the trainer's own model computed
when it saved, and only then is it given its name. Nothing is left at OUT when that fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import titans_pretrain
from titans_pretrain.config import config_from_dict
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import DTYPES, EXPORT_NAMES, MAX_SHARD_BYTES, is_export, write_export
from titans_pretrain.inference.huggingface.flatten import modelling_files
from titans_pretrain.inference.verify import Comparison
from titans_pretrain.train.checkpoint import read_manifest
from titans_pretrain.train.saved_state import StoredWeights
from tools.checkpoint_commands import add_inspect, add_reshape, add_verify
from tools.choose_checkpoint import add_source, choose_checkpoint
from tools.import_command import add_import
from tools.import_llama import add_import_llama


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert training checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_export(commands)
    add_import(commands)
    add_import_llama(commands)
    add_reshape(commands)
    add_inspect(commands)
    add_verify(commands)
    options = parser.parse_args(arguments)
    options.run(options)


# ---------------------------------------------------------------------------------------------------------------- export


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a folder for inference: weights, config, tokenizer; verified against the trainer's logits",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
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
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=MAX_SHARD_BYTES,
        metavar="N",
        help=f"weights above this go into several files (default {MAX_SHARD_BYTES:,})",
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
    if options.max_shard_bytes <= 0:
        raise UserError(f"--max-shard-bytes must be above 0, not {options.max_shard_bytes}")
    weights = StoredWeights(checkpoint, manifest)
    config = config_from_dict(manifest["config"])
    facts = {
        "checkpoint": checkpoint.name,
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "position": manifest["position"],
        "data": manifest.get("data"),
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
            write_export(
                temporary, config, weights, checkpoint / "tokenizer.model", facts, dtype, options.max_shard_bytes
            )
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
    if not (out / "tokenizer.json").is_file():
        print("note: AutoTokenizer has no counterpart of this tokenizer's algorithm; there is only tokenizer.model")
    parameters = sum(math.prod(shape) for shape in weights.shapes.values())
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"exported {checkpoint} to {out}: {parameters / 1e6:.2f} M parameters in {options.dtype}, {size / 1e6:.1f} MB"
    )


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
    with tempfile.TemporaryDirectory() as cache:  # transformers copies the modelling code before it loads it
        quiet = {"HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **quiet}
        )
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
    if not folder.is_dir() or not all(_is_ours(file.name) for file in folder.iterdir()):
        raise UserError(f"{folder} is in the way and is not what a killed export leaves; move it or choose another OUT")
    shutil.rmtree(folder)


def _is_ours(name: str) -> bool:
    """Whether an export, of this version or the one before, has a file of that name."""
    known = {*EXPORT_NAMES, *modelling_files()}
    return name in known or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


if __name__ == "__main__":
    main()
