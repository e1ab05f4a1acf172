"""Is a gradient chunk that spans ranks the chunk of one process, and does it cost messages of the state's size only?"""

from __future__ import annotations

import torch.distributed as dist

from tests.distributed import run_distributed
from tests.memory.problem import make_problem
from tests.parallel.scans import Case, assert_equal, compare_scans, join_axis
from titans_pretrain.memory import MemoryOptions
from titans_pretrain.parallel.sequence import ShardedSequence


def cases(t: int, chunk: int) -> list[Case]:
    return [
        Case("chunk_scan", t, chunk),
        Case("chunk_scan", t, chunk, start=0, problem=dict(depth=3, norm=False)),
        Case("chunk_scan", t, chunk, start=0, problem=dict(depth=1, momentum=False)),
        Case("chunk_scan", t, chunk, start=0, problem=dict(forgetting=False, shared_gates=True)),
        Case("chunk_scan", t, chunk, toward="zero"),
        Case("chunk_scan", t, chunk, problem=dict(momentum=False, forgetting=False)),
        Case("chunk_scan", t, chunk, start=0, hard_gates=True),
    ]


def test_a_chunk_over_2_ranks_equals_one_process() -> None:
    asked = [*cases(5, 10), Case("chunk_scan", 6, 6, start=0), Case("chunk_scan", 3, 12), Case("chunk_scan", 1, 2)]
    assert_equal(asked, run_distributed(compare_scans, 2, asked))


def test_chunks_over_4_ranks_equal_one_process() -> None:
    """One chunk over all; two over a pair each; over three of four, so that the last chunk stays open."""
    asked = [*cases(5, 20), *cases(4, 8), Case("chunk_scan", 5, 15, start=0)]
    assert_equal(asked, run_distributed(compare_scans, 4, asked))


def test_what_is_sent_for_a_chunk_is_the_state_whatever_its_length() -> None:
    """Down the line W and S; to those of the next chunk who do not get it that way, its first weights. Back: gradients."""
    problem = make_problem(4, 2, batch=2, heads=4)
    weights = 2 * sum(w.numel() for w in problem.initial_weights) * 8  # 2 rows, float64
    one_chunk = [[2 * weights] * 3 + [0], [0] + [2 * weights] * 3]
    # Ranks 0, 1 and 2, 3: rank 1 also sends rank 3 the anchor of its chunk, and gets its gradient.
    two_chunks = [[2 * weights, 3 * weights, 2 * weights, 0], [0, 2 * weights, 2 * weights, 3 * weights]]
    for span, expected in ((4, one_chunk), (2, two_chunks)):
        for t in (4, 64):
            sent = run_distributed(bytes_of_a_scan, 4, t, span * t)
            assert [list(column) for column in zip(*sent, strict=True)] == expected


def bytes_of_a_scan(t: int, chunk: int) -> tuple[int, int]:
    """Bytes this rank sends in a forward and in its backward."""
    axis = join_axis()
    sent = [0]
    isend = dist.isend

    def counting(message, *args, **kwargs):  # type: ignore[no-untyped-def]
        sent[-1] += message.numel() * message.element_size()
        return isend(message, *args, **kwargs)

    dist.isend = counting
    problem = make_problem(t, 2, batch=2, heads=4).require_grad()
    sequence = ShardedSequence(axis, "chunk_scan")
    out, _ = sequence.memory_scan(*problem, None, MemoryOptions(chunk))
    sent.append(0)
    out.sum().backward()
    dist.barrier()
    return sent[0], sent[1]
