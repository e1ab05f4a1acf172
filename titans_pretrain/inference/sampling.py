"""How is the next token drawn from one row of logits? Pure functions; the only randomness is the generator passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw a token; applied in the order of the fields.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0
    """Divides the logits. 0: greedy, the likeliest token, whatever top_k and top_p are (they always keep it)."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Then keep the smallest set of likeliest tokens whose probability reaches top_p (nucleus sampling, arXiv 1904.09751),
    the probabilities being those after temperature and top_k. 1: all."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature must be a finite number of 0 or more, not {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and at most at 1, not {self.top_p}; 1 keeps all tokens")


def probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """logits [v], any float dtype and device; -inf bans a token -> the distribution drawn from, float64 [v] on the CPU.

    Equal logits are ranked by token id, so the set kept does not depend on the device. Float64, because at low
    temperatures fp32 probabilities of a large vocabulary no longer sum to 1 to the precision top_p is given in.

    Raises:
        UserError: NaN or infinite logits: the weights are damaged or training diverged.
    """
    wide = logits.detach().to("cpu", torch.float64)
    if wide.isnan().any() or (wide == math.inf).any() or (wide == -math.inf).all():
        raise UserError(
            "the model's logits are not finite, so no token can be drawn; its weights are damaged or training diverged"
        )
    if options.temperature == 0:
        likeliest = (wide == wide.max()).nonzero()[0]
        return torch.zeros_like(wide).index_fill_(0, likeliest, 1.0)
    wide = (wide - wide.max()) / options.temperature  # shifted first: a tiny temperature must not overflow
    if options.top_k == 0 and options.top_p == 1:
        return wide.softmax(dim=0)
    ranked, order = wide.sort(descending=True, stable=True)
    if options.top_k:
        ranked[options.top_k :] = -math.inf
    ranked = ranked.softmax(dim=0)
    if options.top_p < 1:
        mass_before = ranked.cumsum(dim=0) - ranked
        ranked = ranked.where(mass_before < options.top_p, 0.0)
        ranked = ranked / ranked.sum()
    return torch.empty_like(ranked).scatter_(0, order, ranked)


def sample(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """logits [v] -> one token id. `generator` lives on the CPU, so a seed gives the same draws on every device.

    Greedy draws do not advance the generator.
    """
    distribution = probabilities(logits, options)
    if options.temperature == 0:
        return int(distribution.argmax())
    return int(torch.multinomial(distribution, 1, generator=generator))
