"""What is in a checkpoint, is it whole, and how does it lose its layout? `inspect`, `verify`, `reshape`; none needs a GPU."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.errors import UserError
from titans_pretrain.model import weight_decay_applies
from titans_pretrain.parallel.split_table import split_dim
from titans_pretrain.train.checkpoint import layout_text, read_manifest
from titans_pretrain.train.saved_state import KINDS, SavedState
from titans_pretrain.train.whole import reshape
from tools.choose_checkpoint import add_source, choose_checkpoint

# --------------------------------------------------------------------------------------------------------------- reshape


def add_reshape(commands: Any) -> None:
    """`reshape RUN OUT`."""
    parser = commands.add_parser(
        "reshape",
        help="write a checkpoint without a layout: one file per parameter, weight and moments; resumes under any layout",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to create")
    parser.set_defaults(run=run_reshape)


def run_reshape(options: argparse.Namespace) -> None:
    """Write OUT from one undamaged checkpoint."""
    checkpoint = choose_checkpoint(options.source, options.checkpoint)
    started = time.perf_counter()
    reshape(checkpoint, options.out)
    manifest = read_manifest(options.out)
    size, seconds = _total_bytes(manifest), time.perf_counter() - started
    print(
        f"reshaped {checkpoint} (saved by {layout_text(read_manifest(checkpoint)['layout'])}) to {options.out}: "
        f"{size / 1e6:,.1f} MB in {seconds:.1f} s; continue from it with run.resume={options.out}"
    )


# --------------------------------------------------------------------------------------------------------------- inspect


def add_inspect(commands: Any) -> None:
    """`inspect RUN`."""
    parser = commands.add_parser("inspect", help="print what a checkpoint holds, without reading the weights")
    add_source(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace) -> None:
    """Print the facts, the config and the table of parameters."""
    checkpoint = choose_checkpoint(options.source, options.checkpoint, check=False)
    manifest = read_manifest(checkpoint)
    facts = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "next_sequence": manifest["position"],
        "saved_by": layout_text(manifest["layout"]),
        "dataset_fingerprint": manifest["dataset_fingerprint"],
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "files": len(manifest["files"]),
        "bytes": _total_bytes(manifest),
    }
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(shape),
            "elements": math.prod(shape),
            "split_dim": split_dim(name),
            "weight_decay": weight_decay_applies(name),
        }
        for name, shape in SavedState(checkpoint, manifest).shapes.items()
    ]
    if options.json:
        everything = {**facts, "data": manifest.get("data"), "config": manifest["config"], "parameters": parameters}
        print(json.dumps(everything, indent=1))
        return
    for key, value in facts.items():
        print(
            f"{key.replace('_', ' '):20} {value:,}" if isinstance(value, int) else f"{key.replace('_', ' '):20} {value}"
        )
    print("\nconfig")
    print(yaml.safe_dump(manifest["config"], sort_keys=False), end="")
    width = max(len(row["name"]) for row in parameters)
    print(f"\n{'parameter':{width}}  {'shape':>16}  {'elements':>13}  split over tensor ranks")
    for row in parameters:
        shape = " x ".join(map(str, row["shape"]))
        split = "no" if row["split_dim"] is None else f"dimension {row['split_dim']}"
        print(f"{row['name']:{width}}  {shape:>16}  {row['elements']:>13,}  {split}")
    print(f"{'total':{width}}  {'':>16}  {sum(row['elements'] for row in parameters):>13,}")


# ---------------------------------------------------------------------------------------------------------------- verify


def add_verify(commands: Any) -> None:
    """`verify RUN`."""
    parser = commands.add_parser(
        "verify", help="prove a checkpoint whole: every file's size and SHA-256, every parameter and moment readable"
    )
    add_source(parser)
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> None:
    """Check the files, then read all of the state.

    Raises:
        UserError: the first damage, by file or parameter.
    """
    checkpoint = choose_checkpoint(options.source, options.checkpoint)  # compares sizes and checksums
    manifest = read_manifest(checkpoint)
    saved = SavedState(checkpoint, manifest)
    elements = 0
    for name, shape in saved.shapes.items():
        for kind in KINDS:
            try:
                tensor = saved.whole(name, kind)
            except (KeyError, RuntimeError) as error:
                raise UserError(f"{checkpoint} does not hold {kind} of {name} as {list(shape)}: {error}") from error
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{checkpoint}: {kind} of {name} has values that are not finite")
        elements += math.prod(shape)
    if saved.step != manifest["step"]:
        print(f"note: the optimizer has made {saved.step:.0f} updates in {manifest['step']} steps")
    print(
        f"{checkpoint} is whole: {len(manifest['files'])} files, {_total_bytes(manifest) / 1e6:,.1f} MB; "
        f"{len(saved.shapes)} parameters of {elements / 1e6:.2f} M elements, each with both moments; step {manifest['step']}"
    )


def _total_bytes(manifest: Any) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())
