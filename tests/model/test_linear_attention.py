"""Is linear attention by chunks the sum it stands for, the library's reference, and the same in pieces and documents?"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.recurrences import (
    LENGTHS,
    assert_same,
    document_by_document,
    document_starts,
    in_pieces,
    outcome,
)
from titans_pretrain.model.linear_attention import EPS, linear_attention

with warnings.catch_warnings():  # that there is no GPU
    warnings.simplefilter("ignore")
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn


def problem(length: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(length)
    per_token = [torch.randn(2, length, 3, 8, generator=draw, dtype=dtype) for _ in range(3)]
    return per_token, torch.rand(2, 3, 8, 9, generator=draw, dtype=dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The library's, whose state is in two parts."""
    start = (state[..., :-1], state[..., -1][:, None])
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out, (sums, normaliser) = naive_recurrent_linear_attn(q, k, v, 1.0, start, True, normalize=True)
    return out, torch.cat((sums, normaliser[:, 0, ..., None]), dim=-1)


def definition(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Quadratic, equation 8 of the paper, after what the state has seen."""
    q, k = (F.elu(x).transpose(1, 2) + 1 for x in (q, k))
    v = v.transpose(1, 2)
    scores = (q @ k.mT).tril()
    sums = scores @ v + q @ state[..., :-1]
    normaliser = scores.sum(-1, keepdim=True) + q @ state[..., -1:]
    after = state + torch.cat((k.mT @ v, k.sum(2)[..., None]), dim=-1)
    return (sums / (normaliser + EPS)).transpose(1, 2), after


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_definition_and_the_reference_of_flash_linear_attention(length: int) -> None:
    per_token, state = problem(length)
    found = outcome(linear_attention, per_token, state)
    assert_same(found, outcome(reference, per_token, state), 1e-5)
    assert_same(found, outcome(definition, per_token, state), 1e-5)


@pytest.mark.parametrize("cuts", [[100], [1, 2, 66], [64, 128]])
def test_carried_over_a_cut_it_is_the_whole(cuts: list[int]) -> None:
    per_token, state = problem(200, torch.float64)
    expected = outcome(linear_attention, per_token, state)
    assert_same(outcome(in_pieces(linear_attention, cuts), per_token, state), expected, 1e-12)


@pytest.mark.parametrize("length", [5, 64, 200])
def test_documents_begin_anew(length: int) -> None:
    per_token, state = problem(length, torch.float64)
    starts = document_starts(length)
    expected = outcome(document_by_document(definition, starts), per_token, state)
    assert_same(outcome(lambda *x: linear_attention(*x, starts), per_token, state), expected, 1e-12)


def test_features_of_any_size_divide_by_something() -> None:
    (q, k, v), state = problem(70)
    out, after = linear_attention(q - 200, k - 200, v, torch.zeros_like(state))
    assert not out.any()  # phi is 0 there, in fp32
    assert not after.any()
    out, _ = linear_attention(q + 1e4, k + 1e4, v, torch.zeros_like(state))
    torch.testing.assert_close(out, v.cumsum(1) / torch.arange(1, 71)[:, None, None], rtol=1e-3, atol=1e-3)
