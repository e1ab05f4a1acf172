"""Does the exchange of tokens for heads lose, mix or round anything, forward or backward?"""

from __future__ import annotations

import torch

from tests.distributed import run_distributed
from tests.parallel.scans import Case, assert_equal, compare_scans, join_axis
from titans_pretrain.parallel.exchange import to_heads, to_tokens
from titans_pretrain.parallel.packing import form_of, pack, unpack

CASES = [
    Case("head_exchange", 5, 8),
    Case("head_exchange", 7, 4, start=3),
    Case("head_exchange", 1, 4, start=0, problem=dict(heads=8, depth=1)),
    Case("head_exchange", 6, 64, toward="zero", problem=dict(depth=3, norm=False, momentum=False)),
    Case("head_exchange", 6, 8, problem=dict(forgetting=False, shared_gates=True)),
]


def test_tensors_of_several_dtypes_survive_packing() -> None:
    """An odd number of bytes before a wider number, a row without elements, a view that is not contiguous."""
    tensors = [
        torch.arange(6, dtype=torch.uint8).view(2, 3),
        torch.randn(3, 2, 2, dtype=torch.float64).transpose(0, 1),
        torch.empty(2, 0, 4),
        torch.randn(2, 1, 5).to(torch.bfloat16),
        torch.randn(2, 1).expand(2, 3),
    ]
    packed = pack(tensors)
    assert packed.shape == (2, 3 + 6 * 8 + 5 * 2 + 3 * 4)
    for x, y in zip(tensors, unpack(packed, [form_of(x) for x in tensors]), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_every_rank_gets_all_tokens_of_its_heads_and_gives_them_back() -> None:
    for swapped, returned, same_grad in run_distributed(exchange_numbers, 2):
        assert swapped
        assert returned
        assert same_grad


def exchange_numbers() -> tuple[bool, bool, bool]:
    """Two tensors of different dtypes and ranks in one exchange."""
    axis = join_axis()
    batch, t, heads = 2, 3, 4
    whole = torch.arange(batch * axis.size * t * heads * 5, dtype=torch.float64).view(batch, -1, heads, 5)
    narrow = whole[..., :1].to(torch.bfloat16)
    own, mine = slice(axis.rank * t, (axis.rank + 1) * t), slice(axis.rank * 2, axis.rank * 2 + 2)
    a, b = whole[:, own].clone().requires_grad_(), narrow[:, own]
    x, y = to_heads(axis, (a, b))
    swapped = torch.equal(x, whole[:, :, mine]) and torch.equal(y, narrow[:, :, mine])
    back = to_tokens(axis, (x, y))
    (back[0] * whole[:, own]).sum().backward()
    assert a.grad is not None
    return (
        swapped,
        torch.equal(back[0], a) and torch.equal(back[1], b) and back[1].dtype == b.dtype,
        torch.equal(a.grad, whole[:, own]),
    )


def test_head_exchange_equals_one_process_on_2_ranks() -> None:
    assert_equal(CASES, run_distributed(compare_scans, 2, CASES))


def test_head_exchange_equals_one_process_on_4_ranks() -> None:
    assert_equal(CASES, run_distributed(compare_scans, 4, CASES))
