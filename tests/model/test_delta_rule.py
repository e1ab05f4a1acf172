"""Is the gated delta rule by chunks that of the library's reference, for awkward lengths, documents, and hard inputs?"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.recurrences import (
    LENGTHS,
    assert_same,
    document_by_document,
    document_starts,
    in_pieces,
    outcome,
)
from titans_pretrain.model import delta_rule
from titans_pretrain.model.delta_rule import chunk_by_chunk, describe_path, gated_delta_rule, token_by_token

with warnings.catch_warnings():  # that there is no GPU
    warnings.simplefilter("ignore")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule


def problem(length: int, dtype: torch.dtype = torch.float32, width: int = 12) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log decay, beta of 2 rows and 3 heads, values wider than keys; and a state."""
    draw = torch.Generator().manual_seed(length)
    q, k = (F.normalize(torch.randn(2, length, 3, 8, generator=draw, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(2, length, 3, width, generator=draw, dtype=dtype)
    log_decay = -3 * torch.rand(2, length, 3, generator=draw, dtype=dtype) ** 2
    beta = torch.rand(2, length, 3, generator=draw, dtype=dtype)
    return [q, k, v, log_decay, beta], torch.randn(2, 3, 8, width, generator=draw, dtype=dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_reference_of_flash_linear_attention(length: int) -> None:
    per_token, state = problem(length)
    expected = outcome(reference, per_token, state)
    for scan in (gated_delta_rule, chunk_by_chunk, token_by_token):
        assert_same(outcome(scan, per_token, state), expected, 1e-5)


@pytest.mark.parametrize("cuts", [[100], [1, 2, 66], [64, 128], [63, 127, 190]])
def test_carried_over_a_cut_it_is_the_whole(cuts: list[int]) -> None:
    per_token, state = problem(200, torch.float64)
    expected = outcome(chunk_by_chunk, per_token, state)
    assert_same(outcome(in_pieces(gated_delta_rule, cuts), per_token, state), expected, 1e-12)


@pytest.mark.parametrize("length", [5, 64, 200])
def test_documents_begin_anew(length: int) -> None:
    per_token, state = problem(length, torch.float64)
    starts = document_starts(length)
    expected = outcome(document_by_document(token_by_token, starts), per_token, state)
    for scan in (chunk_by_chunk, token_by_token):
        assert_same(outcome(lambda *x, scan=scan: scan(*x, starts), per_token, state), expected, 1e-12)


def hard(kind: str) -> tuple[list[Tensor], Tensor]:
    (q, k, v, log_decay, beta), state = problem(200)
    if (
        kind == "one key written over and over"
    ):  # powers of the system's matrix reach 1e18 here, its inverse stays below 1
        k, beta, log_decay = k[:, :1].expand_as(k), torch.ones_like(beta), torch.zeros_like(log_decay)
    if kind == "everything forgotten at once":
        log_decay = log_decay * 1e4
    if kind == "now and then everything forgotten":
        log_decay = torch.where(
            torch.rand(log_decay.shape, generator=torch.Generator().manual_seed(0)) < 0.1, -1e3, -1e-4
        )
    if kind == "nothing written":
        beta = torch.zeros_like(beta)
    return [q, k, v, log_decay, beta], state


@pytest.mark.parametrize(
    "kind",
    [
        "one key written over and over",
        "everything forgotten at once",
        "now and then everything forgotten",
        "nothing written",
    ],
)
def test_hard_inputs_stay_exact(kind: str) -> None:
    """In fp32 against the token loop in float64."""
    per_token, state = hard(kind)
    expected = outcome(token_by_token, [x.double() for x in per_token], state.double())
    assert_same([x.double() for x in outcome(chunk_by_chunk, per_token, state)], expected, 1e-5)


def test_bf16_in_bf16_out_and_an_fp32_state() -> None:
    (q, k, v, log_decay, beta), state = problem(100)
    half = [x.bfloat16() for x in (q, k, v)]
    for scan in (chunk_by_chunk, token_by_token):
        out, after = scan(*half, log_decay, beta, state)
        assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
        expected, _ = scan(*(x.float() for x in half), log_decay, beta, state)
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------------------- the library


def test_the_library_is_called_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it runs, in place of its kernels, its own function of the same signature in torch."""
    calls: list[dict[str, Any]] = []

    def operator(*args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(chunk_gated_delta_rule).bind(*args, **kwargs).arguments)
        return naive_chunk_gated_delta_rule(*args, **kwargs)

    monkeypatch.setattr(delta_rule, "why_not_library", lambda *_: None)
    monkeypatch.setattr(delta_rule, "_library", lambda: operator)
    per_token, state = problem(100)
    found = outcome(gated_delta_rule, per_token, state)
    assert [list(call) for call in calls] == [["q", "k", "v", "g", "beta", "initial_state", "output_final_state"]]
    assert_same(found, outcome(chunk_by_chunk, per_token, state), 1e-5)


def test_what_runs_and_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    bf16 = torch.bfloat16
    assert describe_path(cpu, bf16, 64, False, False).startswith("torch, chunks of 64 tokens: ")
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert describe_path(gpu, bf16, 64, False, False) == "flash-linear-attention"
    told = {
        "engine.precision=bf16": (gpu, torch.float32, 64, False, False),
        "data.reset_at_documents": (gpu, bf16, 64, True, False),
        "up to 256 channels, not 512 (model.memory_heads)": (gpu, bf16, 512, False, False),
        "model.compile": (gpu, bf16, 64, False, True),
        "for GPUs, not cpu": (cpu, bf16, 64, False, False),
    }
    for words, arguments in told.items():
        assert words in describe_path(*arguments)
    capability = (9, 0)
    import triton

    for version, right in (("3.3.1", True), ("3.4.0", False), ("3.7.0+git1", False), ("3.7.1", True)):
        monkeypatch.setattr(triton, "__version__", version)
        assert ("Triton" not in describe_path(gpu, bf16, 64, False, False)) == right, version


@pytest.mark.parametrize(
    ("error", "words"), [(ImportError("no fla"), "not installed (no fla)"), (RuntimeError("x"), "cannot")]
)
def test_a_library_that_is_missing_or_refuses_to_load(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error

    delta_rule._library.cache_clear()
    monkeypatch.setattr(delta_rule.importlib, "import_module", fail)
    try:
        assert words in describe_path(torch.device("cuda"), torch.bfloat16, 64, False, False)
    finally:
        delta_rule._library.cache_clear()


def test_few_tokens_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(delta_rule, "chunk_by_chunk", lambda *x: lengths.append(x[0].shape[1]) or chunk_by_chunk(*x))
    for length in (1, delta_rule.FEW, delta_rule.FEW + 1):
        per_token, state = problem(length)
        gated_delta_rule(*per_token, state)
    assert lengths == [delta_rule.FEW + 1]
