"""How does a run write its checkpoints: whole or not at all, and with the training standing still as briefly as may be?

A save begins by serialising this rank's state, which must not change meanwhile. With `checkpoint.background` that goes to host
memory and a thread writes, checksums and syncs it while training goes on; the ranks tell each other in every step's sums
whether they are done, and at the first step at which all are, the folder gets its manifest and its name. Collectives stay on
the main thread. Without, the same happens at once. A kill at any moment leaves an unfinished folder that the next start
removes, and the checkpoint before it.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import psutil
import safetensors.torch
import torch
from torch import Tensor

from titans_pretrain.config import Config, config_to_dict
from titans_pretrain.data.mixture import Sources
from titans_pretrain.errors import UserError
from titans_pretrain.model import Titans
from titans_pretrain.parallel.grid import AgreedError, Grid
from titans_pretrain.train.checkpoint import (
    FORMAT,
    LOGITS,
    TOKENIZER,
    UNFINISHED,
    Progress,
    commit,
    finished_folders,
    layout_of,
    prune,
    random_states,
)
from titans_pretrain.train.durable import Pages, write_file
from titans_pretrain.train.engine import Engine

Files = dict[str, dict[str, Any]]
"""Path relative to the checkpoint -> bytes and sha256."""


class SaveFailed(AgreedError):
    """A checkpoint could not be written; earlier ones are untouched."""


@dataclass
class _OnItsWay:
    progress: Progress
    folder: Path
    manifest: dict[str, Any]
    writing: Future[tuple[Files, OSError | None]]
    began: float
    stalled: float


class Saver:
    """Saves one run; at most one checkpoint is on its way. Every method but `is_written` is collective.

    Args:
        say: rank 0's log.
        record: (row of numbers) for the metrics.
        start_from: the checkpoint the run continues, if any.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        sources: Sources,
        engine: Engine,
        grid: Grid,
        say: Callable[[str], Any],
        record: Callable[[Mapping[str, float]], Any],
        start_from: Path | None,
    ) -> None:
        self._run_dir, self._config, self._sources = run_dir, config, sources
        self._engine, self._grid, self._say, self._record = engine, grid, say, record
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._on_its_way: _OnItsWay | None = None
        self.last: Path | None = start_from
        """The newest checkpoint that is whole."""
        self._background = config.checkpoint.background and self._host_has_room()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way; the same on all ranks."""
        return self._on_its_way is not None

    def is_written(self) -> bool:
        """Whether this rank's files of it are on disk, or failed to get there."""
        return self._on_its_way is not None and self._on_its_way.writing.done()

    def save(self, progress: Progress, data: Mapping[str, Any], prefix: Tensor, *, last: bool) -> None:
        """Begin a checkpoint, and finish it too unless it may be written in the background.

        Args:
            data: what the sequences so far were a function of (course.py), plain data.
            prefix: int64 [1, n] validation tokens whose logits are stored beside the weights.
            last: nothing is trained after it: its failure ends the run whatever checkpoint.on_full_disk says.

        Raises:
            SaveFailed: it could not be written, unless the config says to go on.
        """
        self.finish()
        try:
            began = time.perf_counter()
            background = self._background and not last
            folder = self._final(progress).with_name(self._final(progress).name + UNFINISHED)
            with self._all_or_nothing(progress):
                with self._grid.agreed():
                    if self._grid.is_first:
                        config = self._config.model
                        _prepare(folder, self._engine.state_bytes() + 4 * prefix.shape[1] * config.vocab_size)
                logits = self._engine.evaluate(_logits, prefix.to(self._grid.device))
                files, error, held = self._engine.save(folder, hold=background)
                own = self._own_files(folder, prefix, logits)
                writing = self._pool.submit(_write, folder, files, error, [*held, *own])
            manifest = self._manifest(progress, data)
            self._on_its_way = _OnItsWay(progress, folder, manifest, writing, began, time.perf_counter() - began)
            if not background:
                self._finish()
        except SaveFailed as error:
            self._tolerate(error, last)

    def finish(self) -> None:
        """Wait for the checkpoint on its way, if there is one, and publish it.

        Raises:
            SaveFailed: as `save`.
        """
        if self._on_its_way is not None:
            try:
                self._finish()
            except SaveFailed as error:
                self._tolerate(error, last=False)

    def close(self) -> None:
        """Not collective: let the thread end."""
        self._pool.shutdown(wait=True)

    def _finish(self) -> None:
        job, self._on_its_way = self._on_its_way, None
        assert job is not None
        final, grid, waited = self._final(job.progress), self._grid, time.perf_counter()
        with self._all_or_nothing(job.progress):
            files, error = job.writing.result()
            grid.raise_agreed(None if error is None else UserError(_reason(error)))
            merged = {name: entry for part in grid.gather_objects(files) for name, entry in part.items()}
            with grid.agreed():
                if grid.is_first:
                    try:
                        commit(job.folder, final, {**job.manifest, "files": dict(sorted(merged.items()))})
                    except OSError as raised:
                        raise UserError(_reason(raised)) from raised
        if grid.is_first:
            prune(self._run_dir, self._config.checkpoint.keep_last, self._config.checkpoint.keep_every)
        grid.barrier()
        self.last = final
        now = time.perf_counter()
        size, total, stalled = sum(e["bytes"] for e in merged.values()), now - job.began, job.stalled + now - waited
        self._record(
            {
                "checkpoint_step": job.progress.step,
                "checkpoint_bytes": size,
                "checkpoint_seconds": round(total, 3),
                "checkpoint_stall_seconds": round(stalled, 3),
            }
        )
        self._say(f"saved {final}: {size / 1e6:,.1f} MB in {total:.2f} s, {stalled:.2f} s of them without training")
        grace = self._config.faults.grace_seconds
        if 0 < grace < total:
            self._say(
                f"warning: this save took {total:.0f} s, but a preemption leaves faults.grace_seconds={grace:g}: what was "
                "trained since the checkpoint before would be lost; ask for more grace, or lower checkpoint.interval"
            )

    def _tolerate(self, error: SaveFailed, last: bool) -> None:
        if last or self._config.checkpoint.on_full_disk == "stop":
            raise error
        self._say(f"warning: {error}; going on without it (checkpoint.on_full_disk=warn)")

    def _final(self, progress: Progress) -> Path:
        return self._run_dir / "checkpoints" / f"step_{progress.step:08d}"

    @contextlib.contextmanager
    def _all_or_nothing(self, progress: Progress) -> Iterator[None]:
        final = self._final(progress)
        try:
            yield
        except AgreedError as error:
            if self._grid.is_first:
                shutil.rmtree(final.with_name(final.name + UNFINISHED), ignore_errors=True)
            older = len(finished_folders(final.parent))
            raise SaveFailed(
                f"cannot save checkpoint {final}: {error}; nothing of it is kept, "
                f"{older} earlier checkpoint{'s are' if older != 1 else ' is'} untouched; free space there, or lower "
                "checkpoint.keep_last, or move the run with run.dir"
            ) from error

    def _own_files(self, folder: Path, prefix: Tensor, logits: Tensor) -> list[tuple[Path, Pages]]:
        """What is saved beside DeepSpeed's files, serialised now."""
        states = Pages()
        torch.save(random_states(self._grid.device), cast(IO[bytes], states))
        files = [(folder / f"rank_{self._grid.rank}.pt", states)]
        if self._grid.is_first:
            tensors = {"tokens": prefix.cpu().contiguous(), "logits": logits.float().cpu().contiguous()}
            files.append((folder / LOGITS, Pages(safetensors.torch.save(tensors))))
            files.append((folder / TOKENIZER, Pages(self._sources.tokenizer_path.read_bytes())))
        return files

    def _manifest(self, progress: Progress, data: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **asdict(progress),
            "config": config_to_dict(self._config),
            "data": data,
            "dataset_fingerprint": self._sources.fingerprint,
            "tokenizer_sha256": self._sources.tokenizer_sha256,
            "layout": layout_of(self._config, self._grid),
        }

    def _host_has_room(self) -> bool:
        """Whether a checkpoint's bytes fit twice into the memory that is free now on every host. Says so where not."""
        grid = self._grid
        hosts = grid.gather_objects(socket.gethostname())
        here = self._engine.state_bytes() * hosts.count(socket.gethostname()) / grid.world_size
        free = psutil.virtual_memory().available
        if not grid.gather_numbers([2 * here > free]).any():
            return True
        self._say(
            f"checkpoint.background is not used: saving would hold {here / 1e9:.1f} GB in a host's memory, of which "
            f"{free / 1e9:.1f} GB are free"
        )
        return False


def _logits(model: Titans, tokens: Tensor) -> Tensor:
    return model.logits(model.hidden(tokens)[0])


def _write(
    folder: Path, files: Files, error: OSError | None, held: list[tuple[Path, Pages]]
) -> tuple[Files, OSError | None]:
    """Write what is held in memory -> all files of this rank, and the first error. Runs in the thread."""
    if error is None:
        try:
            for path, pages in held:
                files[str(path.relative_to(folder))] = write_file(path, pages.write_to)
                pages.drop()
        except OSError as raised:
            error = raised
    return files, error


def _prepare(folder: Path, needed: int) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(_reason(error)) from error
    needed += needed // 50 + (1 << 20)  # names, headers, padding
    if needed > free:
        raise UserError(f"it needs about {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
