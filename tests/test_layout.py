"""Is every layout that cannot work refused by a sentence that names the keys and a way out, and no other?"""

from __future__ import annotations

import pytest

from titans_pretrain.config import load_config
from titans_pretrain.errors import UserError
from titans_pretrain.layout import Layout, choose_layout, memory_strategy

SMALL = ("data.seq_len=64", "data.batch_tokens=256", "model.dim=96", "model.num_heads=6", "model.hidden_dim=192")


def choose(world_size: int, *overrides: str) -> Layout:
    return choose_layout(load_config(None, [*SMALL, *overrides]), world_size)


def refusal(world_size: int, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        choose(world_size, *overrides)
    return str(caught.value)


def test_world_size_must_share_the_batch() -> None:
    config = load_config(None, ["data.seq_len=512", "data.batch_tokens=4096", "data.micro_batch=2"])
    choose_layout(config, 4)
    with pytest.raises(UserError, match=r"8 sequences .*4096.*512.* 3 data-parallel ranks.* multiple of 1536"):
        choose_layout(config, 3)
    with pytest.raises(UserError, match=r"8 ranks takes 1 sequences.*data\.micro_batch \(2\)"):
        choose_layout(config, 8)
    with pytest.raises(UserError, match=r"parallel\.data is 2 but 4 processes"):
        choose_layout(load_config(None, ["parallel.data=2"]), 4)


def test_data_takes_the_ranks_that_sequence_and_tensor_leave() -> None:
    assert choose(1) == Layout(1, 1, 1)
    four = ("parallel.sequence=2", "parallel.tensor=2", "parallel.memory=hand_off")
    assert choose(8, *four) == Layout(2, 2, 2)
    assert choose(8, *four, "parallel.data=2").replicas == 4
    text = refusal(6, "parallel.sequence=2", "parallel.tensor=2")
    assert "parallel.sequence (2) x parallel.tensor (2) = 4 does not divide the 6 processes" in text
    text = refusal(8, "parallel.sequence=2", "parallel.tensor=2", "parallel.data=4")
    assert "parallel.data is 4 but 8 processes were started / 4" in text
    assert "start 16" in text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["parallel.tensor=4", "parallel.sequence=1"],
            ["model.num_heads (6)", "parallel.tensor (4)", "parallel.tensor=3"],
        ),
        (["parallel.tensor=4", "model.variant=lmm"], ["model.memory_heads (6)", "parallel.tensor=3"]),
        (["parallel.tensor=4", "model.hidden_dim=190"], ["model.hidden_dim (190)", "parallel.tensor=2"]),
        (
            ["parallel.sequence=4", "data.seq_len=66", "data.batch_tokens=66"],
            ["data.seq_len (66)", "parallel.sequence=3"],
        ),
        (["parallel.sequence=4"], ["head_exchange", "model.memory_heads (6)", "parallel.sequence=3", "hand_off"]),
        (
            ["parallel.sequence=2", "parallel.tensor=2"],
            ["model.memory_heads (6) / parallel.tensor (2) = 3 heads a rank", "parallel.sequence=1"],
        ),
        (["parallel.sequence=4", "model.variant=transformer"], ["full attention", "model.num_heads (6)"]),
        (
            ["parallel.sequence=2", "model.variant=rmt", "model.segment_len=16"],
            ["parallel.sequence (2)", "model.variant=rmt", "parallel.sequence=1"],
        ),
        (
            ["parallel.sequence=2", "parallel.memory=hand_off", "engine.zero_stage=3"],
            ["parallel.memory=hand_off", "engine.zero_stage=3", "engine.zero_stage=1", "head_exchange"],
        ),
        (
            ["parallel.sequence=2", "model.variant=mac", "model.segment_len=16", "engine.zero_stage=3"],
            ["engine.zero_stage=1"],
        ),
        (
            ["parallel.sequence=2", "model.variant=mac", "parallel.memory=head_exchange"],
            ["parallel.memory=head_exchange", "model.variant=mac", "parallel.memory=hand_off"],
        ),
        (
            ["parallel.sequence=4", "model.variant=mac", "model.segment_len=32"],
            ["16 tokens", "model.segment_len (32)", "parallel.sequence"],
        ),
        (
            ["parallel.sequence=4", "parallel.memory=chunk_scan", "model.memory_chunk=40"],
            ["chunk_scan", "model.memory_chunk (40)", "16 tokens"],
        ),
        (
            ["parallel.sequence=2", "data.reset_at_documents=true", "model.num_heads=4"],
            ["data.reset_at_documents=true", "parallel.sequence (2)", "parallel.sequence=1"],
        ),
        (
            ["parallel.sequence=2", "model.variant=gated_deltanet", "parallel.memory=chunk_scan"],
            ["parallel.memory=chunk_scan", "model.variant=gated_deltanet", "head_exchange", "hand_off"],
        ),
        (
            ["parallel.sequence=2", "model.variant=linear_attention", "model.memory_heads=1"],
            ["model.memory_heads (1)", "parallel.memory=hand_off"],
        ),
        (["parallel.tensor=2", "model.variant=gated_deltanet_swa", "model.memory_heads=1"], ["model.memory_heads (1)"]),
        (["parallel.tensor=2", "model.compile=true"], ["model.compile=true", "parallel.tensor (2)"]),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], parts: list[str]) -> None:
    text = refusal(4, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2", "parallel.sequence=2", "parallel.memory=hand_off"],
        ["parallel.sequence=2", "parallel.tensor=2", "model.variant=sliding_window"],
        ["parallel.tensor=2", "model.variant=rmt", "model.segment_len=16"],
        ["parallel.sequence=4", "parallel.memory=chunk_scan", "model.memory_chunk=32"],
        ["parallel.sequence=4", "model.variant=mac", "model.segment_len=16"],
        ["parallel.tensor=2", "model.variant=lmm", "model.num_heads=1", "model.memory_heads=2"],
        ["parallel.tensor=2", "data.reset_at_documents=true"],
        ["parallel.sequence=4", "model.variant=gated_deltanet", "parallel.memory=hand_off"],
        ["parallel.tensor=2", "model.variant=linear_attention", "model.num_heads=1", "model.memory_heads=2"],
    ],
)
def test_what_works_is_allowed(overrides: list[str]) -> None:
    choose(4, *overrides)


def test_the_memory_is_scanned_as_asked_or_as_the_model_allows() -> None:
    assert memory_strategy(load_config(None, ["model.variant=mac"])) == "hand_off"
    assert memory_strategy(load_config(None, ["model.variant=mal"])) == "head_exchange"
    assert memory_strategy(load_config(None, ["parallel.memory=chunk_scan"])) == "chunk_scan"
