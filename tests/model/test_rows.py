"""Is a row of a batch of unequal lengths what it is alone: read, decoded, selected, joined, padded?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.model.tiny import random_tokens, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.model import Titans
from titans_pretrain.model.rows import (
    count_rows,
    join_states,
    read_padded,
    read_rows,
    row_positions,
    select_rows,
)
from titans_pretrain.model.titans import ModelState

# Chunks of 8, windows of 12, segments of 20: before, at and after each border, and a prompt of one token.
LENGTHS = [1, 7, 8, 20, 13, 33, 1, 41, 20]
STEPS = 45
CASES = [
    *((variant, {}) for variant in VARIANTS),
    *(("mac", changes) for changes in ({"memory_chunk": 1}, {"retrieve_every": 3}, {"num_persistent": 0})),
    ("mag", {"num_persistent": 0, "memory_chunk": 2}),
    ("lmm", {"conv_kernel": 1}),
    ("lmm", {"arrangement": "h3"}),
]


class Rows:
    """A model, the tokens of rows, and what the model says of each row alone."""

    def __init__(self, model: Titans) -> None:
        self.model = model
        self.tokens = [random_tokens(1, n + 2 * STEPS, seed=i)[0] for i, n in enumerate(LENGTHS)]
        self.alone = [model.hidden(row[None])[0][0] for row in self.tokens]

    def check(self, rows: list[int], found: torch.Tensor, at: list[int]) -> None:
        """`found` [b, c], the hidden states of `rows` at their tokens `at`."""
        expected = torch.stack([self.alone[row][place] for row, place in zip(rows, at, strict=True)])
        torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5)

    def decode(self, rows: list[int], state: ModelState, steps: int) -> ModelState:
        """One forward a token for all rows, each compared."""
        for _ in range(steps):
            at = row_positions(state)
            tokens = torch.stack([self.tokens[row][place] for row, place in zip(rows, at, strict=True)])
            hidden, state = self.model.hidden(tokens[:, None], state)
            self.check(rows, hidden[:, 0], at)
        return state

    def begin(self, rows: list[int]) -> ModelState:
        given = [self.tokens[row][: LENGTHS[row]] for row in rows]
        hidden, state = read_rows(self.model, given, piece=9)
        self.check(rows, torch.cat(hidden), [LENGTHS[row] - 1 for row in rows])
        assert row_positions(state) == [LENGTHS[row] for row in rows]
        return state


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "-".join([c[0], *c[1]]))
def rows(request: pytest.FixtureRequest) -> Rows:
    variant, changes = request.param
    with torch.no_grad():
        return Rows(tiny_model(variant, **changes))


def test_rows_of_a_batch_are_what_they_are_alone(rows: Rows) -> None:
    everyone = list(range(len(LENGTHS)))
    rows.decode(everyone, rows.begin(everyone), STEPS)


def test_rows_leave_come_back_and_double(rows: Rows) -> None:
    """Finished rows go, beams double, and new rows join a batch under way: what continuous batching does."""
    config = rows.model.config
    members = [1, 3, 4, 7]
    state = rows.decode(members, rows.begin(members), 5)
    state = select_rows(state, [2, 0, 0], config)
    members = [4, 1, 1]
    state = rows.decode(members, state, 4)
    state = join_states([state, rows.begin([0]), rows.begin([8, 3])], config)
    members = [4, 1, 1, 0, 8, 3]
    state = rows.decode(members, state, 25)
    # Rows that stand at one place again are an ordinary batch, which takes any number of tokens.
    state, members = select_rows(state, torch.tensor([4, 5]), config), [8, 3]
    assert state.row_positions is None
    place = state.position
    hidden, state = rows.model.hidden(torch.stack([rows.tokens[r][place : place + 15] for r in members]), state)
    rows.check(members, hidden[:, -1], [place + 14] * 2)
    rows.decode(members, state, 3)


def test_rows_at_one_place_of_a_chunk_but_not_of_a_segment(rows: Rows) -> None:
    """Tokens 5 and 13 are alike to chunks of 8; at the end of a segment of 20 they part."""
    tokens = [rows.tokens[i][:n] for i, n in enumerate((5, 13, 16))]
    _, state = read_rows(rows.model, tokens)
    rows.decode([0, 1], select_rows(state, [0, 1], rows.model.config), 30)
    joined = join_states([read_rows(rows.model, [x])[1] for x in tokens[:2]], rows.model.config)
    rows.decode([0, 1], joined, 30)


def test_more_tokens_for_rows_at_different_places(rows: Rows) -> None:
    """The next turn of several conversations, of different lengths, one of them silent."""
    members = [1, 3, 4, 8]
    state = rows.begin(members)
    more = [11, 0, 1, 26]
    given = [rows.tokens[row][LENGTHS[row] : LENGTHS[row] + n] for row, n in zip(members, more, strict=True)]
    hidden, state = read_rows(rows.model, given, state, every_token=True)
    for row, n, found in zip(members, more, hidden, strict=True):
        torch.testing.assert_close(found, rows.alone[row][LENGTHS[row] : LENGTHS[row] + n], rtol=3e-5, atol=3e-5)
    rows.decode(members, state, 12)


def padded(rows: Rows, members: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(LENGTHS[row] for row in members)
    ids, mask = torch.full((len(members), width), 3), torch.zeros(len(members), width, dtype=torch.int64)
    for i, row in enumerate(members):
        ids[i, width - LENGTHS[row] :] = rows.tokens[row][: LENGTHS[row]]
        mask[i, width - LENGTHS[row] :] = 1
    return ids, mask


def test_padding_in_front_changes_nothing(rows: Rows) -> None:
    members = [0, 4, 7]
    ids, mask = padded(rows, members)
    hidden, state = read_padded(rows.model, ids, mask)
    for i, row in enumerate(members):
        n = LENGTHS[row]
        torch.testing.assert_close(hidden[i, -n:], rows.alone[row][:n], rtol=3e-5, atol=3e-5)
        assert not hidden[i, :-n].any()
    for _ in range(14):  # as transformers goes on: one token a row, and a mask of everything so far
        at = row_positions(state)
        mask = torch.cat((mask, mask.new_ones(len(members), 1)), dim=1)
        tokens = torch.stack([rows.tokens[row][place] for row, place in zip(members, at, strict=True)])
        hidden, state = read_padded(rows.model, tokens[:, None], mask, state)
        rows.check(members, hidden[:, 0], at)


def test_decoding_is_one_forward_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mac")
    _, state = read_rows(model, [[1], [2, 3, 4], [5, 6]])
    calls = []
    original = Titans.hidden
    monkeypatch.setattr(Titans, "hidden", lambda *a: calls.append(tuple(a[1].shape)) or original(*a))
    for _ in range(3):
        _, state = read_padded(model, torch.tensor([[1], [2], [3]]), None, state)
    assert calls == [(3, 1)] * 3


def test_reading_goes_as_wide_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("lmm")
    calls = []
    original = Titans.hidden
    monkeypatch.setattr(Titans, "hidden", lambda *a: calls.append(tuple(a[1].shape)) or original(*a))
    read_rows(model, [[1] * 10, [2] * 4, [3] * 10, [4] * 7], piece=5)
    assert calls == [(4, 4), (3, 3), (2, 3)]


def test_what_does_not_fit_is_said() -> None:
    model = tiny_model("lmm")
    _, state = read_rows(model, [[1], [2, 3]])
    bad = [
        (lambda: read_rows(model, [[1], []]), "at the beginning at least one"),
        (lambda: read_rows(model, [[1]], state), "every row of the state"),
        (lambda: read_rows(model, [[], []], state), "no row has a token"),
        (lambda: select_rows(state, [], model.config), "at least one row"),
        (lambda: model.hidden(torch.ones(2, 2, dtype=torch.int64), state), "one token at a time"),
        (lambda: read_padded(model, torch.ones(2, 2, dtype=torch.int64), torch.tensor([[1, 0], [1, 1]])), "left"),
        (lambda: read_padded(model, torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 1)), "must be .b, t. or longer"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    assert count_rows(state) == 2


def test_state_stays_of_one_size() -> None:
    """Rows at different places keep no more than rows that agree do, at any length."""
    for variant in ("mac", "mag"):
        model = tiny_model(variant)
        _, state = read_rows(model, [[1] * 3, [2] * 30, [3] * 17])

        def sizes(part: object) -> Iterator[int]:
            if isinstance(part, torch.Tensor):
                yield part.numel()
            elif isinstance(part, tuple):
                yield from itertools.chain.from_iterable(map(sizes, part))

        seen = []
        for _ in range(60):
            _, state = model.hidden(torch.ones(3, 1, dtype=torch.int64), state)
            seen.append(sum(sizes(state)))
        assert len(set(seen[20:])) == 1
