"""Is a path of the memory right? Outputs and every gradient against the plainest computation there is of the same inputs.

The judge of short sequences is the token loop in float64; of longer ones the closed form in float64, which the short ones
hold against the token loop. All paths get the same inputs, rounded to the dtype first: what is measured is the path's own
error, not the rounding of what it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from tools.benchmark_operators import Row, memory_inputs, scan

TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (0.006, 0.01)}
"""dtype -> largest RMS(x - judge) / RMS(judge) of the outputs and of any gradient."""
TOKEN_LOOP_LIMIT = 100
"""Longest sequence the token loop judges: it keeps every token's weights, 1 GiB at the CPU's default shape."""


def judge(row: Row, inputs: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The outputs and gradients that the paths are held against, in float64."""
    path = "reference" if row.tokens <= TOKEN_LOOP_LIMIT else "closed_form"
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return results(exact, row.chunk, path, weight.double())


def results(inputs: dict[str, Tensor], chunk: int, path: str, weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients of sum(weight * output), by name."""
    out = scan(inputs, chunk, path)
    gradients = torch.autograd.grad(out, list(inputs.values()), weight)
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def check(row: Row, paths: list[str], device: torch.device) -> list[dict[str, Any]]:
    """One result per path at one length: `errors` by name and `passed`, or `words` where the path cannot run here."""
    inputs = memory_inputs(row, device, seed=row.tokens)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(inputs["q"].shape, generator=generator, device=device).to(inputs["q"].dtype)
    expected = judge(row, inputs, weight)
    checked = []
    for path in paths:
        told: dict[str, Any] = {"tokens": row.tokens, "path": path}
        try:
            found = results(inputs, row.chunk, path, weight)
        except UserError as error:
            checked.append({**told, "words": str(error)})
            continue
        errors = {name: rms_ratio(found[name], expected[name]) for name in expected}
        of_output, of_gradient = TOLERANCES[row.dtype]
        # written so that NaN fails
        passed = all(error <= (of_output if name == "out" else of_gradient) for name, error in errors.items())
        checked.append({**told, "errors": errors, "passed": passed})
    return checked
