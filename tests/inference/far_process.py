"""What do tokens far past the training length need? Run by test_generate.py in a process that holds nothing else: memory of a
process that has run hundreds of tests moves by tens of MiB for reasons of its own.

    python -m tests.inference.far_process FOLDER TOKENIZER VARIANT=TOKENS ...      prints one JSON object
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.inference.tiny import random_ids, tiny_export
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Generation
from titans_pretrain.model.titans import state_bytes

SMALL = dict(num_layers=1, dim=8, num_heads=1, hidden_dim=8, window=24, segment_len=24, num_persistent=2)


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def measure(folder: Path, tokenizer: Path, variant: str, length: int) -> dict[str, Any]:
    """Of either half of `length` tokens: the state's largest size, then live tensors and resident bytes."""
    tiny_export(folder, tokenizer, variant, **SMALL)
    generation = Generation(load_export(folder).model, random_ids(32), max_new_tokens=length, seed=1, piece=16)
    peaks, tensors, resident = [], [], []
    next(generation), next(generation)  # the first state still holds the arrays of the prompt's last piece
    for half in (length // 2 - 2, length // 2):
        peaks.append(max(state_bytes(generation.state) for _ in itertools.islice(generation, half)))
        tensors.append(live_tensors())
        resident.append(psutil.Process().memory_info().rss)
    return {
        "peaks": peaks,
        "tensors": tensors,
        "resident": resident,
        "remaining": generation.remaining,
        "position": generation.state.position,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = [word.split("=") for word in sys.argv[3:]]
    print(json.dumps({v: measure(Path(sys.argv[1]) / v, Path(sys.argv[2]), v, int(n)) for v, n in jobs}))
