"""How fast does a model read and write at long contexts, and in how much memory, beside a Transformer++ of its size?

python tools/benchmark_inference.py configs/mag_340m.yaml --contexts 4096 32768 131072 --json inference.json
python tools/benchmark_inference.py OUT [OUT2 ...] --device cuda --dtype bf16

A MODEL is a folder written by `convert_checkpoint.py export`, or a YAML config (with initial weights: the time is the same).
Beside each stands a Transformer++ of the same depth, width, heads and number of parameters, the feed-forward being made
wider; --alone leaves it out. Every line is a process of its own:

prefill      tokens/s of reading the context, --piece tokens at a time
first token  seconds from the context's first token to the first new one
decode       tokens/s of writing --new-tokens after the context, all --batch rows counted
state        bytes that a row keeps between tokens, MiB
peak         memory while reading and while writing, MiB: what torch has allocated on a GPU, weights included; on a CPU what
             the process holds above what it held with the weights loaded
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titans_pretrain.config import ModelConfig, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import DTYPES, load_export, read_info
from titans_pretrain.inference.generate import Decoding, Row, read
from titans_pretrain.inference.sampling import SamplingOptions
from titans_pretrain.model import Titans, initialize
from titans_pretrain.model.cost import parameter_counts
from titans_pretrain.model.titans import state_bytes
from tools.generate import choose_device

MIB = 2**20


class Case(NamedTuple):
    """A line of the table."""

    name: str
    folder: Path | None
    """An export whose weights are taken; None: initial ones."""
    config: ModelConfig
    context: int
    new_tokens: int
    batch: int
    piece: int
    device: str
    dtype: str
    threads: int


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="export folder or YAML config")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=64, help="written after the context (default 64)")
    parser.add_argument("--batch", type=int, default=1, help="rows (default 1)")
    parser.add_argument("--piece", type=int, default=2048, help="tokens of the context read at once (default 2048)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of a config that leaves it open (default 32000)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="(default fp32)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default 0: torch's choice)")
    parser.add_argument("--alone", action="store_true", help="without the Transformer++ beside it")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of a line (default 1800)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    args = parser.parse_args(arguments)
    for name in ("new_tokens", "batch", "piece", "vocab_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if min(args.contexts) < 1:
        raise UserError(f"--contexts must be 1 or more, not {min(args.contexts)}")
    if args.threads < 0 or not args.timeout > 0:
        raise UserError(
            f"--threads must not be below 0 and --timeout be above it, not {args.threads} and {args.timeout}"
        )
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    device = choose_device(args.device)
    models: list[tuple[str, Path | None, ModelConfig]] = []
    for path in args.models:
        config = config_of(path, args.vocab_size)
        models.append((path.stem if path.is_file() else path.name, path if path.is_dir() else None, config))
        if not args.alone and config.variant != "transformer":
            models.append((f"transformer like {models[-1][0]}", None, transformer_like(config)))

    print(
        f"{device_name(device, args.threads)}, {args.dtype}, {args.batch} x context, "
        f"pieces of {args.piece}, {args.new_tokens} new tokens"
    )
    print(
        f"{'model':<32}{'parameters':>12}{'context':>9}{'prefill':>11}{'first token':>13}{'decode':>10}{'state':>10}"
        f"{'peak reading':>14}{'writing':>9}"
    )
    print(f"{'':<32}{'':>12}{'tokens':>9}{'tokens/s':>11}{'s':>13}{'tokens/s':>10}{'MiB':>10}{'MiB':>14}{'MiB':>9}")
    results = []
    for name, folder, config in models:
        parameters = parameter_counts(config)["total"]
        for context in args.contexts:
            settings = (args.new_tokens, args.batch, args.piece, device, args.dtype, args.threads)
            found = measure(Case(name, folder, config, context, *settings), args.timeout)
            results.append(
                {"model": name, "variant": config.variant, "parameters": parameters, "context": context, **found}
            )
            print(f"{name:<32}{parameters / 1e6:>11.1f}M{context:>9}{line_of(found)}", flush=True)
    if args.json is not None:
        facts = {
            "device": device_name(device, args.threads),
            "models": [str(m) for m in args.models],
            **{k: v for k, v in vars(args).items() if k not in ("models", "json", "device")},
        }
        try:
            args.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --json {args.json}: {error.strerror}") from error


def config_of(path: Path, vocab_size: int) -> ModelConfig:
    """The model of an export folder or a config.

    Raises:
        UserError: there is neither.
    """
    config = (read_info(path).config if path.is_dir() else load_config(path)).model
    return config if config.vocab_size else dataclasses.replace(config, vocab_size=vocab_size)


def transformer_like(config: ModelConfig) -> ModelConfig:
    """Transformer++ with the parameters of `config`, to a feed-forward unit in each layer."""
    base = dataclasses.replace(
        config, variant="transformer", arrangement="llama", hidden_dim=config.resolved_hidden_dim
    )
    missing = parameter_counts(config)["total"] - parameter_counts(base)["total"]
    hidden = base.hidden_dim + round(missing / (3 * config.dim * config.num_layers))
    return dataclasses.replace(base, hidden_dim=max(1, hidden))


def line_of(found: dict[str, Any]) -> str:
    if "words" in found:
        return f"  {found['words']}"
    return (
        f"{found['prefill_tokens_per_second']:>11,.0f}{found['first_token_seconds']:>13.2f}"
        f"{found['decode_tokens_per_second']:>10,.1f}{found['state_bytes'] / MIB:>10.2f}"
        f"{found['peak_reading_bytes'] / MIB:>14,.0f}{found['peak_writing_bytes'] / MIB:>9,.0f}"
    )


def measure(case: Case, timeout: float) -> dict[str, Any]:
    """The figures of a case, measured in a fresh process; or only `words`: why there are none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"words": f"not done after {timeout:g} s (--timeout)"}
        found: dict[str, Any] = receiver.recv()
        process.join()
        return found
    except EOFError:
        process.join()
        return {"words": f"its process died (exit code {process.exitcode}), most likely out of memory"}
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
            process.join()


def _child(case: Case, sender: Connection) -> None:
    try:
        found = measure_here(case)
    except (MemoryError, torch.OutOfMemoryError):
        found = {"words": "out of memory"}
    except Exception as error:  # a line never ends the table
        found = {"words": f"{type(error).__name__}: {error}".splitlines()[0]}
    sender.send(found)


def measure_here(case: Case) -> dict[str, Any]:
    """`measure` in this process."""
    if case.threads:
        torch.set_num_threads(case.threads)
    if case.folder is not None:
        model = load_export(case.folder, case.device, case.dtype).model
    else:
        model = Titans(case.config)
        initialize(model, seed=0)
        model = model.to(device=case.device, dtype=DTYPES[case.dtype]).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[list[int]]:
        shape = (case.batch, length)
        return torch.randint(case.config.vocab_size, shape, generator=generator).tolist()

    def rows(count: int) -> list[Row]:
        return [Row(count, SamplingOptions(temperature=0)) for _ in range(case.batch)]

    # What happens once (kernels, thread pools, the shapes of a piece) happens here.
    warm = Decoding(model)
    warm.add(rows(4), read(model, tokens(min(case.context, case.piece)), piece=case.piece))
    for _ in range(3):
        warm.step()
    del warm

    _give_back()
    prompt = tokens(case.context)
    base = _memory(case.device, reset=True)
    started = _now(case.device)
    decoding = Decoding(model)
    decoding.add(rows(case.new_tokens + 1), read(model, prompt, piece=case.piece))
    read_in = _now(case.device) - started
    decoding.step()
    first = _now(case.device) - started
    peak_reading = _memory(case.device) - base
    _give_back()
    _memory(case.device, reset=True)
    begun = _now(case.device)
    for _ in range(case.new_tokens):
        decoding.step()
    writing = _now(case.device) - begun
    return {
        "prefill_tokens_per_second": case.batch * case.context / read_in,
        "first_token_seconds": first,
        "decode_tokens_per_second": case.batch * case.new_tokens / writing,
        "state_bytes": state_bytes(decoding.state) // case.batch,
        "peak_reading_bytes": peak_reading,
        "peak_writing_bytes": _memory(case.device) - base,
    }


def _give_back() -> None:
    """To the system, what the C library keeps of what was freed: it is not the model's. Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str, reset: bool = False) -> int:
    """Peak bytes since the last reset; with `reset`, the bytes now (on a GPU 0, so that the weights count)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return 0
        return torch.cuda.max_memory_allocated()
    if reset:
        with contextlib.suppress(OSError):  # where the system cannot, the peak is that of the process
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS" if reset else "VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device: str, threads: int) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads or torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
