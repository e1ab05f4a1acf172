"""How does a dataset that lies elsewhere come here: its manifest at once, its shards when they are needed or shortly before.

`RemoteFolder` is one remote location seen through the local cache. A background thread downloads what will be needed next.
"""

from __future__ import annotations

import io
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from titans_pretrain.config import DataConfig
from titans_pretrain.data.cache import PATIENCE, Cache, HeldFile, NoRoomError
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.location import scheme_of, shown, url_of
from titans_pretrain.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    parse_manifest,
    read_manifest,
)
from titans_pretrain.data.transfer import TransferError, transfer
from titans_pretrain.errors import UserError

FORGIVE = 300.0
"""Seconds after which a shard that could not be had is asked for again; until then its rows fail at once."""
_POLL = 0.2


class RemoteFolder:
    """The files of one remote dataset. Safe for threads."""

    def __init__(self, location: str, cache: Cache):
        self.location = location
        self.cache = cache
        self._lock = threading.Lock()
        self._failed: dict[str, tuple[float, str]] = {}
        self._wanted: list[ShardEntry] = []
        self._expected: set[str] = set()
        self._ahead: dict[str, tuple[HeldFile, int]] = {}
        self._thread: threading.Thread | None = None

    def url(self, name: str) -> str:
        return url_of(self.location, name)

    def shown(self, name: str) -> str:
        """The file's URL as a message may show it."""
        return shown(self.url(name))

    def manifest(self) -> Manifest:
        """The manifest as it is there now; never from the cache, so that a dataset built anew is noticed.

        Raises:
            UserError: it cannot be had, or is damaged.
        """
        for last in (False, True):
            content = io.BytesIO()
            try:
                transfer(self.url(MANIFEST_NAME), content)
                return parse_manifest(content.getvalue(), self.shown(MANIFEST_NAME))
            except TransferError as error:
                raise UserError(
                    f"cannot read the manifest of the dataset: {error}; set data.path to a folder written by "
                    "tokenizer/build_shards.py, wherever it was copied"
                ) from error
            except UserError:  # a command has no length to compare: damage may have come on the way
                if last:
                    raise
        raise AssertionError("not reached")

    def tokenizer(self, manifest: Manifest) -> HeldFile:
        """The tokenizer that made the shards.

        Raises:
            UserError: it cannot be had, or is another one.
        """
        url, sha256 = self.url(TOKENIZER_NAME), manifest.tokenizer_sha256
        try:
            held = self.cache.open(url, TOKENIZER_NAME, sha256, None)
            assert held is not None
            return held
        except TransferError as error:
            raise UserError(
                f"cannot get the tokenizer that made the shards: {error}; copy the dataset again"
            ) from error

    def open(self, entry: ShardEntry, patience: float = PATIENCE) -> HeldFile:
        """The shard's file, downloaded if need be.

        Args:
            patience: seconds to wait until others make room in the cache.

        Raises:
            DamageError: it cannot be had, or is not what the manifest says.
            NoRoomError: the cache is full of files in use.
            UserError: the cache cannot be written.
        """
        with self._lock:
            if entry.name in self._ahead:
                return self._ahead.pop(entry.name)[0]
            when, sentence = self._failed.get(entry.name, (0.0, ""))
            if sentence and time.monotonic() - when < FORGIVE:
                raise DamageError(sentence, self.shown(entry.name))
        url = self.url(entry.name)
        try:
            try:
                held = self.cache.open(url, entry.name, entry.sha256, entry.bytes, patience=0.0)
            except NoRoomError:
                with self._lock:
                    self._drop_ahead(set())  # what is needed now goes before what is needed later
                held = self.cache.open(url, entry.name, entry.sha256, entry.bytes, patience=patience)
        except TransferError as error:
            sentence = f"cannot get shard {entry.name}: {error}; copy the file there again or mend the way to it"
            with self._lock:
                self._failed[entry.name] = (time.monotonic(), sentence)
            raise DamageError(sentence, self.shown(entry.name)) from error
        assert held is not None
        return held

    def discard(self, entry: ShardEntry) -> None:
        """Forget the local copy of a shard, which was found damaged."""
        self.cache.discard(self.cache.path_of(self.url(entry.name), entry.name, entry.sha256))

    def expect(self, entries: Sequence[ShardEntry]) -> None:
        """Download these in the background, in this order, and keep them until they are opened or no longer expected."""
        with self._lock:
            self._expected = {entry.name for entry in entries}
            self._drop_ahead(self._expected)
            self._wanted = [entry for entry in entries if entry.name not in self._ahead]
            if self._wanted and self._thread is None:
                # The thread must not keep the folder alive: there is nobody to stop it.
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="prefetch", daemon=True)
                self._thread.start()

    def _drop_ahead(self, but: set[str]) -> None:
        for name in [name for name in self._ahead if name not in but]:
            self._ahead.pop(name)[0].close()

    def _fetch_next(self) -> float | None:
        """One shard of those wanted -> seconds until the next attempt; None when nothing is left."""
        with self._lock:
            if not self._wanted:
                self._thread = None
                return None
            entry = self._wanted.pop(0)
            # What lies ready stays below half the bound, or it could leave no room for what is needed first.
            ready = entry.bytes + sum(size for _, size in self._ahead.values())
        held, again = None, True
        try:
            if 2 * ready <= self.cache.limit:
                held = self.cache.open(self.url(entry.name), entry.name, entry.sha256, entry.bytes, wait=False)
                again = held is None  # another process brings it, or there is no room: the next one first
        except (TransferError, UserError):
            again = False  # whoever needs it will meet the error, and say it
        with self._lock:
            if entry.name not in self._expected:  # not any more
                return 0.0
            if held is not None:
                self._ahead[entry.name] = (held, entry.bytes)
            if again:
                self._wanted.append(entry)
        return _POLL if again else 0.0


def _run(folder: weakref.ref[RemoteFolder]) -> None:
    while True:
        alive = folder()
        pause = alive._fetch_next() if alive is not None else None
        del alive
        if pause is None:
            return
        time.sleep(pause)


def manifest_at(location: str) -> Manifest:
    """The manifest of a dataset, wherever it is.

    Raises:
        UserError: it cannot be had, or is damaged.
    """
    if not scheme_of(location):
        return read_manifest(Path(location))
    return RemoteFolder(location, Cache.of(DataConfig())).manifest()
