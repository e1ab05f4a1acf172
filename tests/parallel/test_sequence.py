"""Does a model whose sequences are spread over ranks have the loss and every gradient of one process?"""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.models import ModelCase, assert_equal, build, compare_models
from tests.parallel.scans import join_axis
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.sequence import STRATEGIES, ShardedSequence


def cases(checkpointing: bool) -> list[ModelCase]:
    """Windows of 12 over shards of 11 and 5; gradient chunks of 8 over shards of 11; persistent tokens and none."""
    found = [
        ModelCase("mac", "hand_off", 20, dict(segment_len=10, memory_chunk=4)),
        ModelCase("mac", "hand_off", 10, dict(segment_len=5, memory_chunk=8, num_persistent=0, retrieve_every=2)),
        ModelCase("transformer", "head_exchange", 7),
        ModelCase("sliding_window", "hand_off", 20),
        ModelCase("sliding_window", "hand_off", 5, batches=2),
        ModelCase("lmm", "hand_off", 2, dict(memory_momentum=False, num_persistent=0)),
        ModelCase("lmm", "chunk_scan", 6, dict(memory_chunk=12, memory_forgetting=False, num_persistent=0)),
        ModelCase("mal", "head_exchange", 5, dict(memory_per_layer_gates=False, mal_residual=False, num_persistent=0)),
    ]
    found += [
        ModelCase("lmm", "head_exchange", 11, dict(arrangement="h3")),
        ModelCase("mal", "hand_off", 11, dict(arrangement="h3")),
    ]
    for variant in ("gated_deltanet", "gated_deltanet_swa", "linear_attention"):  # windows of 12 over shards of 11
        found += [ModelCase(variant, "head_exchange", 7), ModelCase(variant, "hand_off", 11)]
    for variant in ("mag", "mal", "lmm"):
        found += [
            ModelCase(variant, "head_exchange", 11),
            ModelCase(variant, "hand_off", 11),
            ModelCase(variant, "chunk_scan", 10, dict(memory_chunk=20)),
        ]
    return [case._replace(checkpointing=checkpointing) for case in found]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_variant_equals_one_process_on_2_ranks(checkpointing: bool) -> None:
    asked = cases(checkpointing)
    assert_equal(asked, run_distributed(compare_models, 2, asked))


def test_every_variant_equals_one_process_on_4_ranks() -> None:
    asked = cases(False)[::2] + cases(True)[1::2]
    assert_equal(asked, run_distributed(compare_models, 4, asked))


def test_the_ranks_of_an_axis_need_not_be_next_to_each_other() -> None:
    asked = [case for case in cases(False) if case.variant in ("mag", "mac", "transformer")]
    assert_equal(asked, run_distributed(compare_models, 4, asked, True))


def test_one_rank_alone_is_one_process() -> None:
    for strategy in STRATEGIES:
        case = ModelCase("mag", strategy, 10)
        model, plain = build(case, ShardedSequence(Axis(), strategy)), build(case, None)
        tokens = torch.arange(20).view(2, 10)
        assert torch.equal(model(tokens, tokens), plain(tokens, tokens))


def test_signals_are_there_and_agree_with_one_process_in_the_mean() -> None:
    """Surprise and gates are means over equal shares, whichever way they are shared."""
    plain = build(SIGNALS, None)
    plain.set_signals(True)
    plain(_tokens(), _tokens())
    expected = plain.signals()
    for strategy in STRATEGIES:
        found = run_distributed(signals_of_a_step, 2, strategy)
        assert set(found[0]) == set(expected)
        for name, value in expected.items():
            if name.endswith(("surprise", "_mean")):
                mean = sum(rank[name] for rank in found) / 2
                assert mean == pytest.approx(value.item(), rel=1e-6), f"{strategy}: {name}"


SIGNALS = ModelCase("lmm", "", 8, dict(memory_chunk=16))


def _tokens() -> torch.Tensor:
    return torch.arange(32).view(2, 16)


def signals_of_a_step(strategy: str) -> dict[str, float]:
    axis = join_axis()
    model = build(SIGNALS, ShardedSequence(axis, strategy))
    model.set_signals(True)
    own = _tokens()[:, axis.rank * 8 : axis.rank * 8 + 8]
    model(own, own).backward()
    torch.distributed.barrier()
    return {name: value.item() for name, value in model.signals().items()}
