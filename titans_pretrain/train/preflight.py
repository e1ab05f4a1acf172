"""Are the machines fit to train together? What every rank says of itself, and what they compute together, compared.

Run by the launchers before the first step (`launch/preflight.py`), under the world of the run. Each check has one sentence for
what is wrong: the host, both values, what to change. Facts are gathered first and judged afterwards, so that each rank has
spoken before anyone is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import titans_pretrain
from titans_pretrain.config import Config, config_to_yaml
from titans_pretrain.model.cost import parameter_counts
from titans_pretrain.parallel.grid import Axis, Grid

PACKAGES = ("torch", "deepspeed", "numpy", "triton", "safetensors", "webdataset", "sentencepiece", "pyyaml", "psutil")
CLOCK_SECONDS = 2.0
"""Clocks may differ by this much: logs of ranks are read side by side."""
VISIBLE_SECONDS = 20.0
"""Time a shared file system may take to show a file to other nodes."""
_PRIME = 8191


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    ok: bool
    text: str
    hosts: tuple[str, ...] = ()
    """Hosts that are the reason, where not ok."""


def preflight(
    config: Config,
    grid: Grid,
    *,
    skip: Sequence[str] = (),
    min_bandwidth: float = 0.0,
    slow_factor: float = 3.0,
    megabytes: float = 16.0,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """All findings, the same on every rank. Collective; `grid` is laid out.

    Args:
        skip: names of checks to leave out.
        min_bandwidth: GB/s that an all-reduce must reach in every group. 0: only reported.
        slow_factor: a rank whose matmul takes this many times the median is called slow (on GPUs).
        megabytes: size of the all-reduce.
        clock: seconds since the epoch.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": lambda: _versions(config, grid),
        "devices": lambda: _devices(config, grid),
        "clock": lambda: _clock(grid, clock),
        "disk": lambda: _disk(config, grid),
        "run folder": lambda: _run_folder(config, grid),
        "data": lambda: _data(config, grid),
        "all-reduce": lambda: _collectives(grid, megabytes, min_bandwidth),
        "matmul": lambda: _matmul(grid, slow_factor),
    }
    unknown = sorted(set(skip) - set(checks))
    if unknown:
        raise ValueError(f"no check is called {', '.join(unknown)}; there are {', '.join(checks)}")
    return [finding for name, check in checks.items() if name not in skip for finding in check()]


def table(findings: Sequence[Finding]) -> str:
    """The report, a line each."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join(f"{'ok  ' if f.ok else 'BAD '} {f.check:<{width}}  {f.text}" for f in findings)


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """For RUN/preflight.json."""
    bad = sorted({host for finding in findings if not finding.ok for host in finding.hosts})
    return {"ok": all(f.ok for f in findings), "bad_hosts": bad, "findings": [asdict(f) for f in findings]}


# ------------------------------------------------------------------------------------------------------------- same facts


def _versions(config: Config, grid: Grid) -> Iterator[Finding]:
    """Code, packages, Python and config must be the same on every rank."""
    own = {
        "code": _hash_of_code(),
        "config": hashlib.sha256(config_to_yaml(config).encode()).hexdigest()[:12],
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    everyones = _by_host(grid, own)
    what = {
        "code": "start all ranks from one copy of the code",
        "config": "give all ranks the same config and overrides",
    }
    wrong = list(_differing(everyones, what, "install the same on all nodes"))
    yield from (Finding("versions", False, text, hosts) for text, hosts in wrong)
    if not wrong:
        yield Finding("versions", True, ", ".join(f"{key} {value}" for key, value in own.items() if value != "none"))


def _differing(
    everyones: Sequence[tuple[str, Mapping[str, Any]]], advice: Mapping[str, str], otherwise: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For every fact that is not the same on all ranks: a sentence, and the hosts of the rarer values."""
    for key in everyones[0][1]:
        values = Counter(facts[key] for _, facts in everyones)
        if len(values) == 1:
            continue
        usual = values.most_common(1)[0][0]
        for value in [value for value in values if value != usual]:
            hosts = tuple(sorted({host for host, facts in everyones if facts[key] == value}))
            yield f"{key} is {value} on {', '.join(hosts)}, {usual} elsewhere: {advice.get(key, otherwise)}", hosts


def _hash_of_code() -> str:
    root = Path(titans_pretrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _by_host(grid: Grid, value: Any) -> list[tuple[str, Any]]:
    return list(grid.gather_objects((socket.gethostname(), value)))


def _devices(config: Config, grid: Grid) -> Iterator[Finding]:
    """GPUs and network cards must be the same on every host, and be enough."""
    cuda = grid.device.type == "cuda"
    network = Path("/sys/class/net")
    own = {
        "GPUs": torch.cuda.device_count() if cuda else 0,
        "GPU": torch.cuda.get_device_name(grid.device) if cuda else "none",
        "InfiniBand ports": len(list(Path("/sys/class/infiniband").glob("*"))),
        "network cards": sum((card / "device").exists() for card in network.glob("*")) if network.exists() else 0,
    }
    everyones = _by_host(grid, own)
    wrong = list(_differing(everyones, {}, "take that node out, or mend it"))
    yield from (Finding("devices", False, text, hosts) for text, hosts in wrong)
    hosts = Counter(host for host, _ in everyones)
    uneven = len(set(hosts.values())) > 1
    if uneven:
        few = min(hosts, key=lambda host: hosts[host])
        usual = max(hosts.values())
        yield Finding(
            "devices", False, f"{few} has {hosts[few]} ranks, others {usual}: start as many on every node", (few,)
        )
    if grid.tensor.size > 1:
        ranks = [everyones[rank][0] for rank in grid.tensor.ranks]
        apart = any(grid.gather_numbers([len(set(ranks)) > 1])[:, 0])
        if apart:
            yield Finding(
                "devices",
                True,
                f"parallel.tensor={grid.tensor.size} spans hosts: tensor ranks talk in every layer, so keep it within a node",
            )
    if not wrong and not uneven:
        facts = ", ".join(f"{key} {value}" for key, value in own.items())
        yield Finding("devices", True, f"{len(hosts)} hosts x {next(iter(hosts.values()))} ranks; {facts}")


def _clock(grid: Grid, clock: Callable[[], float]) -> Iterator[Finding]:
    """All ranks read the time right after a barrier, several times; the least of a rank's differences is its own."""
    offsets = []
    hosts = [host for host, _ in _by_host(grid, None)]
    for _ in range(5):
        grid.barrier()
        times = [now for _, now in _by_host(grid, clock())]
        # Of two, nobody knows which is right: the first is taken to be.
        reference = statistics.median(times) if grid.world_size > 2 and len(set(hosts)) != 2 else times[0]
        offsets.append([now - reference for now in times])
    least = [min((round_[rank] for round_ in offsets), key=abs) for rank in range(grid.world_size)]
    far = {hosts[rank]: off for rank, off in enumerate(least) if abs(off) > CLOCK_SECONDS}
    for host, off in far.items():
        text = f"{host}'s clock is off by {off:+.1f} s, more than {CLOCK_SECONDS:g}: is NTP running there?"
        yield Finding("clock", False, text, (host,))
    if not far:
        yield Finding("clock", True, f"within {max(map(abs, least)):.3f} s")


def _disk(config: Config, grid: Grid) -> Iterator[Finding]:
    """Two checkpoints must fit: one is written before the oldest is deleted. fp32 weights and both moments, and bf16's."""
    vocab = config.model.vocab_size
    needed = 2 * 14 * parameter_counts(config.model)["total"] if vocab else 0
    free = shutil.disk_usage(config.run_dir).free if config.run_dir.exists() else 0
    everyones = _by_host(grid, free)
    host, least = min(everyones, key=lambda pair: pair[1])
    text = f"{least / 1e9:,.1f} GB free in {config.run_dir}"
    if least < needed:
        need = f"two checkpoints take {needed / 1e9:,.1f}: free some, or move the run with run.dir"
        yield Finding("disk", False, f"{text} on {host}, but {need}", (host,))
    else:
        yield Finding("disk", True, text)


def _run_folder(config: Config, grid: Grid) -> Iterator[Finding]:
    """Every host must see the same run folder: a file of rank 0's there, and rank 0 theirs."""
    run = config.run_dir
    word = grid.from_first(uuid.uuid4().hex)
    probe = run / f".preflight_{word}"
    if grid.is_first:
        try:
            run.mkdir(parents=True, exist_ok=True)
            probe.write_text(word)
        except OSError:
            pass
    grid.barrier()
    sees = _appears(probe, word)
    mine = run / f".preflight_{word}_{grid.rank}"
    try:
        mine.write_text(word)
        writes = True
    except OSError:
        writes = False
    everyones = _by_host(grid, (sees, writes))
    seen = (
        [_appears(run / f".preflight_{word}_{rank}", word) for rank in range(grid.world_size)] if grid.is_first else []
    )
    seen = grid.from_first(seen)
    for path in (mine, *([probe] if grid.is_first else [])):
        path.unlink(missing_ok=True)
    blind: dict[str, str] = {}
    for rank, (host, (rank_sees, rank_writes)) in enumerate(everyones):
        if not rank_sees:
            blind[host] = f"{host} does not see what {everyones[0][0]} writes to run folder {run}"
        elif not rank_writes:
            blind[host] = f"{host} cannot write to run folder {run}"
        elif not seen[rank]:
            blind[host] = f"{everyones[0][0]} does not see what {host} writes to run folder {run}"
    for host, text in blind.items():
        yield Finding("run folder", False, f"{text}: is it on a file system that all nodes share?", (host,))
    if not blind:
        yield Finding("run folder", True, f"{run} is one folder on all hosts")


def _appears(path: Path, word: str) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if path.read_text() == word:
                return True
        except OSError:
            pass
        # A folder that is not there will not come; a file may take a shared file system a while.
        if time.monotonic() > deadline or not path.parent.exists():
            return False
        time.sleep(0.2)


def _data(config: Config, grid: Grid) -> Iterator[Finding]:
    """Every host must read the same manifests."""
    from titans_pretrain.data.location import scheme_of
    from titans_pretrain.data.manifest import read_manifest
    from titans_pretrain.data.mixture import paths
    from titans_pretrain.errors import UserError

    local = (
        [path for path in paths(config.data) if not scheme_of(path)] if config.data.path or config.data.sources else []
    )
    found = {}
    for path in local:
        try:
            found[path] = hashlib.sha256(
                json.dumps(asdict(read_manifest(Path(path))), default=str).encode()
            ).hexdigest()[:12]
        except UserError as error:
            found[path] = str(error)
    everyones = _by_host(grid, found)
    wrong = list(_differing(everyones, {}, "mount or copy the same dataset on all nodes"))
    yield from (Finding("data", False, f"dataset {text}", hosts) for text, hosts in wrong)
    if not wrong:
        yield Finding(
            "data", True, ", ".join(f"{path} {digest}" for path, digest in found.items()) or "none that is local"
        )


# --------------------------------------------------------------------------------------------------- computing together


def _collectives(grid: Grid, megabytes: float, min_bandwidth: float) -> Iterator[Finding]:
    """All-reduce over every group of the layout: whole numbers whose sums are known, and the speed."""
    axes = {"all": Axis(grid.rank, tuple(range(grid.world_size)), dist.group.WORLD)}
    axes |= {name: getattr(grid, name) for name in ("data", "sequence", "tensor", "replica")}
    count = max(1, int(megabytes * 1e6 / 4))
    seen: set[tuple[int, ...]] = set()
    for name, axis in axes.items():
        sizes = grid.gather_objects(tuple(axis.ranks))
        if axis.size == 1 or (name != "all" and all(tuple(ranks) in seen for ranks in sizes)):
            continue
        seen.update(map(tuple, sizes))
        expected = torch.zeros(count, device=grid.device)
        for rank in axis.ranks:
            expected += _pattern(rank, count, grid.device)
        right, seconds = True, float("inf")
        for _ in range(3):
            x = _pattern(grid.rank, count, grid.device)
            grid.barrier()
            began = time.perf_counter()
            dist.all_reduce(x, group=axis.group)
            if grid.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - began)
            right = right and torch.equal(x, expected)
        bandwidth = 2 * (axis.size - 1) / axis.size * 4 * count / seconds / 1e9
        everyones = _by_host(grid, (right, bandwidth, grid.rank))
        wrong = [(host, rank) for host, (ok, _, rank) in everyones if not ok]
        if wrong:
            ranks, hosts = ", ".join(str(rank) for _, rank in wrong), sorted({host for host, _ in wrong})
            text = f"{name} ranks: rank {ranks} on {', '.join(hosts)} got a wrong sum"
            yield Finding("all-reduce", False, f"{text}: check the network card, cable or GPU there", tuple(hosts))
        host, (_, least, rank) = min(everyones, key=lambda pair: pair[1][1])
        text = f"{name} ranks, {axis.size} in a group: {least:.2f} GB/s at the slowest (rank {rank} on {host})"
        if least < min_bandwidth:
            yield Finding("all-reduce", False, f"{text}, below --min-bandwidth {min_bandwidth:g}", (host,))
        elif not wrong:
            yield Finding("all-reduce", True, text)
    if grid.world_size == 1:
        yield Finding("all-reduce", True, "one rank, nothing to reduce")


def _pattern(rank: int, count: int, device: torch.device) -> torch.Tensor:
    """Whole numbers below 8,191 in fp32, different for every rank; sums over 2,048 ranks are exact."""
    return ((torch.arange(count, device=device) * (2 * rank + 3) + rank) % _PRIME).float()


def _matmul(grid: Grid, slow_factor: float) -> Iterator[Finding]:
    """The same product on every rank: a wrong one has other bits than the rest, a slow one takes longer than the median."""
    cuda = grid.device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(grid.device, dtype) for _ in range(2))
    seconds = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    own = (seconds, hashlib.sha256(product.float().cpu().numpy().tobytes()).hexdigest()[:12], grid.rank)
    everyones = _by_host(grid, own)
    values = Counter(digest for _, (_, digest, _) in everyones)
    usual = values.most_common(1)[0][0]
    wrong = [(host, rank) for host, (_, digest, rank) in everyones if digest != usual]
    for host, rank in wrong:
        text = f"rank {rank} on {host} computes another product than {values[usual]} other ranks: check its processor"
        yield Finding("matmul", False, text, (host,))
    median = statistics.median(took for _, (took, _, _) in everyones)
    for host, (took, _, rank) in everyones:
        if cuda and took > slow_factor * median:
            text = f"rank {rank} on {host} takes {took * 1e3:.1f} ms for a matmul, the median rank {median * 1e3:.1f}"
            yield Finding("matmul", False, f"{text}: check its clocks and temperature", (host,))
    tflops = [2 * size**3 / took / 1e12 for _, (took, _, _) in everyones]
    if not wrong:
        yield Finding("matmul", True, f"{min(tflops):.3g} to {max(tflops):.3g} TFLOP/s, {os.cpu_count()} cores a host")
