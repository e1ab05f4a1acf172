"""How far one token's gradient reaches the weights of a later token: the gate matrices of a piece (method.md section 1).

For tokens s, i, t of a piece and the gates of one memory layer, with gamma = 1 - alpha:

    G[t, i] = prod_{i<r<=t} gamma_r     E[i, s] = prod_{s<r<=i} eta_r     (lower triangular, unit diagonal)
    P = G E diag(theta)     beta_t = prod_{r<=t} gamma_r     m_t = prod_{r<=t} eta_r     f = G m

so that after token t: W_t = beta_t W + f_t S - sum_s P[t, s] grad_s and S_t = m_t S - sum_s E[t, s] theta_s grad_s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_LOG_GATE = -100.0
"""Log gates are cut off here: exp(-100) is below fp32's normal numbers, so nothing is lost, and without the cut one gate of
-1e30 would swallow every other term of its cumulative sum. (At worst, 64 such gates, the sums reach -6400, where fp32 is
spaced 5e-4.)"""


class PieceGates(NamedTuple):
    """The gates of one piece of T tokens and one memory layer, as factors of what is added. n = batch * heads."""

    reach: Tensor
    """-P [n, T, T]."""
    update: Tensor
    """The last row of -P as a column [n, T, 1]: what the gradients weigh in W after the piece."""
    momentum_update: Tensor | None
    """The same for S: the last row of -E diag(theta). None without momentum, as the next two."""
    carry: Tensor | None
    """f [n, T, 1]: what S before the piece weighs in W."""
    momentum_keep: Tensor | None
    """m after the piece [n, 1, 1]."""
    keep: Tensor | None
    """beta [n, T, 1]. None without forgetting, as the next."""
    lost: Tensor | None
    """1 - beta after the piece [n, 1, 1], without the cancellation."""


def piece_gates(log_gamma: Tensor | None, log_eta: Tensor | None, theta: Tensor) -> list[PieceGates]:
    """Gates of m pieces times layers at once: each argument [m, n, T], fp32 or float64; None switches that gate off."""
    step = -theta
    if theta.shape[-1] == 1:
        return _token_gates(log_gamma, log_eta, step)
    none: Sequence[Tensor | None] = [None] * len(theta)
    keep, lost, carry, momentum_keep, momentum_update = none, none, none, none, none
    gamma_products, eta_products = None, None
    if log_gamma is not None:
        sums = log_gamma.clamp(min=MIN_LOG_GATE).cumsum(-1)
        gamma_products = _products(sums)
        keep, lost = _columns(sums.exp()), _columns(-torch.expm1(sums[..., -1:]))
    if log_eta is not None:
        sums = log_eta.clamp(min=MIN_LOG_GATE).cumsum(-1)
        eta_products, decay = _products(sums), sums.exp()
        momentum_keep = _columns(decay[..., -1:])
        momentum_update = _columns(eta_products[..., -1, :] * step)
        carry = _through(gamma_products, decay.unsqueeze(-1)).unbind(0)
    if eta_products is not None:
        reach = _through(gamma_products, eta_products * step.unsqueeze(-2))
    elif gamma_products is not None:
        reach = gamma_products * step.unsqueeze(-2)
    else:
        reach = step.unsqueeze(-2).expand(*step.shape, step.shape[-1]).tril()
    rows = zip(
        reach.unbind(0), _columns(reach[..., -1, :]), momentum_update, carry, momentum_keep, keep, lost, strict=True
    )
    return [PieceGates(*row) for row in rows]


def _token_gates(log_gamma: Tensor | None, log_eta: Tensor | None, step: Tensor) -> list[PieceGates]:
    """The same for T = 1, where G and E are 1: what decoding pays for every token."""
    none: Sequence[Tensor | None] = [None] * len(step)
    update = _columns(step)
    keep = none if log_gamma is None else _columns(log_gamma.exp())
    lost = none if log_gamma is None else _columns(-torch.expm1(log_gamma))
    carry = none if log_eta is None else _columns(log_eta.exp())
    momentum_update = none if log_eta is None else update
    rows = zip(update, update, momentum_update, carry, carry, keep, lost, strict=True)
    return [PieceGates(*row) for row in rows]


def _products(sums: Tensor) -> Tensor:
    """[..., t, i] = exp(sums_t - sums_i) for i <= t, else 0. The mask comes before exp: above the diagonal exp overflows."""
    length = sums.shape[-1]
    above = torch.full((length, length), -torch.inf, dtype=sums.dtype, device=sums.device).triu(1)
    # Additions only: the gradient of a masked fill or of a difference would be one more pass over the matrices.
    return (sums.unsqueeze(-1) + (-sums).unsqueeze(-2)).add_(above).exp_()


def _through(gamma_products: Tensor | None, columns: Tensor) -> Tensor:
    """G @ columns; without forgetting G is all ones below the diagonal, a cumulative sum."""
    return columns.cumsum(-2) if gamma_products is None else gamma_products @ columns


def _columns(x: Tensor) -> tuple[Tensor, ...]:
    """[m, n, T] -> m columns [n, T, 1]."""
    return x.unsqueeze(-1).unbind(0)
