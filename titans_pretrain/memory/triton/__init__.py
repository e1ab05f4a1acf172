"""The scan as Triton kernels, a path of memory/path.py. Loads without the package triton; running needs it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titans_pretrain.memory.path import ResultGradients, ScanGradients, ScanInputs, ScanResult
from titans_pretrain.memory.state import MemoryOptions
from titans_pretrain.memory.triton.shapes import MAX_CHUNK, MAX_HEAD_DIM, TILE, TILE_CHUNKS, Shapes, slice_of

if TYPE_CHECKING:
    from types import ModuleType

OPERAND_DTYPES = (torch.bfloat16, torch.float32)


def why_not(inputs: ScanInputs, offset: int, options: MemoryOptions) -> str | None:
    """As `ScanPath.why_not`."""
    width, hidden = inputs.initial_weights[0].shape[-2:]
    reason = why_not_model(inputs.q.device, inputs.q.dtype, len(inputs.initial_weights), width, hidden, options)
    if reason is not None:
        return reason
    if inputs.theta.dtype != torch.float32:
        return f"keeps its state in float32, but is asked for {_name(inputs.theta.dtype)}"
    if offset:
        return f"starts at the start of a chunk, not {offset} tokens into one"
    if inputs.document_starts is None:
        return None
    return why_not_resets(bool(inputs.fresh_weights), inputs.log_gamma is not None, options)


def why_not_model(
    device: torch.device, dtype: torch.dtype, depth: int, head_dim: int, hidden: int, options: MemoryOptions
) -> str | None:
    """Why the kernels cannot serve a model of these shapes, q, k, v in `dtype`. Under Triton's interpreter the CPU and fp32
    operands are welcome too."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type != "cuda" and not interpreted:
        return f"runs on a CUDA device, not on {device.type}"
    if dtype != torch.bfloat16 and not (interpreted and dtype in OPERAND_DTYPES):
        return f"multiplies in bfloat16, but q is {_name(dtype)}"
    return why_not_shapes(depth, head_dim, hidden, options)


def why_not_shapes(depth: int, head_dim: int, hidden: int, options: MemoryOptions) -> str | None:
    """The part of it that is the same on every machine."""
    if depth != 2:
        return f"takes memories of 2 layers, not {depth}"
    if head_dim > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    step = slice_of(head_dim, hidden)
    if hidden % step or step not in (16, 32, 64):
        return f"takes a hidden layer of 16, 32 or a multiple of {slice_of(head_dim, 64)} channels, not {hidden}"
    chunk = options.chunk_size
    if chunk not in TILE_CHUNKS and (chunk % TILE or chunk > MAX_CHUNK):
        return f"takes chunks of {', '.join(map(str, TILE_CHUNKS))} or a multiple of {TILE} to {MAX_CHUNK}, not {chunk}"
    return None


def why_not_resets(fresh: bool, forgetting: bool, options: MemoryOptions) -> str | None:
    """Why the kernels cannot begin documents inside a row. `fresh`: with a state of their own, such as that after persistent
    tokens: the kernels begin one by a factor of 0, which gives the initial weights."""
    if fresh:
        return (
            "resets the memory at document starts only to its initial weights, not to the state after persistent tokens"
        )
    if forgetting and options.forget_toward == "zero":
        return "resets the memory at document starts only with forget_toward 'init'"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch() -> ModuleType:
    from titans_pretrain.memory.triton import launch  # needs the package triton

    return launch


def forward(inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool, save: bool) -> ScanResult:
    """As `ScanPath.forward`."""
    return _launch().forward(inputs, options, save)


def backward(
    inputs: ScanInputs, offset: int, options: MemoryOptions, saved: tuple[Tensor, ...], grads: ResultGradients
) -> ScanGradients:
    """As `ScanPath.backward`."""
    return _launch().backward(inputs, options, saved, grads)


def saved_like(inputs: ScanInputs, offset: int, options: MemoryOptions) -> tuple[Tensor, ...]:
    """D2 [b, t, h, d] in q's dtype, and the state at every checkpoint in fp32."""
    shapes = Shapes.of(inputs, options)
    state = (shapes.pairs, shapes.checkpoints, shapes.slices, 4, shapes.matrix)
    return inputs.q.new_empty(inputs.q.shape), inputs.q.new_empty(state, dtype=torch.float32)
