"""Which rank does what: three axes, data x sequence x tensor, tensor ranks next to each other.

The grid also carries what ranks tell each other outside the model: small sums, and errors. An error that only one rank
sees must end all of them, or the others wait for ever in their next collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from titans_pretrain.errors import UserError
from titans_pretrain.layout import Layout


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of the grid that this rank meets there: their other coordinates are its own."""

    rank: int = 0
    """This rank's place on the axis, 0 <= rank < size."""
    ranks: tuple[int, ...] = (0,)
    """Their global ranks, by place on the axis."""
    group: dist.ProcessGroup | None = None
    """For collectives among them; None only where the axis has one rank."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Grid:
    """This rank's place. Every method is collective: all ranks call it, in the same order.

    As built by `train.environment.join`, before the config is known, all ranks are on the data axis; `lay_out` gives the
    grid of a layout.
    """

    rank: int
    world_size: int
    device: torch.device
    started_by: str = ""
    """For the log: what started the ranks and where they meet."""
    data: Axis = Axis()
    """Ranks with the same slice of tokens and of parameters, and other rows."""
    sequence: Axis = Axis()
    """Ranks with the same rows and the same slice of parameters, and other tokens."""
    tensor: Axis = Axis()
    """Ranks with the same rows and tokens, and other slices of the parameters."""
    replica: Axis = Axis()
    """Data x sequence: all ranks with the same slice of the parameters. What DeepSpeed calls data parallel. Its group is
    there also where it has one rank."""

    def lay_out(self, layout: Layout) -> Grid:
        """The same ranks on the axes of `layout`, whose world size is this grid's."""
        assert layout.world_size == self.world_size
        tensor, sequence, data = range(layout.tensor), range(layout.sequence), range(layout.data)

        def rank_of(d: int, s: int, t: int) -> int:
            return (d * layout.sequence + s) * layout.tensor + t

        return dataclasses.replace(
            self,
            data=self._axis([[rank_of(d, s, t) for d in data] for s in sequence for t in tensor]),
            sequence=self._axis([[rank_of(d, s, t) for s in sequence] for d in data for t in tensor]),
            tensor=self._axis([[rank_of(d, s, t) for t in tensor] for d in data for s in sequence]),
            replica=self._axis([[rank_of(d, s, t) for d in data for s in sequence] for t in tensor], even_of_one=True),
        )

    def _axis(self, lines: Sequence[Sequence[int]], even_of_one: bool = False) -> Axis:
        """The line that holds this rank, of `lines` that together hold every rank once. `even_of_one`: a line of one rank
        has a group too."""
        mine = Axis()
        for ranks in lines:
            group = None
            if len(ranks) == self.world_size and (len(ranks) > 1 or even_of_one):
                group = dist.group.WORLD
            elif len(ranks) > 1 or even_of_one:
                group = dist.new_group(list(ranks))  # every rank makes every group, or the store's counters part
            if self.rank in ranks:
                mine = Axis(ranks.index(self.rank), tuple(ranks), group)
        return mine

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

    def distinct(self, rows: torch.Tensor) -> torch.Tensor:
        """Of `gather_numbers`' rows those that speak of different tokens: tensor ranks share theirs, so one of them counts."""
        return rows[:: self.tensor.size]

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


class ModelParallelUnit:
    """The grid as DeepSpeed asks for it (its `mpu`). Ranks that share a row are data-parallel to it: it then averages every
    gradient over all replicas in every ZeRO stage, while its own notion of sequence parallelism differs by stage."""

    def __init__(self, grid: Grid) -> None:
        self._tensor, self._replica = grid.tensor, grid.replica
        self._tensor_group = grid.tensor.group or dist.new_group([grid.rank], use_local_synchronization=True)

    def get_model_parallel_group(self) -> Any:
        return self._tensor_group

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_data_parallel_group(self) -> Any:
        return self._replica.group

    def get_data_parallel_world_size(self) -> int:
        return self._replica.size

    def get_data_parallel_rank(self) -> int:
        return self._replica.rank


class AgreedError(UserError):
    """A `UserError` that all ranks raise together, so one of them can say it for all."""
