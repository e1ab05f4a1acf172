"""Is a model split over tensor ranks the whole model: loss, every gradient, logits and decoding, in float64?"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed
from tests.model.tiny import VOCAB, tiny_model
from tests.parallel.shares import farthest, tensor_axis
from titans_pretrain.config import TITANS_VARIANTS, VARIANTS
from titans_pretrain.model import Titans
from titans_pretrain.model.layers import IGNORED_LABEL
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.split_table import part_of, split_dim, whole_of
from titans_pretrain.parallel.tensor import ColumnLinear, split_model

# Each goes another way through what is split.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "six_heads": dict(dim=36, num_heads=6, memory_per_layer_gates=False, num_persistent=0),
    "tied": dict(
        tie_embeddings=True,
        memory_momentum=False,
        memory_theta_scaling="none",
        memory_forgetting=False,
        retrieve_every=3,
    ),
    "plain": dict(memory_residual_norm=False, memory_heads=4, memory_depth=1, conv_kernel=1),
}


def build(variant: str, changes: dict[str, Any]) -> Titans:
    model = tiny_model(variant, **changes).double()
    model.head.loss_chunk = 32  # several, the last one short
    with torch.no_grad():  # ones and zeros would hide a part that sits in the wrong place
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.std() == 0 or "norm" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                parameter.add_(0.3 * noise)
    return model


def batch(vocab_size: int = VOCAB) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocab_size, (2, 46), generator=torch.Generator().manual_seed(1))
    tokens[0, :2], tokens[1, :2] = 0, vocab_size - 1
    labels = tokens[:, 1:].clone()
    labels[0, 5:9] = IGNORED_LABEL
    return tokens[:, :-1], labels


def gradients(model: Titans) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def gathered(x: Tensor, axis: Axis) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in axis.ranks]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return parts


def decode(model: Titans, tokens: Tensor) -> Tensor:
    state, outputs, start = None, [], 0
    for length in (7, 1, 19, 2, 16):
        hidden, state = model.hidden(tokens[:, start : start + length], state)
        outputs.append(model.logits(hidden))
        start += length
    assert start == tokens.shape[1]
    return torch.cat(outputs, dim=1)


def assert_equals_whole(axis: Axis, variant: str, changes: dict[str, Any], checkpointing: bool) -> None:
    whole, split = build(variant, changes), build(variant, changes)
    names = list(whole.state_dict())
    vocab_size = whole.config.vocab_size
    split_model(split, axis)
    assert list(split.state_dict()) == names
    assert (split.head.weight is split.embedding.weight) == whole.config.tie_embeddings
    for name, parameter in split.named_parameters():
        assert getattr(parameter, "tensor_model_parallel", False) == (split_dim(name) is not None), name
        assert torch.equal(parameter, part_of(name, whole.get_parameter(name), axis.rank, axis.size)), name

    tokens, labels = batch(vocab_size)
    split.activation_checkpointing = checkpointing
    losses = [model(tokens, labels) for model in (whole, split)]
    assert farthest(losses[1], losses[0]) < 1e-12
    for loss in losses:
        (loss * 0.5).backward()
    expected = gradients(whole)
    for name, gradient in gradients(split).items():
        parts = gathered(gradient, axis)
        if split_dim(name) is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        assert farthest(whole_of(name, parts, vocab_size), expected[name]) < 1e-10, name
        if name in ("embedding.weight", "head.weight"):
            padding = torch.cat(parts)[vocab_size:]
            assert not padding.any(), f"{name}: padding learns"

    with torch.no_grad():
        logits = whole.logits(whole.hidden(tokens)[0])
        assert farthest(split.logits(split.hidden(tokens)[0]), logits) < 1e-12
        if not checkpointing:
            assert farthest(decode(split, tokens), logits) < 1e-11
        assert farthest(split(tokens, labels), losses[0]) < 1e-12


def run_cases(cases: list[tuple[str, dict[str, Any], bool]], data: int = 1) -> None:
    axis = tensor_axis(data)
    for variant, changes, checkpointing in cases:
        try:
            assert_equals_whole(axis, variant, changes, checkpointing)
        except Exception as error:
            raise AssertionError(f"{variant} {changes} checkpointing={checkpointing}") from error


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process(variant: str) -> None:
    names = list(CASES) if variant in TITANS_VARIANTS else ["default", "six_heads", "tied"]
    run_distributed(run_cases, 2, [(variant, CASES[name], name in ("six_heads", "plain")) for name in names])


def test_two_ranks_equal_one_process_in_the_h3_arrangement() -> None:
    run_distributed(run_cases, 2, [("lmm", dict(arrangement="h3"), True), ("mal", dict(arrangement="h3"), False)])


def test_four_ranks_equal_one_process() -> None:
    """5 tokens over 4 ranks are 2, 2, 1 and none."""
    four_heads = dict(num_heads=4, memory_heads=8)
    run_distributed(run_cases, 4, [("mag", four_heads, False), ("mac", dict(**four_heads, vocab_size=5), True)])


def test_ranks_beside_the_axis_do_not_take_part() -> None:
    run_distributed(run_cases, 4, [("mal", CASES["default"], False)], 2)


def run_documents(variants: list[str]) -> None:
    """Rows of several documents."""
    axis = tensor_axis()
    tokens, labels = batch()
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [0, 8, 24]] = starts[1, [0, 40]] = True
    for variant in variants:
        whole, split = (build(variant, dict(segment_len=8)) for _ in range(2))
        split_model(split, axis)
        losses = [model(tokens, labels, starts) for model in (whole, split)]
        assert farthest(losses[1], losses[0]) < 1e-12
        assert farthest(whole(tokens, labels), losses[0]) > 1e-6
        for loss in losses:
            loss.backward()
        for name, gradient in gradients(split).items():
            expected = part_of(name, gradients(whole)[name], axis.rank, axis.size)
            assert farthest(gradient, expected) < 1e-10, f"{variant} {name}"


def test_rows_of_several_documents() -> None:
    run_distributed(run_documents, 2, ["mag", "mac"])


def run_other_conditions(variants: list[str]) -> None:
    """bf16; and ZeRO-3's habit of giving every module tensors of its own."""
    axis = tensor_axis()
    tokens, labels = batch()
    for variant in variants:
        whole, split, wrapped = build(variant, {}), build(variant, {}), build(variant, {})
        whole(tokens, labels).backward()
        split_model(split, axis)
        split_model(wrapped, axis)

        for module in wrapped.modules():
            if isinstance(module, ColumnLinear):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].view_as(inputs[0]),))
        wrapped(tokens, labels).backward()
        for name, gradient in gradients(wrapped).items():
            expected = part_of(name, gradients(whole)[name], axis.rank, axis.size)
            assert farthest(gradient, expected) < 1e-10, f"{variant} {name}"

        loss = split.bfloat16()(tokens, labels)
        loss.backward()
        assert loss.dtype == torch.float32
        assert farthest(loss.double(), whole(tokens, labels)) < 0.01
        for name, gradient in gradients(split).items():
            assert gradient.dtype == torch.bfloat16
            if split_dim(name) is None:
                parts = gathered(gradient, axis)
                assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"


def test_bf16_and_layers_whose_inputs_are_wrapped() -> None:
    run_distributed(run_other_conditions, 2, ["mag", "mac"])


# ------------------------------------------------------------------------------------------------------- what it costs


def count_all_reduces(variants: list[str]) -> dict[tuple[str, bool], tuple[int, int, int]]:
    """Of models of one block, by (variant, activation checkpointing): all-reduces forward, all-reduces backward, and input
    copies that outlive the blocks."""
    axis = tensor_axis()
    tokens, labels = batch()
    counts = {}
    for variant in variants:
        for checkpointing in (False, True):
            model = build(variant, dict(num_layers=1))
            split_model(model, axis)
            model.activation_checkpointing = checkpointing
            copies = model.get_submodule("blocks.0.feed_forward.up").copies
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                loss = model(tokens, labels)
                forward, kept = all_reduce.call_count, len(copies._copies)
                loss.backward()
            counts[variant, checkpointing] = forward, all_reduce.call_count - forward, max(kept, len(copies._copies))
    return counts


def test_layers_that_read_one_tensor_sum_its_gradient_once() -> None:
    loss_chunks = 3  # 90 tokens by 32, each with a maximum and a sum
    outside = 1 + 2 * loss_chunks  # and the embedding
    # variant -> row-split layers before the feed-forward's, and tensors that column-split layers read
    block = {
        "transformer": (1, 2),  # x for q, k and v; the feed-forward's x for gate and up
        "lmm": (1, 3),  # x for the memory's seven layers; the persistent tokens for six of them; the feed-forward
        "mag": (2, 5),  # x for attention and memory; the persistent tokens for the memory, and for k and v each; ...
    }
    expected = {}
    for variant, (rows, columns) in block.items():
        # The head's input is one more. Recomputation repeats the sums, but for the feed-forward's: no gradient needs it.
        expected[variant, False] = (outside + rows + 1, columns + 1, 0)
        expected[variant, True] = (outside + rows + 1, columns + 1 + rows, 0)
    assert run_distributed(count_all_reduces, 2, list(block)) == [expected] * 2
