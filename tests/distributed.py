"""How does a test run on several ranks: `run_distributed(fn, world_size, *args)` on gloo, a second per run.

Starting two processes that import torch and DeepSpeed takes ten seconds or more. So one server process imports them once
and forks the ranks of every run. `fn` is a plain function of a test module; what it returns must pickle.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_server: subprocess.Popen[bytes] | None = None
_ports = itertools.count(97 * os.getpid())


class RankFailed(AssertionError):
    """A rank raised, died or took too long; the text has its traceback and its output."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `fn(*args)` on `world_size` forked ranks with torchrun's environment variables set -> results by rank.

    Raises:
        RankFailed: with the traceback of the first rank that failed.
    """
    global _server
    if _server is None or _server.poll() is not None:
        _server = _start_server()
    # By name, not pickled: the ranks import the test module themselves.
    job = {
        "path": sys.path,
        "module": fn.__module__,
        "function": fn.__qualname__,
        "args": pickle.dumps(args),
        "world_size": world_size,
        "timeout": timeout,
    }
    try:
        _send(_server.stdin, job)
        outcome = _receive(_server.stdout)
    except BaseException:  # pytest-timeout, Ctrl-C: a late answer must not go to the next run
        _stop_server()
        raise
    if outcome["error"] is not None:
        raise RankFailed(outcome["error"])
    return [pickle.loads(result) for result in outcome["results"]]


def _start_server() -> subprocess.Popen[bytes]:
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    atexit.register(_stop_server)
    return server


def _stop_server() -> None:
    global _server
    if _server is not None:
        _server.kill()
        _server.wait()
        _server = None


def _send(stream: Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def _receive(stream: Any) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the other side has gone")
    return pickle.loads(stream.read(struct.unpack("<q", header)[0]))


# ------------------------------------------------------------------------------------------------------- the server's side


def _serve() -> None:
    _die_with_parent()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the ranks print must not mix with the answers
    _import_what_is_slow()
    while True:
        try:
            job = _receive(requests)
        except EOFError:
            return
        _send(answers, _run(job))


def _import_what_is_slow() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch._dynamo

    import titans_pretrain.train.loop  # noqa: F401

    # The first step of an optimizer imports more.
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    world_size = job["world_size"]
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        pids, pipes = [], []
        for rank in range(world_size):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _rank_main(job, rank, port, writer, Path(folder) / f"rank_{rank}.txt")
            os.close(writer)
            pids.append(pid)
            pipes.append(reader)
        try:
            return _collect(pipes, job["timeout"], Path(folder))
        finally:
            for pid, pipe in zip(pids, pipes, strict=True):
                os.close(pipe)
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still ours
                os.waitpid(pid, 0)


def _collect(pipes: list[int], timeout: float, folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    texts: dict[int, bytes] = dict.fromkeys(pipes, b"")
    waiting, results, errors = set(pipes), {}, {}
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            data = os.read(pipe, 1 << 16)
            texts[pipe] += data
            if data:
                continue
            waiting.discard(pipe)
            rank = pipes.index(pipe)
            if not texts[pipe]:
                errors[rank] = "the process died"
            else:
                succeeded, value = pickle.loads(texts[pipe])
                (results if succeeded else errors)[rank] = value
            if rank in errors:
                # The others now wait for this rank; a moment for one that failed for a reason of its own.
                deadline = min(deadline, time.monotonic() + 2.0)
    if not waiting and not errors:
        return {"error": None, "results": [results[rank] for rank in range(len(pipes))]}
    stuck = [pipes.index(pipe) for pipe in waiting]
    lines = [f"rank {rank} failed:\n{text}" for rank, text in errors.items()]
    ending = "when another failed" if errors else f"after {timeout:.0f} s"
    lines += [f"rank {rank} had not ended {ending}" for rank in sorted(stuck)]
    for rank in sorted({*errors, *stuck}):
        output = (folder / f"rank_{rank}.txt").read_text(errors="replace")[-4000:]
        lines.append(f"--- output of rank {rank} ---\n{output}")
    return {"error": "\n".join(lines), "results": []}


def _rank_main(job: dict[str, Any], rank: int, port: int, pipe: int, output: Path) -> None:
    """One rank, in its own process; never returns."""
    try:
        _die_with_parent()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["world_size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        sys.path[:] = job["path"]
        function: Any = importlib.import_module(job["module"])
        for part in job["function"].split("."):
            function = getattr(function, part)
        answer = (True, pickle.dumps(function(*pickle.loads(job["args"]))))
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(pipe, "wb") as stream:
        stream.write(pickle.dumps(answer))
    sys.stdout.flush()
    while answer[0]:  # until the server ends all: one that leaves early cuts off ranks that are still connecting to it
        signal.pause()
    os._exit(0)  # no exit handlers of the server; process groups may be in any state


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """One that no test beside this one can be given before the ranks use it: not of those the system gives to who asks for
    any, and from another place for every server."""
    while True:
        port = 10000 + next(_ports) % 20000
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    _serve()
