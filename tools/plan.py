"""What will a run need on so many GPUs, and would another layout need less? Needs no GPU itself.

python tools/plan.py CONFIG.yaml world=64 [section.key=value ...] [--json FILE]

Prints, for the layout that the config asks for (parallel.data, sequence, tensor) and for all others it allows: bytes per
GPU, and bytes that a GPU sends in a step, by the group of ranks it sends them to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.config import Config, load_config
from titans_pretrain.data.manifest import read_manifest
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.layout import choose_layout, describe
from titans_pretrain.model.cost import flops_per_token, parameter_counts
from titans_pretrain.parallel.plan import Plan, legal_layouts, make_plan

GIB = 2**30
SHOWN = 8
"""Alternatives printed; --json has all."""


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plan.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("settings", nargs="*", metavar="world=N | section.key=value", help="GPUs, and overrides")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what will run it; it decides how the memory is scanned (default: cuda)",
    )
    parser.add_argument(
        "--memory-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (default: 80, an H100's)"
    )
    parser.add_argument("--only-asked", action="store_true", help="leave out the alternatives, which take seconds each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too, in bytes")
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = _build_parser().parse_args(arguments)
    world_size, overrides = _split(args.settings)
    config = _resolved(load_config(args.config, overrides))
    layout = choose_layout(config, world_size)
    warnings.filterwarnings("ignore")  # a traced model has no content to warn about
    asked = make_plan(config, layout, args.device)
    counts = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.seq_len)
    print(
        f"{config.model.variant}, {counts['total'] / 1e6:.2f} M parameters ({_groups(counts)}), "
        f"{counts['non_embedding'] / 1e6:.2f} M non-embedding"
    )
    print(
        f"{flops / 1e9:.3f} GFLOP a token, {flops * config.data.batch_tokens / world_size / 1e12:,.1f} TFLOP a step and GPU; "
        f"ZeRO stage {config.engine.zero_stage}, {config.engine.precision}, "
        f"{'recomputing activations' if config.engine.activation_checkpointing else 'keeping activations'}"
    )
    print(f"\nasked: {describe(config, layout)}")
    _print_plan(asked, args.memory_gib)
    alternatives = []
    if not args.only_asked:
        others = [(other, its) for other, its in legal_layouts(config, world_size) if its != layout]
        alternatives = [(describe(other, its), make_plan(other, its, args.device)) for other, its in others]
        alternatives.sort(key=lambda pair: _rank(pair[1], args.memory_gib))
        _print_alternatives(alternatives, asked, args.memory_gib)
    if args.json:
        content = {
            "world_size": world_size,
            "parameters": counts,
            "flops_per_token": flops,
            "asked": _as_json(asked),
            "alternatives": [_as_json(plan) for _, plan in alternatives],
        }
        try:
            args.json.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {args.json}: {error.strerror}") from error


def _split(settings: Sequence[str]) -> tuple[int, list[str]]:
    """world=N, and the config's overrides."""
    worlds = [word.removeprefix("world=") for word in settings if word.startswith("world=")]
    if len(worlds) != 1:
        raise UserError("say on how many GPUs the run will be, once: world=N")
    if not worlds[0].isdigit() or int(worlds[0]) == 0:
        raise UserError(f"world must be a whole number above 0, not {worlds[0]}")
    return int(worlds[0]), [word for word in settings if not word.startswith("world=")]


def _resolved(config: Config) -> Config:
    """The config with a vocabulary: its own, or that of the data if it is there."""
    if config.model.vocab_size:
        return config
    if not config.data.path:
        raise UserError(
            "model.vocab_size is 0 and data.path is empty: set model.vocab_size=32000, or data.path to a dataset"
        )
    vocab_size = read_manifest(Path(config.data.path)).vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _groups(counts: dict[str, int]) -> str:
    named = {name: count for name, count in counts.items() if name not in ("total", "non_embedding") and count}
    return ", ".join(f"{name.replace('_', '-')} {count / 1e6:.1f}" for name, count in named.items())


def _print_plan(plan: Plan, memory_gib: float) -> None:
    print(
        f"    {plan.accumulation} micro-batches of {plan.rows} sequences; {plan.parameters / 1e6:.2f} M parameters on a GPU"
        " before ZeRO"
    )
    print(f"    GiB per GPU at the peak, in the {plan.peak}")
    for part, size in plan.bytes.items():
        print(f"        {part:<14}{size / GIB:9.3f}")
    fits = "" if plan.total_bytes <= memory_gib * GIB else f"   more than the {memory_gib:g} GiB of --memory-gib"
    print(f"        {'together':<14}{plan.total_bytes / GIB:9.3f}{fits}")
    print("    GiB sent per GPU and step, in messages")
    for group, traffic in plan.traffic.items():
        print(f"        {group:<14}{traffic.bytes / GIB:9.3f}  in {traffic.messages:,.0f}")


def _rank(plan: Plan, memory_gib: float) -> tuple[bool, float]:
    """The best first: of those that fit, the one that sends least."""
    return plan.total_bytes > memory_gib * GIB, plan.sent_bytes


def _print_alternatives(plans: list[tuple[str, Plan]], asked: Plan, memory_gib: float) -> None:
    if not plans:
        print("\nno other layout is allowed")
        return
    print("\nothers, those that fit first and of them those that send least:")
    print(f"    {'layout':<62}{'GiB per GPU':>12}{'GiB sent':>10}")
    for name, plan in plans[:SHOWN]:
        too_large = "" if plan.total_bytes <= memory_gib * GIB else "  does not fit"
        print(f"    {name:<62}{plan.total_bytes / GIB:12.2f}{plan.sent_bytes / GIB:10.3f}{too_large}")
    if len(plans) > SHOWN:
        print(f"    and {len(plans) - SHOWN} more (--json has them)")
    best = plans[0]
    if _rank(best[1], memory_gib) < _rank(asked, memory_gib):
        why = "fits and the asked one does not" if asked.total_bytes > memory_gib * GIB else "sends less"
        print(f"    {best[0]} {why}")


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(plan.layout),
        "micro_batch": plan.rows,
        "accumulation": plan.accumulation,
        "parameters_per_gpu": plan.parameters,
        "bytes_per_gpu": {**plan.bytes, "total": plan.total_bytes},
        "peak": plan.peak,
        "sent_per_step": {group: dataclasses.asdict(traffic) for group, traffic in plan.traffic.items()},
    }


if __name__ == "__main__":
    main()
