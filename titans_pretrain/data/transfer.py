"""How do the bytes of one remote file arrive here, whole, over HTTP, S3 or a command?

`transfer` writes into an open file, tries again with growing pauses where that may help, and goes on where a body broke
off if the server can. What arrived is checked by whoever asked for it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from titans_pretrain.data.location import shown
from titans_pretrain.errors import UserError

TRIES = 6
"""Attempts in a row without progress before a transfer is given up."""
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each later pause is twice as long, so about half a minute in all."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
PIECE = 1 << 20
"""Bytes moved at a time; an attempt that brings less is no progress."""


class TransferError(Exception):
    """A file could not be had. `lasting`: another attempt would end the same."""

    def __init__(self, text: str, lasting: bool = False):
        super().__init__(text)
        self.lasting = lasting


@dataclass
class Body:
    """An answer that is being read."""

    start: int
    """Byte of the file that it begins with: what was asked for, or 0 where the other side cannot continue."""
    total: int | None
    """Bytes of the whole file, if the other side says."""
    read: Callable[[int], bytes]


def transfer(url: str, file: BinaryIO, size: int | None = None) -> None:
    """Write the file at `url` (or the output of `pipe:COMMAND`) into `file`, an empty file opened for writing.

    Args:
        size: bytes it must have; None: as many as the other side says.

    Raises:
        TransferError: it was not to be had, after all attempts.
        OSError: `file` cannot be written.
    """
    failures, done = 0, 0
    while True:
        before = done
        try:
            done = _attempt(url, file, done, size)
            return
        except _Broken as broken:
            done = broken.done
            error = broken.cause
        failures = 1 if done - before >= PIECE else failures + 1
        if error.lasting or failures >= TRIES:
            raise error
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1) * random.uniform(0.7, 1.3))


class _Broken(Exception):
    """An attempt ended early, with `done` good bytes in the file."""

    def __init__(self, cause: TransferError, done: int):
        self.cause = cause
        self.done = done


def _attempt(url: str, file: BinaryIO, done: int, size: int | None) -> int:
    """Continue at byte `done` -> bytes of the whole file."""
    opener = {"pipe": _open_pipe, "s3": _open_s3}.get(url.split(":", 1)[0], _open_http)
    can_continue = opener is not _open_pipe
    try:
        with opener(url, done) as body:
            done = body.start
            file.seek(done)
            wanted = body.total if size is None else size
            if size is not None and body.total not in (None, size):
                raise TransferError(f"{shown(url)} has {body.total} bytes, not {size}", lasting=True)
            while True:
                try:
                    piece = body.read(PIECE)
                except OSError as error:  # of the connection; one of the file must not be taken for it
                    raise TransferError(f"{shown(url)}: {_text(error)}") from error
                if not piece:
                    break
                file.write(piece)
                done += len(piece)
                if size is not None and done > size:
                    raise TransferError(f"{shown(url)} has more than {size} bytes", lasting=True)
            if wanted is not None and done != wanted:
                raise TransferError(f"{shown(url)} ended after {done} of {wanted} bytes")
        return done
    except TransferError as error:
        raise _Broken(error, done if can_continue else 0) from error


# ------------------------------------------------------------------------------------------------------------ HTTP


@contextlib.contextmanager
def _open_http(url: str, start: int) -> Iterator[Body]:
    request = urllib.request.Request(url, headers={"User-Agent": "titans_pretrain", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            first, total = 0, _whole(answer.headers.get("Content-Length"))
            if answer.status == 206:
                span, _, whole = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
                first, total = _whole(span.split("-")[0]) or 0, _whole(whole)
                if first != start:
                    raise TransferError(
                        f"{shown(url)} answered with bytes from {first} when asked for those from {start}"
                    )
            yield Body(first, total, answer.read)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what we have: the file is another than when we began
            raise TransferError(f"{shown(url)} ended after {start} bytes", lasting=True) from error
        passing = error.code >= 500 or error.code in (408, 425, 429)
        raise TransferError(f"{shown(url)}: HTTP {error.code} {error.reason}", lasting=not passing) from error
    except urllib.error.URLError as error:
        raise TransferError(f"{shown(url)}: {_text(error.reason)}") from error
    except http.client.InvalidURL as error:
        raise TransferError(f"{shown(url)}: {error}", lasting=True) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise TransferError(f"{shown(url)}: {_text(error)}") from error


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _text(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# -------------------------------------------------------------------------------------------------------------- S3

_clients = threading.local()


@contextlib.contextmanager
def _open_s3(url: str, start: int) -> Iterator[Body]:
    try:
        import boto3
        import botocore.config
        import botocore.exceptions
        import urllib3.exceptions
    except ImportError:
        raise UserError(f"{url} needs boto3: pip install 'titans_pretrain[s3]'") from None
    bucket, _, key = url.removeprefix("s3://").partition("/")
    span = {"Range": f"bytes={start}-"} if start else {}
    try:
        if not hasattr(_clients, "s3"):
            # Each thread has a session of its own, for sessions are not safe to share. The attempts are counted here.
            settings = botocore.config.Config(
                connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"total_max_attempts": 1}
            )
            _clients.s3 = boto3.session.Session().client("s3", config=settings)
        answer = _clients.s3.get_object(Bucket=bucket, Key=key, **span)
        with contextlib.closing(answer["Body"]) as body:
            yield Body(start, start + answer["ContentLength"], body.read)
    except botocore.exceptions.ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        passing = status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout", "Throttling")
        text = error.response["Error"].get("Message", "")
        raise TransferError(f"{url}: {code} ({status}) {text}".rstrip(), lasting=not passing) from error
    except (
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.NoRegionError,
        botocore.exceptions.ParamValidationError,
        botocore.exceptions.ProfileNotFound,
    ) as error:
        raise TransferError(f"{url}: {' '.join(str(error).split())}", lasting=True) from error
    except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise TransferError(f"{url}: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------------------------ pipe


@contextlib.contextmanager
def _open_pipe(url: str, start: int) -> Iterator[Body]:
    command = url.removeprefix("pipe:")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            yield _CheckedPipe(command, process, errors).body()
        finally:
            # Also where the reader has had enough; a command that has ended does not mind.
            process.stdout.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _CheckedPipe:
    """Reads a command's output; its end counts only if the command ended well."""

    def __init__(self, command: str, process: subprocess.Popen[bytes], errors: Any):
        self.command, self.process, self.errors = command, process, errors

    def body(self) -> Body:
        return Body(0, None, self.read)

    def read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        piece = self.process.stdout.read(count)
        if piece:
            return piece
        status = self.process.wait()
        if status:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            last = f" ({said[-1].strip()[:200]})" if said else ""
            # 126, 127: the shell could not start it.
            raise TransferError(f"the command {self.command!r} {how}{last}", lasting=status in (126, 127))
        return b""
