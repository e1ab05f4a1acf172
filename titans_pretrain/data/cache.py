"""Which remote files lie on this machine, and how do its processes share them?

A folder of whole, verified files. A file appears under its name only after its size and SHA-256 were found right, so a
process that is killed at any moment leaves nothing that could be taken for a file. Processes agree through file locks,
which the system releases when a process ends, however it ends:

    NAME        the file, NAME being a hash of URL and content and then the file's own name. Whoever reads it holds a
                shared lock on it; without that lock it may be evicted, the least recently opened first.
    NAME.lock   held while one process downloads the file; the others wait for it and then find it there.
    NAME.tmp.*  a download under way, of its full size from the start so that the bound counts it.
    .lock       held while somebody makes room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from titans_pretrain.config import DataConfig
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.data.location import shown
from titans_pretrain.data.transfer import TransferError, transfer
from titans_pretrain.errors import UserError

PATIENCE = 60.0
"""Seconds to wait until other processes let go of files, before a full cache is an error."""


class NoRoomError(UserError):
    """All that could be evicted is in use."""


class Cache:
    """The folder, bounded to `limit` bytes. Safe for threads and for processes of one machine.

    Args:
        directory: created when the first file arrives.
        limit: bytes, of files and of downloads under way.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory = directory
        self.limit = limit

    @classmethod
    def of(cls, config: DataConfig) -> Cache:
        """As `data.cache_dir` and `data.cache_gib` say."""
        directory = (
            Path(config.cache_dir)
            if config.cache_dir
            else Path(tempfile.gettempdir()) / f"titans_pretrain-{os.getuid()}"
        )
        return cls(directory, int(config.cache_gib * 2**30))

    def path_of(self, url: str, name: str, sha256: str) -> Path:
        """Where the file of this content from `url` lies, if it is here."""
        return self.directory / f"{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}-{name}"

    def open(
        self, url: str, name: str, sha256: str, size: int | None, *, wait: bool = True, patience: float = PATIENCE
    ) -> HeldFile | None:
        """The file at `url`, downloaded if it is not here; it stays until closed.

        Args:
            sha256, size: what it must be; size None: not known.
            wait: False: None where another process is downloading it or there is no room now.
            patience: seconds to wait for room.

        Raises:
            TransferError: it cannot be had, or is not what it must be.
            NoRoomError: what lies in the folder is in use.
            UserError: the folder cannot be written, or its disk or the bound is full.
        """
        path = self.path_of(url, name, sha256)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            while True:
                held = self._open_here(path, size)
                if held is not None:
                    return held
                with _lock(path.with_name(path.name + ".lock"), wait) as mine:
                    if not mine:
                        return None
                    if not self._is_here(path, size):
                        self._download(url, path, sha256, size, patience if wait else 0.0)
        except NoRoomError:
            if wait:
                raise
            return None
        except OSError as error:
            free = ""
            with contextlib.suppress(OSError):
                room = os.statvfs(self.directory)
                free = f"; its disk has {room.f_bavail * room.f_frsize / 2**30:.2f} GiB left"
            raise UserError(
                f"cannot keep {shown(url)} in the cache {self.directory}: {error.strerror}{free}; set data.cache_dir to a "
                "folder with room, or data.cache_gib to what its disk can hold"
            ) from error

    def discard(self, path: Path) -> None:
        """Drop a file that was found damaged."""
        path.unlink(missing_ok=True)

    def _is_here(self, path: Path, size: int | None) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return size in (None, path.stat().st_size)
        return False

    def _open_here(self, path: Path, size: int | None) -> HeldFile | None:
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                state = os.fstat(descriptor)
                if state.st_nlink and size in (None, state.st_size):
                    # The order of eviction: access times are often switched off, and the system's own clock has steps of
                    # milliseconds.
                    now = time.time_ns()
                    os.utime(descriptor, ns=(now, now))
                    held = HeldFile(path, descriptor)
                    descriptor = -1
                    return held
                if state.st_nlink:  # not of its size: something else cut or wrote it
                    path.unlink(missing_ok=True)
                    return None
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            # Evicted between opening and locking.

    def _download(self, url: str, path: Path, sha256: str, size: int | None, patience: float) -> None:
        """Bring the file; its lock is held."""
        deadline = time.monotonic() + patience
        while True:
            try:
                temporary = self._reserve(path, size or 0)
                break
            except NoRoomError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)
        try:
            for last in (False, True):  # a wrong byte may come from the way here: once more from the start
                with open(temporary, "r+b") as file:
                    transfer(url, file, size)
                    file.truncate(file.tell())
                    os.fsync(file.fileno())
                actual = sha256_of(temporary)
                if actual == sha256:
                    break
                if last:
                    raise TransferError(f"{shown(url)} arrived twice with SHA-256 {actual}, not {sha256}", lasting=True)
            # Not while somebody adds up what is here: it could miss the file under both names.
            with _lock(self.directory / ".lock", wait=True, keep=True):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, path: Path, size: int) -> Path:
        """An empty temporary file that counts as `size` bytes, after making room for it."""
        with _lock(self.directory / ".lock", wait=True, keep=True):
            self._make_room(size, path)
            # The random part matters where containers share a folder and all have process number 1.
            temporary = path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if size:
                    _allocate(descriptor, size)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        return temporary

    def _make_room(self, size: int, wanted: Path) -> None:
        """Evict until `size` more bytes are within the limit. The folder's lock and that of `wanted` are held.

        Raises:
            NoRoomError: what is left is in use.
        """
        files: list[tuple[int, int, Path]] = []
        for item in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                if item.name.endswith(".lock") or not item.is_file(follow_symlinks=False):
                    continue
                name, is_temporary, _ = item.name.partition(".tmp.")
                if is_temporary and self._is_left_over(self.directory / name, wanted):
                    os.unlink(item.path)
                    continue
                state = item.stat()
                files.append((time.time_ns() if is_temporary else state.st_mtime_ns, state.st_size, Path(item.path)))
        total = sum(size for _, size, _ in files)
        for _, bytes_, path in sorted(files):
            if total + size <= self.limit:
                return
            if ".tmp." not in path.name and _unlink_unless_in_use(path):
                total -= bytes_
        if total + size > self.limit:
            raise NoRoomError(
                f"the cache {self.directory} has {total / 2**30:.3g} GiB in use and cannot take the {size / 2**30:.3g} GiB of "
                f"{wanted.name[17:]}: raise data.cache_gib ({self.limit / 2**30:.3g}); a shuffle window and the next, of 16 "
                "shards each, should fit"
            )

    def _is_left_over(self, final: Path, wanted: Path) -> bool:
        """Whether the process that made a temporary file of `final` is gone."""
        if final == wanted:
            return True
        with _lock(final.with_name(final.name + ".lock"), wait=False) as mine:
            return mine


class HeldFile:
    """A file of the cache that cannot be evicted until it is closed. `descriptor`: for reading, closed with it."""

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self.descriptor = descriptor
        self._close_once = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        with self._close_once:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1


@contextlib.contextmanager
def _lock(path: Path, wait: bool, keep: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`, or yield False where it is held and `wait` is False. `keep`: leave the file there."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # Its last holder may have removed it while we waited.
            if os.fstat(descriptor).st_nlink == 0:
                continue
            try:
                yield True
            finally:
                if not keep:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _unlink_unless_in_use(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for writing: NFS grants exclusive locks only then
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
    return True


def _allocate(descriptor: int, size: int) -> None:
    """Take `size` bytes of the disk now, or at least say so where the file system cannot."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)
