"""Is decoding at any length what reading at once is, at a memory that does not grow with it?

`make test-long` (TITANS_LONG_DECODE) goes to 131,072 tokens with every variant, half an hour on 2 cores.
"""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from tests.model.tiny import VOCAB, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.inference.generate import read
from titans_pretrain.model.rows import join_states, read_rows, row_positions
from titans_pretrain.model.titans import state_bytes

WHOLE = bool(os.environ.get("TITANS_LONG_DECODE"))
LENGTH = 131_072 if WHOLE else 1_500
FIRST = 1_024 if WHOLE else 500
CONSTANT = [variant for variant in VARIANTS if variant != "transformer"]


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", CONSTANT if WHOLE else ["mac", "mag"])
@torch.inference_mode()
def test_decoding_two_rows_to_any_length(variant: str) -> None:
    """Two rows 5 tokens apart, a token at a time: the memory they take after FIRST tokens is the memory they take at the
    end, and there the model says what it says after reading the same tokens at once."""
    model = tiny_model(variant, num_layers=1, dim=16, num_heads=1, hidden_dim=16).requires_grad_(False)
    tokens = [ids(LENGTH + 5, seed) for seed in (1, 2)]
    _, state = read_rows(model, [tokens[0][:1], tokens[1][:6]])
    batch = torch.tensor([tokens[0][1:LENGTH], tokens[1][6 : LENGTH + 5]])
    process = psutil.Process()
    sizes, resident = [0, 0], [0, 0]
    for place in range(batch.shape[1]):
        hidden, state = model.hidden(batch[:, place : place + 1], state)
        if place % 64 == 0 or place == FIRST:
            half = int(place >= FIRST)
            sizes[half] = max(sizes[half], state_bytes(state))
            resident[half] = max(resident[half], process.memory_info().rss)
    assert row_positions(state) == [LENGTH, LENGTH + 5]
    assert sizes[0] == sizes[1]
    assert resident[1] - resident[0] < 4 << 20
    print(f"{variant}: {LENGTH} tokens, state {sizes[1]} bytes, process {resident[0]} then {resident[1]} bytes")
    found = model.logits(hidden)[:, 0]
    for row, mine in enumerate(tokens):
        whole = read(model, [mine[: LENGTH + 5 * row]], piece=4096)
        torch.testing.assert_close(found[row], whole.logits[0], rtol=1e-4, atol=1e-4)


def test_joining_does_not_keep_what_it_joined() -> None:
    """Rows that leave take their memory with them."""
    model = tiny_model("mag").requires_grad_(False)
    one = read(model, [[1] * 9]).state
    two = read(model, [[2] * 14]).state
    joined = join_states([one, two], model.config)
    assert state_bytes(joined) <= 2 * max(state_bytes(one), state_bytes(two))
