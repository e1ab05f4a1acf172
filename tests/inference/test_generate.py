"""Does decoding from the state equal the parallel forward, stop where it should, and need no more memory with length?"""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import psutil
import pytest
import torch

from tests.inference.tiny import random_ids, tiny_export
from titans_pretrain.config import VARIANTS
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Generation, advance, prefill
from titans_pretrain.inference.sampling import SamplingOptions
from titans_pretrain.model import Titans
from titans_pretrain.model.titans import state_bytes

GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Titans:
    folder = tmp_path_factory.mktemp(request.param) / "export"
    tiny_export(folder, tokenizer_file, request.param)
    return load_export(folder).model


@torch.no_grad()
def parallel_logits(model: Titans, ids: list[int]) -> torch.Tensor:
    return model.logits(model.hidden(torch.tensor([ids]))[0])[0]


def test_decoding_equals_the_parallel_forward(model: Titans) -> None:
    """To five times the tiny model's training length of 32, over chunks of 8, windows of 12 and segments of 20."""
    ids = random_ids(160)
    expected = parallel_logits(model, ids)
    logits, state = prefill(model, ids[:23], piece=9)
    for place in range(23, len(ids)):
        torch.testing.assert_close(logits, expected[place - 1], rtol=1e-5, atol=1e-5)
        logits, state = advance(model, ids[place : place + 1], state)
    torch.testing.assert_close(logits, expected[-1], rtol=1e-5, atol=1e-5)
    assert state.position == len(ids)


def test_greedy_tokens_are_those_of_rerunning_the_prefix(model: Titans) -> None:
    prompt = random_ids(15)
    written = list(Generation(model, prompt, max_new_tokens=30, options=GREEDY, piece=4))
    expected = list(prompt)
    for _ in range(30):
        expected.append(int(parallel_logits(model, expected)[-1].argmax()))
    assert written == expected[15:]


def test_each_new_token_runs_once_and_the_prompt_in_pieces(model: Titans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length before it, a step gives the model one token: the prefix is never run again."""
    lengths = []
    original = Titans.hidden

    def counted(self: Titans, tokens: torch.Tensor, state: object = None) -> object:
        lengths.append(tokens.shape[1])
        return original(self, tokens, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Titans, "hidden", counted)
    assert len(list(Generation(model, random_ids(20), max_new_tokens=6, piece=8))) == 6
    assert lengths == [8, 8, 4, 1, 1, 1, 1, 1]


def test_seed_decides_the_tokens(model: Titans) -> None:
    def write(seed: int) -> list[int]:
        return list(Generation(model, [1], max_new_tokens=12, options=SamplingOptions(temperature=1.5), seed=seed))

    assert write(3) == write(3)
    assert write(3) != write(4)


def test_stops_at_eos_without_yielding_it(model: Titans) -> None:
    everything = list(Generation(model, [1], max_new_tokens=20, seed=1))
    eos = everything[9]
    written = list(Generation(model, [1], max_new_tokens=20, seed=1, eos_id=eos))
    assert written == everything[: everything.index(eos)]


def test_rows_beyond_the_tokenizer_are_never_drawn(model: Titans) -> None:
    written = list(Generation(model, [1], max_new_tokens=60, num_tokens=5, options=SamplingOptions(temperature=9.0)))
    assert max(written) < 5


def test_bad_requests_are_refused(model: Titans) -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        Generation(model, [1], max_new_tokens=-1)
    with pytest.raises(UserError, match="at least one token"):
        Generation(model, [], max_new_tokens=1)
    assert list(Generation(model, [1], max_new_tokens=0)) == []


def test_state_bytes_counts_whole_storages_once() -> None:
    x = torch.zeros(1000)
    assert state_bytes((x[:1], [x[5:9]], None, 3)) == 4000
    assert state_bytes((x, x.clone())) == 8000


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("variant", "length"),
    [
        *((v, 1024) for v in ("mac", "mag", "mal", "sliding_window", "rmt")),
        ("lmm", 4096),
        *((v, 1024) for v in ("gated_deltanet", "gated_deltanet_swa", "linear_attention")),
    ],
)
def test_tokens_far_past_the_training_length_need_constant_memory(
    variant: str, length: int, tmp_path: Path, tokenizer_file: Path
) -> None:
    """The tiny model's training length is 32. Of the tokens after it, the second half may need no more than the first."""
    folder = tmp_path / "export"
    small = dict(num_layers=1, dim=8, num_heads=1, hidden_dim=8, window=24, segment_len=24, num_persistent=2)
    tiny_export(folder, tokenizer_file, variant, **small)
    generation = Generation(load_export(folder).model, random_ids(32), max_new_tokens=length, seed=1, piece=16)
    process = psutil.Process()
    peaks, tensors, resident = [], [], []
    next(generation), next(generation)  # the first state still holds the arrays of the prompt's last piece
    live_tensors()  # its list of all objects takes tens of MiB where many packages are loaded: not for the first time below
    for half in (length // 2 - 2, length // 2):
        peaks.append(max(state_bytes(generation.state) for _ in itertools.islice(generation, half)))
        resident.append(process.memory_info().rss)
        tensors.append(live_tensors())
    assert generation.remaining == 0
    assert generation.state.position == 32 + length - 1
    assert peaks[0] == peaks[1]
    assert tensors[0] == tensors[1]
    # Other tests of this process leave pages that come and go; tests/inference/test_long.py asks for less over more tokens.
    assert resident[1] - resident[0] < 16 << 20


def test_only_the_transformer_grows(tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "export", tokenizer_file, "transformer")
    generation = Generation(load_export(tmp_path / "export").model, [1], max_new_tokens=101)
    next(generation)
    sizes = [state_bytes(generation.state) for _ in generation]
    per_token = 2 * 32 * 4 * 2  # keys and values of 32 fp32 channels in 2 layers
    assert sizes == [per_token * n for n in range(2, 102)]
