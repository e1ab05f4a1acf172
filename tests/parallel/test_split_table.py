"""Does the split table know every parameter once, and do its two functions undo each other?"""

from __future__ import annotations

import re

import pytest
import torch

from tests.model.test_titans import OPTIONS
from tests.model.tiny import VOCAB, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.parallel.split_table import TABLE, part_of, rows_per_rank, split_dim, whole_of


def parameters(variant: str, **changes: object) -> list[tuple[str, torch.nn.Parameter]]:
    return list(tiny_model(variant, **changes).named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [*OPTIONS, "tied", "h3"])
def test_every_parameter_has_one_entry_and_its_parts_make_it_whole(variant: str, options: str) -> None:
    changes = dict(OPTIONS.get(options, dict(tie_embeddings=True)))
    if options == "h3":
        changes = dict(arrangement="h3" if variant in ("lmm", "mal") else "llama")
    if "memory_heads" in changes:
        changes["memory_heads"] = 4  # not 1, which two ranks cannot share
    for name, parameter in parameters(variant, **changes):
        plain = re.sub(r"\.\d+", "", name)
        assert len([end for end in TABLE if f".{plain}".endswith(f".{end}")]) == 1, name
        for size in (1, 2):
            parts = [part_of(name, parameter.detach(), rank, size) for rank in range(size)]
            assert torch.equal(whole_of(name, parts, VOCAB), parameter), name
            assert all(part.is_contiguous() and part.shape == parts[0].shape for part in parts), name
            if split_dim(name) is None:
                continue
            assert sum(part.shape[split_dim(name)] for part in parts) - parameter.shape[split_dim(name)] in (
                0,
                size - 1,
            )
            for part in parts:
                part.add_(1.0)
            assert all((part.untyped_storage().nbytes() == part.nbytes) for part in parts), "keeps the whole in memory"
            assert torch.equal(whole_of(name, parts, VOCAB), parameter + 1.0), "a part is a copy"


def test_what_each_parameter_of_a_block_does() -> None:
    """Written out for the one variant that has them all, so that a slip in the table does not pass as a round trip."""
    found = {name.removeprefix("blocks.0."): split_dim(name) for name, _ in parameters("mac") if "blocks.1" not in name}
    columns = ["query", "key", "value"]
    rows = {"attention.output.weight", "memory.output.weight", "feed_forward.down.weight"}
    whole = {"persistent", "mixer_norm.weight", "feed_forward_norm.weight", "memory_norm.weight", "norm.weight"}
    whole |= {"gate.attention_norm.weight", "gate.memory_norm.weight"}
    first = {f"{part}.{column}.weight" for part in ("attention", "memory") for column in columns}
    first |= {f"memory.{column}_conv.weight" for column in columns}
    first |= {f"memory.{gate}_gate.{kind}" for gate in ("theta", "eta", "alpha") for kind in ("weight", "bias")}
    first |= {
        "memory.initial_weights.0",
        "memory.initial_weights.1",
        "memory.read_norm.weight",
        "memory.read_gate.weight",
    }
    first |= {"memory.inner_norm_weight", "memory.inner_norm_bias", "embedding.weight", "head.weight"}
    first |= {"feed_forward.gate.weight", "feed_forward.up.weight"}
    assert found == {**dict.fromkeys(rows, 1), **dict.fromkeys(whole, None), **dict.fromkeys(first, 0)}
    assert split_dim("blocks.0.attention_norm.weight") is None  # MAL's


@pytest.mark.parametrize(("vocab_size", "size", "rows"), [(61, 2, 31), (61, 4, 16), (5, 4, 2), (64, 4, 16), (3, 4, 1)])
def test_vocabulary_is_padded_with_zeros(vocab_size: int, size: int, rows: int) -> None:
    whole = torch.randn(vocab_size, 3)
    parts = [part_of("embedding.weight", whole, rank, size) for rank in range(size)]
    assert rows_per_rank(vocab_size, size) == rows
    assert {part.shape for part in parts} == {(rows, 3)}
    assert not torch.cat(parts)[vocab_size:].any()
    assert torch.equal(whole_of("embedding.weight", parts, vocab_size), whole)


@pytest.mark.parametrize(
    "name", ["blocks.0.output.weight", "blocks.0.attention.gate.weight", "blocks.0.memory.query.bias", "weight"]
)
def test_an_unknown_parameter_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        split_dim(name)
    with pytest.raises(KeyError, match=name):
        part_of(name, torch.zeros(4, 4), 0, 2)
    with pytest.raises(KeyError, match=name):
        whole_of(name, [torch.zeros(4, 4)], VOCAB)


def test_what_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of blocks.0.attention.output.weight \(9\) .* 2 tensor ranks"):
        part_of("blocks.0.attention.output.weight", torch.zeros(4, 9), 0, 2)
