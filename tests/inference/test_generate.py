"""Does decoding from the state equal the parallel forward, stop where it should, and need no more memory with length?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("generate")

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


FAR = {variant: 4096 if variant == "lmm" else 512 for variant in VARIANTS if variant != "transformer"}


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("far")
    words = [f"{variant}={length}" for variant, length in FAR.items()]
    command = [sys.executable, "-m", "tests.inference.far_process", str(folder), str(tokenizer_file), *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", FAR)
def test_tokens_far_past_the_training_length_need_constant_memory(variant: str, far: dict[str, Any]) -> None:
    """The tiny model's training length is 32. Of the tokens after it, the second half may need no more than the first."""
    found = far[variant]
    assert found["remaining"] == 0
    assert found["position"] == 32 + FAR[variant] - 1
    assert found["peaks"][0] == found["peaks"][1]
    assert found["tensors"][0] == found["tensors"][1]
    # tests/inference/test_long.py asks for less over more tokens.
    assert found["resident"][1] - found["resident"][0] < 8 << 20


def test_only_the_transformer_grows(tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "export", tokenizer_file, "transformer")
    generation = Generation(load_export(tmp_path / "export").model, [1], max_new_tokens=101)
    next(generation)
    sizes = [state_bytes(generation.state) for _ in generation]
    per_token = 2 * 32 * 4 * 2  # keys and values of 32 fp32 channels in 2 layers
    assert sizes == [per_token * n for n in range(2, 102)]
