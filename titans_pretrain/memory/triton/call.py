"""What the forward and the backward of the kernels prepare alike: arguments in the kernels' layout, and their constants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from titans_pretrain.memory.path import ScanInputs
from titans_pretrain.memory.state import MemoryOptions
from titans_pretrain.memory.triton.gate_kernels import gate_rows
from titans_pretrain.memory.triton.shapes import Shapes

OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

NUM_WARPS = 8
"""Of every kernel: a [64, 64] matrix in fp32 is then 16 registers a thread. With 4 warps the compiler spills (tools/
compile_kernels.py prints it)."""


class Call:
    """What forward and backward prepare alike: contiguous arguments, the base, the gate rows, the kernels' constants."""

    def __init__(self, inputs: ScanInputs, options: MemoryOptions) -> None:
        self.shapes = s = Shapes.of(inputs, options)
        self.q, self.k, self.v = (x.contiguous() for x in inputs[:3])
        self.theta = inputs.theta.contiguous()
        # A gate that is switched off is never read; the kernels want some pointer in its place.
        self.log_gamma = self.theta if inputs.log_gamma is None else inputs.log_gamma.contiguous()
        self.log_eta = self.theta if inputs.log_eta is None else inputs.log_eta.contiguous()
        self.toward_init = inputs.document_starts is not None or (
            inputs.log_gamma is not None and options.forget_toward == "init"
        )
        w1, w2 = inputs.initial_weights
        self.base = self.pack(w1, w2).to(self.q.dtype) if self.toward_init else self.q
        self.norm = inputs.norm_weight is not None
        self.gain = self.theta if inputs.norm_weight is None else self.pad(inputs.norm_weight.float())
        self.bias = self.theta if inputs.norm_bias is None else self.pad(inputs.norm_bias.float())
        starts = inputs.document_starts
        self.resets = starts is not None
        self.starts = self.theta if starts is None else starts.to(torch.float32).contiguous()

        operand = OPERANDS[self.q.dtype]
        gates: dict[str, Any] = {
            "TILE": s.tile, "FORGET": inputs.log_gamma is not None, "MOMENTUM": inputs.log_eta is not None,
            "OPERAND": operand,
        }  # fmt: skip
        network = {
            "D": s.width, "HEAD_DIM": s.head_dim, "SLICE": s.slice, "SLICES": s.slices, "TILE": s.tile,
            "BASE": self.toward_init, "OPERAND": operand,
        }  # fmt: skip
        whole = {**network, "TILES_PER_CHUNK": s.tiles_per_chunk}
        gelu, norm = {"GELU": options.activation == "gelu"}, {"NORM": inputs.norm_weight is not None}
        resets, every = {"STARTS": self.resets}, {"CHECKPOINT_EVERY": s.checkpoint_every}
        scan = {"SIZE": s.matrix, "SLICES": s.slices, "BLOCK": s.block, "OPERAND": operand}
        self.constants: dict[str, dict[str, Any]] = {
            "gates": gates,
            "state_forward": {**whole, **gelu, **norm, **resets, **every},
            "output_forward": {**whole, **gelu, **norm, **gates},
            "state_rebuild": {**whole, **gelu, **resets, **every},
            "read_backward_2": {**whole, **gelu, **norm, **gates},
            "read_backward_1": {**network, **norm, **gates},
            "state_backward": {**whole, **norm, **resets, "PARALLEL": s.parallel},
            "delta_forward": {**network, **gelu, **norm},
            "chunk_forward": {**scan, "TILES_PER_CHUNK": s.tiles_per_chunk, **resets, **every},
            "chunk_backward": scan,
        }
        self.eps = options.norm_eps
        self.anchor_tile = -1 if s.open_chunk is None else s.open_chunk

        self.rows = self.floats(s.pairs, s.tiles, 2, 4, s.tile)
        self.ends = self.floats(s.pairs, s.tiles, 2, 4)
        gate_rows[(s.tiles, s.pairs, 2)](
            self.log_gamma, self.log_eta, self.theta, self.rows, self.ends, s.length, s.heads, s.tiles,
            **self.constants["gates"], num_warps=NUM_WARPS,
        )  # fmt: skip

        # The state before token 0: M = W - base, S; nothing where a document starts.
        moved = [
            w - w0 if self.toward_init else w for w, w0 in zip(inputs.weights, inputs.initial_weights, strict=True)
        ]
        self.initial = torch.cat([self.pack(*moved), self.pack(*inputs.momentum)], -2).flatten(0, 1).unsqueeze(1)
        if self.resets:
            self.initial *= self.kept(0)

    def kept(self, chunk: int) -> Tensor:
        """[n, 1, 1, 1, 1]: 0 where a document starts with the chunk, else 1."""
        return (1.0 - self.starts[:, chunk]).repeat_interleave(self.shapes.heads)[:, None, None, None, None]

    def handed_through(self, momentum: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What becomes of [b, h, in, out] where there is no momentum: nothing, but where a document starts in the row."""
        if not self.resets:
            return tuple(x.clone(memory_format=torch.contiguous_format) for x in momentum)
        kept = 1.0 - self.starts.amax(1)[:, None, None, None]
        return tuple((x * kept).contiguous() for x in momentum)

    def floats(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        return self.q.new_zeros(shape, dtype=torch.float32)

    def pad(self, x: Tensor) -> Tensor:
        """Zeros in the channels past head_dim."""
        return F.pad(x, (0, self.shapes.width - self.shapes.head_dim)).contiguous()

    def pack(self, first: Tensor, second: Tensor) -> Tensor:
        """[..., d, hidden] and [..., hidden, d] -> [..., slices, 2, D * slice], D being the padded d."""
        cut, extra = (self.shapes.slices, self.shapes.slice), self.shapes.width - self.shapes.head_dim
        first, second = F.pad(first, (0, 0, 0, extra)), F.pad(second, (0, extra))
        return torch.stack(
            [first.unflatten(-1, cut).movedim(-2, -3).flatten(-2), second.unflatten(-2, cut).flatten(-2)], -2
        )

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`."""
        width, size, kept = self.shapes.width, self.shapes.slice, self.shapes.head_dim
        first, second = packed.unbind(-2)
        return (
            first.unflatten(-1, (width, size)).movedim(-3, -2).flatten(-2)[..., :kept, :].contiguous(),
            second.unflatten(-1, (size, width)).flatten(-3, -2)[..., :kept].contiguous(),
        )

    def per_head(self, packed: Tensor) -> Tensor:
        """[b * h, 1, ...] -> [b, h, ...]"""
        return packed[:, 0].unflatten(0, (self.shapes.batch, self.shapes.heads))
