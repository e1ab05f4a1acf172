"""What every implementation ("path") of the memory scan takes and gives, forward and backward.

A path is a module of plain functions without autograd: `forward`, `backward`, `saved_like` and `why_not`. memory/operator.py
makes one differentiable, compilable operator of them; memory/scan.py chooses among them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from titans_pretrain.memory.state import MemoryOptions


class ScanInputs(NamedTuple):
    """Every tensor a scan depends on. b batch, t time >= 1, h heads, d head_dim, l memory layers."""

    q: Tensor
    """[b, t, h, d], any float dtype, any strides, as k and v."""
    k: Tensor
    v: Tensor
    log_gamma: Tensor | None
    """log(1 - alpha) [b, t, h, l]; fp32, or float64 where the scan computes in it, as everything below."""
    log_eta: Tensor | None
    """[b, t, h, l]."""
    theta: Tensor
    """[b, t, h, l]."""
    initial_weights: tuple[Tensor, ...]
    """l times [h, in, out]."""
    norm_weight: Tensor | None
    """[h, d], as norm_bias."""
    norm_bias: Tensor | None
    weights: tuple[Tensor, ...]
    """W before the first token, l times [b, h, in, out], possibly expanded views; momentum and anchor alike."""
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    """Empty where `offset` is 0: the anchor is then `weights`."""
    fresh_weights: tuple[Tensor, ...] = ()
    """W before the first token of a document, l times [h, in, out], as fresh_momentum. Both empty: W = W_init and S = 0."""
    fresh_momentum: tuple[Tensor, ...] = ()
    document_starts: Tensor | None = None
    """[b, chunks] bool: the c-th chunk that begins inside the call begins a document. None: no document begins. Not
    differentiable."""


class ScanResult(NamedTuple):
    """What a scan returns. No tensor may share memory with an input or with another one here."""

    out: Tensor
    """[b, t, h, d] in q's dtype."""
    weights: tuple[Tensor, ...]
    """W after the last token, l times [b, h, in, out], in the dtype of theta, as momentum and anchor."""
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    """W at the start of the chunk that is open at the end, if it began inside the call; else empty."""
    surprise: Tensor
    """The sum of 0.5 * ||M(k) - v||^2 over everything, 0-dim fp32 or float64, not differentiable; 0 unless asked for."""
    saved: tuple[Tensor, ...]
    """What the path's own backward wants back beside the inputs; empty unless asked for."""


class ScanGradients(NamedTuple):
    """Gradients of what `ScanInputs` names, in the dtype of the input; None only where the input is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gamma: Tensor | None
    log_eta: Tensor | None
    theta: Tensor
    initial_weights: tuple[Tensor, ...]
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    fresh_weights: tuple[Tensor, ...] = ()
    fresh_momentum: tuple[Tensor, ...] = ()


class ResultGradients(NamedTuple):
    """What the outer loss says about a `ScanResult`; an empty tuple stands for zeros."""

    out: Tensor
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]


class ScanPath(Protocol):
    """A module that implements the scan."""

    @staticmethod
    def why_not(inputs: ScanInputs, offset: int, options: MemoryOptions) -> str | None:
        """Why this path cannot run these arguments, as the rest of a sentence ("takes ..., not ..."); None where it can."""

    @staticmethod
    def forward(inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool, save: bool) -> ScanResult:
        """The scan, `offset` tokens into a chunk. `save`: keep what `backward` needs."""

    @staticmethod
    def backward(
        inputs: ScanInputs, offset: int, options: MemoryOptions, saved: tuple[Tensor, ...], grads: ResultGradients
    ) -> ScanGradients:
        """The gradient of every input."""

    @staticmethod
    def saved_like(inputs: ScanInputs, offset: int, options: MemoryOptions) -> tuple[Tensor, ...]:
        """Empty tensors of the shapes and dtypes of `ScanResult.saved`, made with `q.new_empty` so that fake tensors work."""
