"""Are the parameters that must be equal on several ranks still equal, bit for bit?

Replicas apply the same update to the same numbers, and tensor ranks hold whole copies of what is not split (norms,
persistent tokens). A rank that drifts, by a bad memory chip or a wrong collective, spoils the run without any error. The
check costs one pass over the parameters and a gather of two numbers for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.parallel.grid import AgreedError, Grid
from titans_pretrain.train.engine import Engine

_PIECE = 1 << 22
"""Elements summed at a time: the checksum needs 16 bytes for each."""


def check_copies(engine: Engine, grid: Grid, step: int, way_back: Callable[[], str]) -> None:
    """Compare checksums of all parameters across the ranks that must agree. Collective.

    Args:
        way_back: what the reader can do, asked for only if they differ.

    Raises:
        AgreedError: on every rank, naming the first parameter that differs and the ranks.
    """
    if grid.world_size == 1:
        return
    copies = list(engine.copies())
    own = torch.stack([checksum(held) for _, held, _, _ in copies])
    everyones = [torch.empty_like(own) for _ in range(grid.world_size)]
    dist.all_gather(everyones, own)
    table = torch.stack(everyones, dim=1).tolist()  # [parameters, ranks, 2]
    for (name, _, over_replicas, over_tensor), sums in zip(copies, table, strict=True):
        odd = odd_ones(sums, same_as(grid, over_replicas, over_tensor))
        if odd is not None:
            wrong, right = (", ".join(map(str, ranks)) for ranks in odd)
            raise AgreedError(
                f"parameter {name} is not the same at step {step} on ranks that must agree: rank {wrong} differs from rank "
                f"{right}; check the hardware of the odd one; {way_back()}"
            )


def checksum(x: Tensor) -> Tensor:
    """Two int64 sums over the bits of x, one weighed by place: equal for equal bits, and an exchange of two elements shows."""
    bits = x.detach().reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=x.device)
    for piece in bits.split(_PIECE):
        wide = piece.long()
        place = torch.arange(1, wide.numel() + 1, device=x.device)
        # The place in the whole would overflow no sooner: int64 sums wrap around, the same everywhere.
        sums = sums * 31 + torch.stack((wide.sum(), (wide * place).sum()))
    return sums


def same_as(grid: Grid, over_replicas: bool, over_tensor: bool) -> list[Hashable]:
    """For every rank a key; ranks with equal keys hold the same bits of a parameter."""
    return [
        (None if over_replicas else rank // grid.tensor.size, None if over_tensor else rank % grid.tensor.size)
        for rank in range(grid.world_size)
    ]


def odd_ones(sums: Sequence[Sequence[int]], keys: Sequence[Hashable]) -> tuple[list[int], list[int]] | None:
    """Of the first set of ranks with one key and several checksums: the ranks in the minority, and the others."""
    for key in dict.fromkeys(keys):
        ranks = [rank for rank, other in enumerate(keys) if other == key]
        found = Counter(tuple(sums[rank]) for rank in ranks)
        if len(found) > 1:
            usual = found.most_common(1)[0][0]
            wrong = [rank for rank in ranks if tuple(sums[rank]) != usual]
            return wrong, [rank for rank in ranks if rank not in wrong]
    return None
