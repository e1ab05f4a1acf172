"""Are the embedding and the loss over a split vocabulary right, also where logits are large, bf16 or padding?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed import run_distributed
from tests.model.test_layers import LargestTensor
from tests.parallel.shares import farthest, tensor_axis
from titans_pretrain.parallel.collectives import gather_last
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.split_table import part_of
from titans_pretrain.parallel.vocabulary import VocabularyEmbedding, VocabularyHead, VocabularyShare

VOCAB, DIM, CHUNK = 97, 6, 16


def check_loss_and_embedding() -> None:
    axis = tensor_axis()
    share = VocabularyShare(axis, VOCAB)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, DIM, generator=generator)
    labels = torch.randint(VOCAB, (2, 50), generator=generator)
    labels[0, :17] = -100
    labels[1, :2] = torch.tensor([0, VOCAB - 1])

    # All logits far below zero, where padding's zeros would win; far above, where exp overflows.
    for shift in (-200.0, 0.0, 200.0):
        hidden = torch.randn(2, 50, DIM, generator=generator)
        hidden[..., 0] = shift
        full = torch.cat((torch.ones(VOCAB, 1), weight[:, 1:]), dim=1)
        check_loss(share, hidden, full, labels)

    embedding = VocabularyEmbedding(nn.Parameter(part_of("embedding.weight", weight, axis.rank, axis.size)), share)
    tokens = labels.clamp_min(0)
    assert torch.equal(embedding(tokens), F.embedding(tokens, weight))

    x = torch.full((2, 1), float(axis.rank), requires_grad=True)
    joined = gather_last(x, axis)
    assert joined.tolist() == [[0.0, 1.0]] * 2
    (joined * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0 if axis.rank == 0 else 5.0]] * 2


def check_loss(share: VocabularyShare, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    axis = share.axis
    whole_hidden = hidden.double().requires_grad_()
    whole_weight = weight.double().requires_grad_()
    logits = F.linear(whole_hidden, whole_weight)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (3 * loss).backward()
    assert whole_hidden.grad is not None
    assert whole_weight.grad is not None

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        head = VocabularyHead(
            nn.Parameter(part_of("head.weight", weight.to(dtype), axis.rank, axis.size)), share, CHUNK
        )
        my_hidden = hidden.to(dtype, copy=True).requires_grad_()
        with LargestTensor() as seen:
            my_loss = head(my_hidden, labels)
            (3 * my_loss).backward()
        assert my_loss.dtype == torch.promote_types(dtype, torch.float32)
        assert seen.numel <= max(CHUNK * 49, hidden.numel()), "more than a chunk of this rank's logits"
        if dtype == torch.bfloat16 and hidden[0, 0, 0] != 0:
            assert torch.isfinite(my_loss)  # logits near 200 are rounded to whole numbers
            continue
        assert farthest(my_loss, loss) < tolerance
        assert my_hidden.grad is not None
        assert head.weight.grad is not None
        assert farthest(my_hidden.grad, whole_hidden.grad) < tolerance
        assert farthest(head.weight.grad, part_of("head.weight", whole_weight.grad, axis.rank, axis.size)) < tolerance
        with torch.no_grad():
            everything = head(my_hidden)
            assert everything.dtype == my_loss.dtype
            assert farthest(everything, logits) < tolerance
            assert torch.equal(head(my_hidden, labels), my_loss)


def test_two_ranks_equal_torch() -> None:
    run_distributed(check_loss_and_embedding, 2)


@pytest.mark.parametrize(("vocab_size", "size"), [(61, 2), (5, 4), (3, 4), (64, 4)])
def test_every_token_is_found_on_one_rank_and_no_other_number_is(vocab_size: int, size: int) -> None:
    tokens = torch.arange(vocab_size)
    shares = [VocabularyShare(Axis(rank, tuple(range(size))), vocab_size) for rank in range(size)]
    assert sum(share.held for share in shares) == vocab_size
    found = torch.zeros(vocab_size)
    for share in shares:
        rows, elsewhere = share.find(tokens)
        assert (rows[elsewhere] == 0).all()
        assert torch.equal(rows[~elsewhere] + share.first, tokens[~elsewhere])
        found += ~elsewhere
    assert (found == 1).all()
    for wrong in (-1, vocab_size, vocab_size + 100):
        failed = 0
        for share in shares:
            rows, _ = share.find(torch.tensor([wrong]))
            failed += not 0 <= int(rows) < -(-vocab_size // size)
        assert failed, "no rank fails on what is no token"
