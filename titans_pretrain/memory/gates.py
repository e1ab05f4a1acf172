"""How far one token's gradient reaches the weights of a later token: the gate matrices of a piece (method.md section 1).

For tokens s, i, t of a piece and the gates of one memory layer, with gamma = 1 - alpha:

    G[t, i] = prod_{i<r<=t} gamma_r     E[i, s] = prod_{s<r<=i} eta_r     (lower triangular, unit diagonal)
    P = G E diag(theta)     beta_t = prod_{r<=t} gamma_r     m_t = prod_{r<=t} eta_r     f = G m

so that after token t: W_t = beta_t W + f_t S - sum_s P[t, s] grad_s and S_t = m_t S - sum_s E[t, s] theta_s grad_s.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

MIN_LOG_GATE = -100.0
"""Log gates are cut off here: exp(-100) is below fp32's normal numbers, so nothing is lost, and without the cut one gate of
-1e30 would swallow every other term of its cumulative sum. (At worst, 64 such gates, the sums reach -6400, where fp32 is
spaced 5e-4.)"""


class PieceGates(NamedTuple):
    """The gates of one piece of T tokens and one memory layer, as factors of what is added. n = batch * heads.

    `piece_gates` makes them, and `gates_backward` takes their gradients, with one more dimension in front."""

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
    """beta [n, T, 1]. None without forgetting."""

    def unbind(self) -> list[PieceGates]:
        """Of many pieces and layers, those of each."""
        columns = (itertools.repeat(None) if x is None else x.unbind(0) for x in self)
        return [PieceGates(*row) for row in zip(*columns, strict=False)]

    def empty_like(self) -> PieceGates:
        """Room for the gradients, contiguous."""
        return PieceGates(*(None if x is None else x.new_empty(x.shape) for x in self))  # type: ignore[arg-type]


def piece_gates(log_gamma: Tensor | None, log_eta: Tensor | None, theta: Tensor) -> PieceGates:
    """Gates of m pieces times layers at once: each argument [m, n, T], fp32 or float64; None switches that gate off."""
    step = -theta
    if theta.shape[-1] == 1:
        return _token_gates(log_gamma, log_eta, step)
    gamma_sums, eta_sums = _sums(log_gamma), _sums(log_eta)
    gamma_products = None if gamma_sums is None else _products(gamma_sums)
    eta_products = None if eta_sums is None else _products(eta_sums)
    reach = step.unsqueeze(-2)
    if eta_products is not None:
        reach = _through(gamma_products, eta_products * reach)
    elif gamma_products is not None:
        reach = gamma_products * reach
    else:
        reach = reach.expand(*step.shape, step.shape[-1]).tril()
    keep = None if gamma_sums is None else gamma_sums.exp().unsqueeze(-1)
    update = reach[..., -1, :].unsqueeze(-1)
    if eta_sums is None or eta_products is None:
        return PieceGates(reach, update, None, None, None, keep)
    decay = eta_sums.exp().unsqueeze(-1)
    momentum_update = (eta_products[..., -1, :] * step).unsqueeze(-1)
    return PieceGates(reach, update, momentum_update, _through(gamma_products, decay), decay[..., -1:, :], keep)


def _token_gates(log_gamma: Tensor | None, log_eta: Tensor | None, step: Tensor) -> PieceGates:
    """The same for T = 1, where G and E are 1: what decoding pays for every token."""
    update = step.unsqueeze(-1)
    keep = None if log_gamma is None else log_gamma.exp().unsqueeze(-1)
    if log_eta is None:
        return PieceGates(update, update, None, None, None, keep)
    carry = log_eta.exp().unsqueeze(-1)
    return PieceGates(update, update, update, carry, carry, keep)


def gates_backward(
    log_gamma: Tensor | None, log_eta: Tensor | None, theta: Tensor, grads: PieceGates
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of `piece_gates`' arguments from those of its results (of which grads.reach is overwritten)."""
    gamma_sums, eta_sums = _sums(log_gamma), _sums(log_eta)
    gamma_products = None if gamma_sums is None else _products(gamma_sums)
    eta_products = None if eta_sums is None else _products(eta_sums)
    # Above the diagonal reach's gradient is not zero but what it would be if P were not cut there; all it meets below is
    # zero there.
    reach = grads.reach
    reach[..., -1, :] += grads.update.squeeze(-1)
    if eta_products is not None:
        coefficients = _through(gamma_products, eta_products)
    elif gamma_products is not None:
        coefficients = gamma_products
    else:
        return None, None, -reach.tril().sum(-2)
    theta_grad = (reach * coefficients).sum(-2).neg_()
    reach.mul_(-theta.unsqueeze(-2))  # from here on the gradient of G E

    eta_grad, gamma_products_grad = None, reach
    if log_eta is not None and eta_sums is not None and eta_products is not None:
        assert grads.momentum_update is not None
        assert grads.carry is not None
        assert grads.momentum_keep is not None
        decay = eta_sums.exp()
        products_grad = _through_backward(gamma_products, reach)
        decay_grad = _through_backward(gamma_products, grads.carry).squeeze(-1)
        if gamma_products is not None:
            gamma_products_grad = (reach @ eta_products.mT).addcmul_(grads.carry, decay.unsqueeze(-2))
        momentum_update = grads.momentum_update.squeeze(-1)
        theta_grad.addcmul_(momentum_update, eta_products[..., -1, :], value=-1)
        products_grad[..., -1, :].addcmul_(momentum_update, theta, value=-1)
        decay_grad[..., -1] += grads.momentum_keep[..., 0, 0]
        eta_grad = _sums_backward(log_eta, eta_products, products_grad, decay, decay_grad)
    gamma_grad = None
    if log_gamma is not None and gamma_sums is not None and gamma_products is not None:
        assert grads.keep is not None
        keep_grad = grads.keep.squeeze(-1)
        gamma_grad = _sums_backward(log_gamma, gamma_products, gamma_products_grad, gamma_sums.exp(), keep_grad)
    return gamma_grad, eta_grad, theta_grad


def _sums(log_gate: Tensor | None) -> Tensor | None:
    return None if log_gate is None else log_gate.clamp(min=MIN_LOG_GATE).cumsum(-1)


def _sums_backward(
    log_gate: Tensor, products: Tensor, products_grad: Tensor, decay: Tensor, decay_grad: Tensor
) -> Tensor:
    """From the gradients of products[t, i] = exp(sums_t - sums_i) and decay = exp(sums) to that of the log gate."""
    weighed = products * products_grad
    sums_grad = (weighed.sum(-1) - weighed.sum(-2)).addcmul_(decay, decay_grad)
    return _reverse_cumsum(sums_grad, -1).masked_fill_(log_gate < MIN_LOG_GATE, 0.0)


def _products(sums: Tensor) -> Tensor:
    """[..., t, i] = exp(sums_t - sums_i) for i <= t, else 0. The mask comes before exp: above the diagonal exp overflows."""
    length = sums.shape[-1]
    above = torch.full((length, length), -torch.inf, dtype=sums.dtype, device=sums.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).add_(above).exp_()


def _through(gamma_products: Tensor | None, columns: Tensor) -> Tensor:
    """G @ columns; without forgetting G is all ones below the diagonal, a cumulative sum."""
    return columns.cumsum(-2) if gamma_products is None else gamma_products @ columns


def _through_backward(gamma_products: Tensor | None, grad: Tensor) -> Tensor:
    """G' @ grad."""
    return _reverse_cumsum(grad, -2) if gamma_products is None else gamma_products.mT @ grad


def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    return x.flip(dim).cumsum(dim).flip(dim)
