"""Is the loss by position that of one pass, and does it go on to 16 training lengths in constant memory?"""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch

from tests.model.tiny import VOCAB, random_tokens, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.perplexity import bucket_places, perplexity_by_position, text_rows
from titans_pretrain.model.titans import state_bytes

CONSTANT = [variant for variant in VARIANTS if variant != "transformer"]


def rows(count: int, length: int, seed: int = 1) -> list[np.ndarray]:
    return list(random_tokens(count, length + 1, seed).numpy())


@pytest.mark.parametrize("variant", ["mac", "mag", "lmm", "transformer"])
@torch.inference_mode()
def test_buckets_are_means_over_one_pass(variant: str) -> None:
    """3 sequences in batches of 2, in pieces that do not divide the buckets."""
    model = tiny_model(variant).requires_grad_(False)
    given = rows(3, 4 * 24)
    found = perplexity_by_position(
        model, given, train_length=24, multiple=4, piece=11, batch=2, state_bytes=state_bytes
    )
    tokens = torch.from_numpy(np.stack(given))
    logits = model.logits(model.hidden(tokens[:, :-1])[0])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert bucket_places(24, 4) == [0, 6, 12, 18, 24, 48, 96]
    assert [(b["from"], b["to"], b["tokens"]) for b in found["buckets"]] == [
        (0.0, 0.25, 18),
        (0.25, 0.5, 18),
        (0.5, 0.75, 18),
        (0.75, 1.0, 18),
        (1.0, 2.0, 72),
        (2.0, 4.0, 144),
    ]
    for bucket in found["buckets"]:
        part = losses[:, round(24 * bucket["from"]) : round(24 * bucket["to"])]
        assert bucket["loss"] == pytest.approx(float(part.mean()), rel=1e-4)
        assert bucket["perplexity"] == pytest.approx(float(part.mean().exp()), rel=1e-3)
        assert bucket["error"] == pytest.approx(float(part.mean(1).std() / 3**0.5), rel=1e-2)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["sequences"] == 3
    assert found["finite"]


@pytest.mark.parametrize("variant", CONSTANT)
def test_sixteen_training_lengths_in_constant_memory(variant: str) -> None:
    """The state after 16 training lengths takes what it takes after two, the process no more, and every loss is finite."""
    model = tiny_model(variant, num_layers=1, dim=16, num_heads=1, hidden_dim=16).requires_grad_(False)
    process, resident = psutil.Process(), []

    def measure(state: object) -> int:
        resident.append(process.memory_info().rss)
        return state_bytes(state)

    given = rows(1, 16 * 160)
    perplexity_by_position(
        model, given, train_length=160, multiple=16, piece=160, batch=1
    )  # what a first pass allocates
    found = perplexity_by_position(model, given, train_length=160, multiple=16, piece=160, batch=1, state_bytes=measure)
    assert found["finite"]
    assert len(found["buckets"]) == 8
    assert found["buckets"][-1]["to"] == 16.0
    assert [size["at"] for size in found["state_bytes"]] == [1, 2, 4, 8, 16]
    assert len({size["bytes"] for size in found["state_bytes"][1:]}) == 1, found["state_bytes"]
    assert max(resident[2:]) - resident[1] < 2 << 20
    assert all(abs(bucket["loss"] - np.log(VOCAB)) < 2 for bucket in found["buckets"])


def test_the_full_attention_baselines_state_is_told_to_grow() -> None:
    model = tiny_model("transformer").requires_grad_(False)
    found = perplexity_by_position(
        model, rows(1, 64), train_length=16, multiple=4, piece=16, batch=1, state_bytes=state_bytes
    )
    sizes = [size["bytes"] for size in found["state_bytes"]]
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]


def test_what_is_not_finite_is_said_so() -> None:
    model = tiny_model("mag").requires_grad_(False)
    model.norm.weight.fill_(float("inf"))
    found = perplexity_by_position(model, rows(2, 32), train_length=16, multiple=2, piece=16, batch=2)
    assert not found["finite"]
    assert found["loss"] is None
    assert all(bucket["loss"] is None and bucket["perplexity"] is None for bucket in found["buckets"])


def test_rows_of_a_text_share_one_token() -> None:
    first, second = text_rows(range(20), 8, most=5)
    assert (first[0], first[-1], second[0], second[-1]) == (0, 8, 8, 16)
    assert len(text_rows(range(20), 8, most=1)) == 1
    with pytest.raises(UserError, match=r"20 tokens.*21.*--multiple"):
        text_rows(range(20), 20, most=1)
