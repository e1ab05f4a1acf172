"""Counted costs against the model itself and against torch's own operation counter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop, bmm_flop

from tests.model.tiny import tiny_config
from titans_pretrain.config import VARIANTS, ModelConfig
from titans_pretrain.memory import operator
from titans_pretrain.model import Titans, initialize
from titans_pretrain.model.cost import flops_per_token, forward_flops, parameter_counts

SHAPE = dict(
    num_layers=2, dim=64, num_heads=2, hidden_dim=96, vocab_size=300, window=32, segment_len=64, num_persistent=0,
    memory_chunk=16, memory_expansion=2.0,
)  # fmt: skip


def inside(*kernels: Callable[..., Any]) -> Callable[..., int]:
    """The operations of an operator that the counter cannot see into: those of its kernel run once more, less those of the
    second kernel."""

    def count(*arguments: Any, out_val: Any = None) -> int:
        totals = [0, 0]
        for index, kernel in enumerate(kernels):
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                kernel(*arguments)
            totals[index] = counter.get_total_flops()
        return totals[0] - totals[1]

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def rerun(*arguments: Any) -> None:
    """The forward pass that the backward pass begins with: not useful work."""
    operator._forward(*arguments[: operator._NUM_INPUTS + operator._NUM_SETTINGS], False, False)


def flat(shape: torch.Size) -> tuple[int, int, int]:
    """Of matrices in any number of dimensions, a batch in one."""
    return math.prod(shape[:-2]), *shape[-2:]


IN_PLACE = {torch.ops.aten.baddbmm_: lambda total, a, b, out_shape=None, **_: baddbmm_flop(total, a, b)}
"""The counter knows only the one that is not in place."""
UNKNOWN = {
    **IN_PLACE,
    torch.ops.aten.linalg_solve_triangular: lambda a, b, out_shape=None, **_: bmm_flop(flat(a), flat(b)),
    torch.ops.titans_pretrain.memory_scan: inside(operator._forward),
    torch.ops.titans_pretrain.memory_scan_backward: inside(operator._backward, rerun),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_equal_the_model(variant: str, tied: bool) -> None:
    config = tiny_config(variant, tie_embeddings=tied)
    counts = parameter_counts(config)
    assert counts["total"] == sum(p.numel() for p in Titans(config).parameters())
    assert counts["embedding"] == config.vocab_size * config.dim
    assert counts["head"] == (0 if tied else counts["embedding"])
    assert counts["non_embedding"] == counts["total"] - counts["embedding"] - counts["head"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(memory_depth=1, memory_momentum=False),
        dict(memory_depth=3, memory_forgetting=False, retrieve_every=2),
        dict(memory_chunk=128, memory_forget_toward="zero", segment_len=128),
    ],
)
def test_flops_equal_the_counter(variant: str, changes: dict) -> None:
    assert_flops_equal_the_counter(variant, changes)


@pytest.mark.parametrize("variant", ["lmm", "mal"])
def test_flops_equal_the_counter_in_the_h3_arrangement(variant: str) -> None:
    assert_flops_equal_the_counter(variant, dict(arrangement="h3"))


def assert_flops_equal_the_counter(variant: str, changes: dict) -> None:
    config = ModelConfig(variant=variant, **{**SHAPE, **changes})
    model = Titans(config)
    initialize(model, 0)
    tokens = torch.randint(300, (2, 256), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
    ):  # the CPU's fused kernel is not counted
        model(tokens, tokens)
    counted = counter.get_total_flops() / tokens.numel()
    assert sum(forward_flops(config, 256).values()) == pytest.approx(counted, rel=0.01)

    model.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        model(tokens, tokens).backward()
    operations = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    if "aten.convolution_backward" in operations:  # the counter forgets that a depthwise convolution has groups
        operations["aten.convolution_backward"] = 2 * operations["aten.convolution"]
    counted = sum(operations.values()) / tokens.numel()
    assert flops_per_token(config, 256) == pytest.approx(counted, rel=0.03)


def test_longer_sequences_cost_more_only_in_full_attention() -> None:
    for variant in VARIANTS:
        config = ModelConfig(variant=variant, **SHAPE)
        growth = flops_per_token(config, 8192) / flops_per_token(config, 4096)
        assert growth > 1.3 if variant == "transformer" else growth == pytest.approx(1.0, abs=0.01)


def test_the_published_sizes_come_out() -> None:
    """The paper's 170M to 1.3B shapes (method.md section 3), 32K vocabulary, give about the sizes they are named after."""
    shapes = {170: (12, 768, 16), 340: (24, 1024, 16), 760: (24, 1536, 16), 1300: (18, 2048, 8)}
    for millions, (layers, dim, heads) in shapes.items():
        config = ModelConfig(variant="transformer", num_layers=layers, dim=dim, num_heads=heads, vocab_size=32000)
        total = parameter_counts(dataclasses.replace(config, tie_embeddings=False))["total"] / 1e6
        assert 0.75 * millions < total < 1.25 * millions
