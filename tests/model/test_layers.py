"""Parts against their plain definitions: chunked cross entropy, rotary positions, convolution, windowed attention."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pretrain.model.attention_scores import attend, causal_attention, segment_mask, window_attention, with_prefix
from titans_pretrain.model.layers import CausalConv, LanguageModelHead, RMSNorm, rotary_table, rotate


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """Records the most elements any produced tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_chunked_loss_equals_cross_entropy_and_never_forms_all_logits() -> None:
    batch, time, dim, vocab = 2, 50, 6, 97
    head = LanguageModelHead(dim, vocab, loss_chunk=16).double()
    head.weight.data.copy_(randn(vocab, dim))
    hidden = randn(batch, time, dim, seed=1).requires_grad_()
    labels = torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(2))
    labels[0, :17] = -100

    with LargestTensor() as seen:
        loss = head(hidden, labels)
        (3 * loss).backward()
    assert seen.numel < batch * time * vocab / 4
    mine = loss.detach(), hidden.grad.clone(), head.weight.grad.clone()

    hidden.grad = head.weight.grad = None
    plain = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1), labels.flatten(), reduction="sum")
    (3 * plain).backward()
    for a, b in zip(mine, (plain.detach(), hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_loss_of_no_valid_label_is_zero_with_zero_gradient() -> None:
    head = LanguageModelHead(4, 9, loss_chunk=3)
    head.weight.data.copy_(randn(9, 4))
    loss = head(randn(1, 5, 4).float().requires_grad_(), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().sum() == 0


def test_loss_without_gradients_forms_none() -> None:
    head = LanguageModelHead(6, 97, loss_chunk=16)
    head.weight.data.copy_(randn(97, 6))
    hidden, labels = randn(1, 20, 6).float(), torch.zeros(1, 20, dtype=torch.int64)
    with torch.no_grad(), mock.patch.object(torch.Tensor, "scatter_add_", side_effect=AssertionError("a gradient")):
        loss = head(hidden, labels)
    assert torch.equal(loss, head(hidden, labels))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = randn(1, 1, 1, 8).float(), randn(1, 1, 1, 8, seed=1).float()

    def score(i: int, j: int) -> torch.Tensor:
        tables = [rotary_table(torch.tensor([p]), 8, 10000.0) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_convolution_is_causal_with_the_last_tap_on_the_current_token() -> None:
    conv = CausalConv(3, 4).double()
    conv.weight.data.copy_(randn(3, 4))
    x = randn(2, 9, 3)
    padded = F.pad(x, (0, 0, 3, 0))
    expected = sum(padded[:, i : i + 9] * conv.weight[:, i] for i in range(4))
    torch.testing.assert_close(conv(padded), expected)


def test_rms_norm_per_head() -> None:
    norm = RMSNorm(2, 3, eps=1e-5)
    norm.weight.data.copy_(randn(2, 3))
    x = randn(5, 2, 3).float()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("prefix_length", [0, 3])
@pytest.mark.parametrize(("t", "s"), [(20, 20), (7, 7), (1, 5), (1, 9), (11, 16), (3, 3)])
def test_window_attention_equals_a_dense_mask(t: int, s: int, prefix_length: int) -> None:
    window = 5
    q, k, v = randn(2, t, 2, 4), randn(2, s, 2, 4, seed=1), randn(2, s, 2, 4, seed=2)
    prefix = (randn(prefix_length, 2, 4, seed=3), randn(prefix_length, 2, 4, seed=4)) if prefix_length else None
    mask = torch.zeros(t, prefix_length + s, dtype=torch.bool)
    for i in range(t):
        here = s - t + i
        mask[i, :prefix_length] = True
        mask[i, prefix_length + max(0, here - window + 1) : prefix_length + here + 1] = True
    keys, values = (with_prefix(prefix[0], k), with_prefix(prefix[1], v)) if prefix else (k, v)
    torch.testing.assert_close(window_attention(q, k, v, window, prefix), attend(q, keys, values, mask))


@pytest.mark.parametrize(("t", "s"), [(9, 9), (1, 9), (4, 9)])
def test_causal_attention_of_the_last_tokens(t: int, s: int) -> None:
    q, k, v = randn(2, s, 2, 4), randn(2, s, 2, 4, seed=1), randn(2, s, 2, 4, seed=2)
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    torch.testing.assert_close(causal_attention(q[:, s - t :], k, v), attend(q, k, v, mask)[:, s - t :])


def test_segment_mask() -> None:
    mask = segment_mask(first=2, length=2, retrieve_every=2, prefix=1, device=torch.device("cpu"))
    #        prefix  h_1    h_3    S_0   S_1   S_2   S_3
    rows = [[True, True, False, True, True, True, False], [True, True, True, True, True, True, True]]
    assert mask.tolist() == rows
