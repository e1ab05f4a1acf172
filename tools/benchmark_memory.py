"""How fast is the memory, and is it right? Measures one layer's operator beside its peers, on whatever device is here.

    python tools/benchmark_memory.py                       # the table at the device's usual shape
    python tools/benchmark_memory.py --check               # every path against the plainest computation; exit code 1 if wrong
    python tools/benchmark_memory.py --long                # 131,072 tokens: does time and memory grow linearly?
    python tools/benchmark_memory.py --dim 1024 --head-dim 64 --hidden 64 256 --chunk 16 64 --json table.json

Peers that are not installed or cannot run here say so in their row. `h` is the width of the memory's network, `C` its chunk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.errors import UserError, exit_on_user_error
from tools.benchmark_check import TOLERANCES, check
from tools.benchmark_measure import GIB, Settings, measure
from tools.benchmark_operators import DTYPES, PACKAGES, PEERS, Row, peer_rows

PATHS = ("auto", "closed_form", "triton", "reference")
LONG_TOKENS = 131_072


class Defaults(NamedTuple):
    """What is measured where nothing is asked for."""

    dim: int
    head_dim: int
    hidden: list[int]
    chunk: list[int]
    tokens: int
    batch: int
    dtype: str
    repeats: int
    warm_up: int
    lengths: list[int]


DEFAULTS = {
    "cuda": Defaults(1024, 64, [64, 256], [16, 64, 256], 4096, 8, "bf16", 20, 5, [63, 64, 100, 1000, 4096]),
    "cpu": Defaults(384, 96, [384], [64], 2048, 1, "fp32", 5, 1, [63, 64, 100, 1000]),
}
MATMUL = {"cuda": Row("matmul", 1, 8192, 1, 1, "bf16"), "cpu": Row("matmul", 1, 2048, 1, 1, "fp32")}
"""The measured matrix product that percentages refer to."""

NAMES = {
    "matmul": "matrix product",
    "memory": "memory (ours)",
    "attention": "causal attention (SDPA)",
    "dense": "dense layers of a block",
    "gated_delta_rule": "gated delta rule (fla)",
    "titans_pytorch": "titans-pytorch memory",
}
WIDTHS = (23, 57, 9, 10, 9, 8, 7, 7)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dim", type=int, help="channels, all heads together (default 1024; CPU 384)")
    parser.add_argument("--heads", type=int, help="heads of the memory (default dim / head-dim)")
    parser.add_argument("--head-dim", type=int, help="channels of a head (default 64; CPU 96)")
    parser.add_argument(
        "--hidden", type=int, nargs="+", help="widths h of the memory's network (default 64 256; CPU 384)"
    )
    parser.add_argument("--chunk", type=int, nargs="+", help="chunks C (default 16 64 256; CPU or --long 64)")
    parser.add_argument("--tokens", type=int, help="length T of a sequence (default 4096; CPU 2048; --long 131072)")
    parser.add_argument("--batch", type=int, help="sequences (default 8; CPU, --check or --long 1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of activations and parameters (default bf16; CPU fp32)")
    parser.add_argument("--paths", nargs="+", default=["auto", "closed_form", "triton"], choices=PATHS)
    parser.add_argument("--peers", nargs="+", default=["all"], choices=("all", "none", *PEERS))
    parser.add_argument("--repeats", type=int, help="of which the median is shown (default 20; CPU 5; --long 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a row may take (default 600)")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GiB", help="of a row on a CPU (default 80 %% of what is free)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--check", action="store_true", help="compare results, measure no times")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="lengths of --check (default 63 64 100 1000; GPU also 4096)"
    )
    parser.add_argument("--long", action="store_true", help="ours alone at T / 4, T / 2 and T, batch 1")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not asked for.

    Raises:
        UserError: values that cannot work, or not together.
    """
    if args.check and args.long:
        raise UserError("--check and --long are two tasks; ask for one of them")
    if args.lengths and not args.check:
        raise UserError("--lengths belongs to --check; the table's length is --tokens")
    if "reference" in args.paths and not args.check:
        raise UserError(
            "--paths reference is one autograd call a token and is no candidate; it can be asked for with --check"
        )
    if len(args.peers) > 1 and {"all", "none"} & set(args.peers):
        raise UserError(f"--peers takes all, none or names, not {' '.join(args.peers)} together")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; leave --device out to measure on the CPU")
    default = DEFAULTS[args.device]
    if args.long:
        default = default._replace(tokens=LONG_TOKENS, batch=1, chunk=[64], repeats=3, warm_up=1)
    for name in ("hidden", "chunk", "tokens", "batch", "dtype", "repeats", "lengths"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(default, name))
    for name in ("dim", "heads", "head_dim", "hidden", "chunk", "tokens", "batch", "repeats", "threads", "lengths"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    for name in ("timeout", "memory_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {value:g}")
    resolve_heads(args, default)
    if args.memory_limit is None:
        args.memory_limit = 0.8 * free_memory() / GIB
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
    if args.long and args.tokens % 4:
        raise UserError(f"--long halves the length twice; --tokens {args.tokens} is not a multiple of 4")
    args.warm_up = default.warm_up
    args.paths = list(dict.fromkeys(args.paths))
    return args


def resolve_heads(args: argparse.Namespace, default: Defaults) -> None:
    """Any two of dim, heads and head_dim give the third."""
    if args.dim is None:
        args.dim = args.heads * args.head_dim if args.heads and args.head_dim else default.dim
    if args.head_dim is None:
        args.head_dim = args.dim // args.heads if args.heads else min(default.head_dim, args.dim)
    if args.heads is None:
        args.heads = args.dim // args.head_dim
    if args.heads * args.head_dim != args.dim:
        raise UserError(
            f"--heads {args.heads} times --head-dim {args.head_dim} is {args.heads * args.head_dim}, not --dim {args.dim}"
        )


def free_memory() -> int:
    """Bytes that programs can still have; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from: device, versions, and every setting."""
    versions: dict[str, str | None] = {}
    for key, package in PACKAGES.items():
        try:
            versions[key] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[key] = None
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "device": args.device,
        "device_name": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "load_average": os.getloadavg()[0],
        "settings": settings,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------------------------------------------ table


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print row by row -> the rows' figures for the JSON."""
    shape = dict(heads=args.heads, head_dim=args.head_dim, dtype=args.dtype)
    lengths = [args.tokens // 4, args.tokens // 2, args.tokens] if args.long else [args.tokens]
    rows = [
        Row("memory", args.batch, tokens, **shape, hidden=hidden, chunk=chunk, path=path)
        for path in args.paths
        for hidden in args.hidden
        for chunk in args.chunk
        for tokens in lengths
    ]
    if not args.long and args.peers != ["none"]:
        names = PEERS if args.peers == ["all"] else tuple(dict.fromkeys(args.peers))
        chunk = 64 if 64 in args.chunk else args.chunk[0]
        rows += peer_rows(names, dict(batch=args.batch, tokens=args.tokens, **shape), args.hidden, chunk)
    settings = Settings(args.device, args.threads, args.repeats, args.warm_up, args.memory_limit, args.timeout)
    print_head(args)
    peak_tflops = None
    measured = []
    for row in [MATMUL[args.device], *rows]:
        figures = measure(row, settings)
        if row.operator == "matmul":
            peak_tflops = figures.get("tflops")
        tflops = figures.get("tflops")
        figures["percent_of_matmul"] = 100 * tflops / peak_tflops if tflops and peak_tflops else None
        print_row(row, figures)
        measured.append({**vars(row), "setting": row.setting(), **figures})
    if args.long:
        print_growth(measured)
    return measured


def print_head(args: argparse.Namespace) -> None:
    about = environment(args)
    versions = ", ".join(f"{key} {version}" for key, version in about["versions"].items() if version)
    print(f"{about['device_name']}; {versions}; threads: {args.threads}; load average {about['load_average']:.1f}")
    peak = (
        "peak memory is what torch allocated at most (max_memory_allocated)"
        if args.device == "cuda"
        else "peak memory is how far the peak resident memory of the row's own process grew"
    )
    print(f"Medians of {args.repeats} after {args.warm_up} warm-up; {peak}, inputs, parameters and gradients included.")
    print(
        "TFLOP/s: matrix products of model/cost.py (scan_tile_flops), backward = 2 x forward; % of the first row's.\n"
    )
    print_cells("operator", "setting", "fwd ms", "fwd+bwd ms", "Mtok/s", "peak GiB", "TFLOP/s", "%")
    print_cells(*("-" * width for width in WIDTHS))


def print_row(row: Row, figures: dict[str, Any]) -> None:
    if "words" in figures:
        print(f"| {NAMES[row.operator]:<{WIDTHS[0]}} | {row.setting():<{WIDTHS[1]}} | {figures['words']}", flush=True)
        return
    keys = ("forward_ms", "total_ms", "mtok_s", "peak_gib", "tflops", "percent_of_matmul")
    print_cells(NAMES[row.operator], row.setting(), *(significant(figures[key]) for key in keys))


def print_cells(*cells: str) -> None:
    padded = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))]
    print(f"| {' | '.join(padded)} |", flush=True)


def significant(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    decimals = next((n for n, bound in enumerate((100, 10, 1)) if value >= bound), None)
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"


def print_growth(measured: list[dict[str, Any]]) -> None:
    """How time and memory grow from one length to the next: 2.0 is linear."""
    print()
    for before, after in itertools.pairwise(measured):
        if after["tokens"] != 2 * before["tokens"] or after["operator"] != "memory" or "words" in before | after:
            continue
        # A peak of zero is one too small for the system's count of resident pages.
        time, peak = (after[key] / before[key] if before[key] else float("nan") for key in ("total_ms", "peak_gib"))
        print(f"{after['setting']}: twice the tokens take {time:.2f} times the time and {peak:.2f} times the memory")


# ------------------------------------------------------------------------------------------------------------ check


def check_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare and print line by line -> the results for the JSON. Two heads are enough: heads do not meet."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    of_output, of_gradient = TOLERANCES[args.dtype]
    print(
        f"RMS(x - judge) / RMS(judge); at most {of_output:g} for out, {of_gradient:g} for each gradient ({args.dtype})"
    )
    checked = []
    for hidden in args.hidden:
        for chunk in args.chunk:
            shape = dict(heads=min(args.heads, 2), head_dim=args.head_dim, dtype=args.dtype, hidden=hidden, chunk=chunk)
            print(f"\nhead_dim {args.head_dim}, h {hidden}, C {chunk}")
            headed = False
            for tokens in args.lengths:
                for result in check(Row("memory", min(args.batch, 2), tokens, **shape), args.paths, device):
                    checked.append({**shape, **result})
                    line = f"T {tokens:<6} {result['path']:<11}"
                    if "words" in result:
                        print(f"{line}  {result['words']}", flush=True)
                        continue
                    errors = result["errors"]
                    if not headed:
                        print(" " * len(line) + "".join(f"{name:>{column(name)}}" for name in errors))
                        headed = True
                    cells = "".join(f"{error:>{column(name)}.1e}" for name, error in errors.items())
                    print(f"{line}{cells}  {'ok' if result['passed'] else 'WRONG'}", flush=True)
    return checked


def column(name: str) -> int:
    """Width of a column of --check that must hold 1.0e-05."""
    return 2 + max(len(name), 7)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = resolve(parse(argv))
    results = check_all(args) if args.check else table(args)
    if args.json is not None:
        key = "check" if args.check else "rows"
        args.json.write_text(json.dumps({**environment(args), key: results}, indent=1) + "\n", encoding="utf-8")
    if args.check:
        ran = [result for result in results if "passed" in result]
        wrong = sum(not result["passed"] for result in ran)
        print(f"\n{len(ran) - wrong} of {len(ran)} comparisons passed")
        if wrong or not ran:
            sys.exit(1)


if __name__ == "__main__":
    main()
