"""Compile the memory's Triton kernels for a GPU that need not be there, and print what each takes of it.

    python tools/compile_kernels.py --head-dim 64 --hidden 64 256 --chunk 64 --arch 90

Registers and spilled bytes are the assembler's, a thread; shared memory is Triton's, a program. Nothing runs: a kernel that
does not compile for the architecture, or wants more shared memory than it has, is an error. Where the GPU is there, what was
compiled lies in Triton's cache for it: several of these at a time, one a shape, spare the first run minutes. Needs the package
triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.memory import MemoryOptions
from titans_pretrain.memory.path import ResultGradients, ScanInputs

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory a program may ask for, by compute capability."""


class Launch(NamedTuple):
    """A kernel's launch, recorded instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--chunk", type=int, nargs="+", default=[64])
    parser.add_argument(
        "--arch", type=int, default=90, choices=sorted(SHARED_BYTES), help="compute capability times ten"
    )
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise UserError("tools/compile_kernels.py needs the package triton: pip install triton")
    for hidden in args.hidden:
        for chunk in args.chunk:
            print(f"head_dim {args.head_dim}, hidden {hidden}, chunk {chunk}, sm_{args.arch}")
            print(f"  {'kernel':16} {'warps':>5} {'registers':>9} {'spilled':>8} {'shared KiB':>10}")
            for usage in compile_all(args.head_dim, hidden, chunk, args.arch):
                name, warps, registers, spilled, shared = usage
                print(f"  {name:16} {warps:5} {registers:9} {spilled:8} {shared / 1024:10.1f}", flush=True)
                if shared > SHARED_BYTES[args.arch]:
                    raise UserError(
                        f"{name} wants {shared} bytes of shared memory, sm_{args.arch} has {SHARED_BYTES[args.arch]}"
                    )


def compile_all(head_dim: int, hidden: int, chunk: int, arch: int, **changes: Any) -> Iterator[Usage]:
    """Every kernel that a forward and a backward at this shape launch, once each."""
    seen = set()
    for launch in record(head_dim, hidden, chunk, **changes):
        if (variant := variant_of(launch, arch)) not in seen:
            seen.add(variant)
            yield compile_one(launch, arch)


def record(
    head_dim: int,
    hidden: int,
    chunk: int,
    *,
    norm: bool = True,
    forget: str = "init",
    starts: bool = False,
    length: int | None = None,
    heads: int = 1,
    device: str = "cpu",
    keep: bool = True,
) -> list[Launch]:
    """The launches of a forward and a backward, in order, recorded instead of made. The arrays they would work on are really
    allocated, on `device`; "meta" costs nothing at any length (default: three chunks and a token). `keep=False` records
    nothing, so that the arrays live as long as in a real run."""
    from titans_pretrain.memory.triton import call, launch

    options = MemoryOptions(chunk, forget_toward=forget)
    length = length or 3 * chunk + 1
    with torch.device(device):
        q, k, v, out_grad = (torch.zeros(1, length, heads, head_dim, dtype=torch.bfloat16) for _ in range(4))
        gate = torch.zeros(1, length, heads, 2)
        weights = (torch.zeros(heads, head_dim, hidden), torch.zeros(heads, hidden, head_dim))
        state = tuple(w[None] for w in weights)
        norms = torch.zeros(heads, head_dim) if norm else None
        begins = torch.zeros(1, -(-length // chunk), dtype=torch.bool) if starts else None
    inputs = ScanInputs(q, k, v, gate, gate, gate, weights, norms, norms, state, state, (), document_starts=begins)
    made: list[Launch] = []
    kernels = [(m, n, x) for m in (call, launch) for n, x in vars(m).items() if hasattr(x, "arg_names")]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, made if keep else None))
        result = launch.forward(inputs, options, save=True)
        launch.backward(
            inputs, options, result.saved, ResultGradients(out_grad, state, state, state if length % chunk else ())
        )
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return made


class _Recorder:
    def __init__(self, kernel: Any, made: list[Launch] | None) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if self.made is not None:
                self.made.append(Launch(self.kernel, arguments, constants))

        return launch


def variant_of(launch: Launch, arch: int) -> str:
    """What Triton tells by which kernels it has compiled already: the name, what it takes of the arguments for constants or for
    multiples of 16, and the constants."""
    _pretend_to_have(arch)
    *_, binder = launch.kernel.device_caches[0]
    _, specialization, options = binder(*launch.arguments, **launch.constants)
    return f"{launch.kernel.fn.__name__} {specialization} {options}"


def compile_one(launch: Launch, arch: int) -> Usage:
    """Compile a recorded launch as making it would."""
    import triton

    _pretend_to_have(arch)
    compiled = launch.kernel.run(*launch.arguments, **launch.constants, grid=(1,), warmup=True)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", text)[-1]) for what in ("REG", "STACK"))
    return Usage(launch.kernel.fn.__name__, compiled.metadata.num_warps, registers, stack, compiled.metadata.shared)


def _pretend_to_have(arch: int) -> None:
    """For good: this process compiles, and runs nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(_AbsentGPU(GPUTarget("cuda", arch, 32)))


class _AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


if __name__ == "__main__":
    main()
