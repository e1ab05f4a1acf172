"""What the tests of split models share: this rank's axis, and a run of a model whose numbers are compared."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from titans_pretrain.layout import Layout
from titans_pretrain.parallel import Grid
from titans_pretrain.parallel.grid import Axis


def tensor_axis(data: int = 1) -> Axis:
    """The tensor axis of this rank, the ranks being data x tensor. Called once in a process."""
    dist.init_process_group("gloo")
    world_size = int(os.environ["WORLD_SIZE"])
    grid = Grid(int(os.environ["RANK"]), world_size, torch.device("cpu"))
    return grid.lay_out(Layout(data, 1, world_size // data)).tensor


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
