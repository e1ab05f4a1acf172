"""How does a file get onto the disk whole, with its checksum known: written, hashed on the way, and fsynced."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast


class HashingWriter(io.RawIOBase):
    """A file opened for writing that knows the SHA-256 of what it was given, so nothing is read back to checksum it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        # A buffered file takes everything or raises, unlike a raw one, which may write a part.
        count = self._file.write(data)
        self._hash.update(data)
        self._bytes += count
        return count

    def finish(self) -> dict[str, Any]:
        """Make the file durable and close it -> {"bytes", "sha256"}."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
        super().close()


class Pages(io.RawIOBase):
    """A file in memory, kept as it comes: nothing is moved when it grows."""

    def __init__(self, content: bytes = b"") -> None:
        self._pages = [content]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        page = bytes(data)
        self._pages.append(page)
        return len(page)

    def write_to(self, file: IO[bytes]) -> None:
        """Write all of it into `file`."""
        for page in self._pages:
            file.write(page)

    def drop(self) -> None:
        """Give the memory back."""
        self._pages.clear()


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> dict[str, Any]:
    """Write `path` durably through `write(file)` -> {"bytes", "sha256"}.

    Raises:
        OSError: also where torch.save turned the disk's error into a RuntimeError.
    """
    file = HashingWriter(path)
    try:
        write(cast(IO[bytes], file))
        return file.finish()
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, OSError) else OSError(f"writing {path.name}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            file.close()
