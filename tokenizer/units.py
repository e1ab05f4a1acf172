"""Which part of a build is done already? Encoded pieces of the input on disk, so that a killed build can go on.

A unit is the records of about `unit_bytes` of text, whichever files they lie in. It is encoded by any process at any
time and kept in a file of its own, `.NAME.units/unit-000012.npz` beside the dataset; what is built from the units in their
order therefore depends neither on who encoded them nor on how they were cut. `build.json` there says what decides their
content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.data.manifest import SPLITS
from titans_pretrain.errors import UserError
from tokenizer.documents import Tally
from tokenizer.encode import EncodedBatch, EncodedSplit
from tokenizer.read_text import Position, Record, Source, read_records, record_separator

_FORMAT = 1
_BUILD = "build.json"


class Unit(NamedTuple):
    """Records that are encoded together; `consumed` bytes were read for them and `end` is where the next unit begins."""

    number: int
    records: list[Record]
    consumed: int
    end: Position


def cut_units(
    sources: Sequence[Source], *, text_key: str, doc_sep: str, unit_bytes: int, first: int = 0, start: Position
) -> Iterator[Unit]:
    """The input from `start` on, which is where unit number `first` begins.

    Raises:
        UserError: as read_records.
    """
    records: list[Record] = []
    size = consumed = 0
    position = start
    for record, read in read_records(sources, text_key=text_key, doc_sep=doc_sep, start=start):
        if record.source != sources[position.source]:
            position = Position(sources.index(record.source, position.source))
        offset = 0
        if isinstance(record.payload, bytes):
            offset = position.offset + len(record.payload) + len(record_separator(record.source, doc_sep))
        position = Position(position.source, record.number, offset)
        records.append(record)
        size += len(record.payload or "")
        consumed += read
        if size >= unit_bytes:
            yield Unit(first, records, consumed, position)
            first, records, size, consumed = first + 1, [], 0, 0
    if records:
        yield Unit(first, records, consumed, position)


def unit_settings(sources: Sequence[Source], tokenizer_sha256: str, options: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what the units hold; `options` by their name on the command line."""
    inputs: dict[str, Any] = {}
    for source in sources:
        state = None if source.path == "-" else Path(source.path).stat()
        inputs[source.path] = [
            source.format,
            source.compression,
            *((state.st_size, state.st_mtime_ns) if state else ()),
        ]
    return {"format": _FORMAT, "tokenizer": tokenizer_sha256, "options": options, "inputs": inputs}


class UnitStore:
    """The units of one build. To be used under the lock that `atomic_directory(output)` holds.

    Args:
        output: the dataset directory that is being built.
        settings: of `unit_settings`.
        restart: throw away what an earlier build left, whatever it was.

    Raises:
        UserError: an unfinished build with other settings is there.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, restart: bool):
        self.directory = _directory(output)
        settings = json.loads(json.dumps(settings))
        self.done: set[int] = set()
        """Numbers of the units that an earlier build left."""
        if self.directory.exists() and (restart or "-" in settings["inputs"] or not self.found()):
            shutil.rmtree(self.directory)
        if self.directory.exists():
            if difference := self._difference(settings):
                raise UserError(
                    f"--output {output} has a build that did not finish, but {difference}: repeat the earlier command to "
                    "continue it, or add --restart to begin anew"
                )
            for left_over in self.directory.glob("*.tmp"):
                left_over.unlink()
            self.done = self.found()
            return
        self.directory.mkdir(parents=True)
        with atomic_file(self.directory / _BUILD) as file:
            file.write(json.dumps(settings).encode())

    def found(self) -> set[int]:
        """Numbers of the units that are there now."""
        names = (re.fullmatch(r"unit-(\d+)\.npz", path.name) for path in self.directory.iterdir())
        return {int(match[1]) for match in names if match}

    def _difference(self, settings: dict[str, Any]) -> str | None:
        """What is not as in the build that left this folder, in words."""
        try:
            before = json.loads((self.directory / _BUILD).read_bytes())
            if before["format"] != _FORMAT:
                return "an earlier version of this command began it"
            if before["tokenizer"] != settings["tokenizer"]:
                return "the content of --tokenizer has changed since"
            for name, value in settings["options"].items():
                if before["options"][name] != value:
                    return f"it began with {name} {before['options'][name]!r}, not {value!r}"
            old, new = before["inputs"], settings["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"its {_BUILD} is damaged"
        for name in old.keys() - new.keys():
            return f"input {name} was part of it and is not any more"
        for name in new.keys() - old.keys():
            return f"input {name} was not part of it"
        for name, state in new.items():
            if old[name] != state:
                return f"input {name} has changed since"
        return None if list(old) == list(new) else "the inputs were in another order"

    def resume_at(self) -> tuple[int, Position]:
        """The first unit that is missing, and where its records begin."""
        first = 0
        while first in self.done:
            first += 1
        return (first, self._end_of(first - 1)) if first else (0, Position())

    def load(self, number: int) -> tuple[EncodedBatch, int]:
        """A unit and the bytes of input that it came from.

        Raises:
            UserError: its file is damaged.
        """
        with self._opened(number) as content:
            record = json.loads(content["record"].tobytes())
            splits = {
                split: EncodedSplit(*(content[f"{split}.{field.name}"] for field in dataclasses.fields(EncodedSplit)))
                for split in SPLITS
            }
        return EncodedBatch(splits, Tally.of(record["tally"])), record["consumed"]

    def _end_of(self, number: int) -> Position:
        with self._opened(number) as content:
            return Position(*json.loads(content["record"].tobytes())["end"])

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[np.lib.npyio.NpzFile]:
        path = unit_path(self.directory, number)
        try:
            with np.load(path) as content:
                yield content
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{path} is damaged: add --restart to begin the build anew") from None

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def units_left(output: Path) -> bool:
    """Whether a build of `output` that did not finish can go on."""
    return _directory(output).exists()


def _directory(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(f".{output.name}.units")


def unit_path(directory: Path, number: int) -> Path:
    return directory / f"unit-{number:06d}.npz"


def save_unit(directory: Path, unit: Unit, batch: EncodedBatch) -> None:
    """Write an encoded unit; it is there whole or not at all.

    Raises:
        OSError: as the file system does.
    """
    record = {"end": unit.end, "consumed": unit.consumed, "tally": batch.tally.content()}
    arrays = {
        f"{split}.{field.name}": getattr(encoded, field.name)
        for split, encoded in batch.splits.items()
        for field in dataclasses.fields(EncodedSplit)
    }
    path = unit_path(directory, unit.number)
    # The process in the name: one that has not noticed yet that its build was killed must not write into ours.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, record=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
