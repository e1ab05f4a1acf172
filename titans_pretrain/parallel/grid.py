"""Which rank does what: today one axis, data, which holds every rank.

The grid also carries what ranks tell each other outside the model: small sums, and errors. An error that only one rank
sees must end all of them, or the others wait for ever in their next collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from titans_pretrain.errors import UserError


@dataclass(frozen=True)
class Grid:
    """This rank's place. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    started_by: str = ""
    """For the log: what started the ranks and where they meet."""

    @property
    def data_rank(self) -> int:
        """This rank's place on the data axis, 0 <= data_rank < data_size."""
        return self.rank

    @property
    def data_size(self) -> int:
        """Ranks that read different rows of the batch."""
        return self.world_size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: console, metrics, manifests."""
        return self.rank == 0

    def gather_numbers(self, values: Sequence[float]) -> torch.Tensor:
        """Every rank's `values` (equally many on each) -> float64 [world_size, len(values)] on the CPU."""
        local = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(rows, local)
        return torch.stack(rows).cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def raise_agreed(self, error: UserError | None) -> None:
        """Raise on every rank when at least one rank brings an error; the lowest such rank's sentence is everyone's."""
        texts = self.gather_objects(None if error is None else str(error))
        for rank, text in enumerate(texts):
            if text is not None:
                where = "" if rank == 0 or texts[0] == text else f"rank {rank}: "
                raise AgreedError(where + text)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A block without collectives; a `UserError` on any rank inside it is raised on every rank at its end."""
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        self.raise_agreed(error)


class AgreedError(UserError):
    """A `UserError` that all ranks raise together, so one of them can say it for all."""
