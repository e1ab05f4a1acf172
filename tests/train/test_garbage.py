"""Python collects garbage at the same step on every rank, and at no other time between."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import tiny_tree
from titans_pretrain.train.garbage import Garbage


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.myself = self


def test_garbage_waits_for_its_step() -> None:
    garbage = Garbage(3)
    try:
        assert not gc.isenabled()
        ring = weakref.ref(Ring())
        for step in (1, 2):
            garbage.step(step)
            assert ring() is not None
        garbage.step(3)
        assert ring() is None
    finally:
        garbage.close()
    assert gc.isenabled()
    assert not gc.get_freeze_count()


def test_an_interval_of_0_leaves_python_alone() -> None:
    garbage = Garbage(0)
    ring = weakref.ref(Ring())
    garbage.step(0)
    assert gc.isenabled()
    assert ring() is not None
    garbage.close()
    assert gc.isenabled()


def collections_of(tree: dict[str, dict[str, Any]]) -> list[tuple[bool, int]]:
    """Train -> for each collection while Garbage rules, whether it was the one to make it, and the tensors it found."""
    made: list[tuple[bool, int]] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "stop" and gc.get_freeze_count():
            frame, names = sys._getframe(), set()
            while frame := frame.f_back:  # type: ignore[assignment]
                names.add(frame.f_code.co_qualname)
            made.append(("Garbage.step" in names, sum(isinstance(x, torch.Tensor) for x in gc.garbage)))
        gc.garbage.clear()

    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.callbacks.append(note)
    gc.set_threshold(20)  # Python alone would collect many times a step
    assert train_job(tree) is None
    return made


@pytest.mark.skipif(sys.version_info < (3, 11), reason="qualified names of frames")
@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_every_rank_collects_at_the_same_steps(variant: str, dataset: Path, tmp_path: Path) -> None:
    """And what waits for it are small things: a tensor in a cycle would take memory until then."""
    tree = tiny_tree(dataset, tmp_path, engine__gc_interval=4, model__variant=variant, run__stop_after=9)
    assert run_distributed(collections_of, 2, tree) == [[(True, 0)] * 2] * 2
