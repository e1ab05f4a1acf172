"""How does what a model has read outlive the process? One safetensors file per reading: "read this book once, ask later".

The file holds the tensors of a `Reading` by the path they have in it, and as metadata its numbers, how many tokens were
read, whose state it is (a fingerprint of config and weights) and a digest of all that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.errors import UserError
from titans_pretrain.inference.generate import Reading
from titans_pretrain.memory import MemoryState
from titans_pretrain.model.attention import AttentionState
from titans_pretrain.model.blocks import HybridState, MACState
from titans_pretrain.model.neural_memory import MemoryLayerState
from titans_pretrain.model.recurrence import RecurrenceState, RecurrentHybridState
from titans_pretrain.model.rmt import RMTState
from titans_pretrain.model.rows import row_positions
from titans_pretrain.model.titans import ModelState, Titans

FORMAT = "titans_pretrain state"
FORMAT_VERSION = 1
SAMPLED = 4096
"""Numbers of each parameter that the fingerprint looks at."""

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Reading, ModelState, HybridState, MemoryLayerState, MemoryState, AttentionState, MACState),
        *(RecurrenceState, RecurrentHybridState, RMTState),
    )
}


@torch.no_grad()
def fingerprint(model: Titans) -> str:
    """Tells models apart by config, dtype and weights, of which SAMPLED numbers of each parameter are read: training changes
    them all. Hex, 32 digits; the same on every device."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(some))
    return digest.hexdigest()[:32]


def save_reading(path: str | Path, reading: Reading, model: Titans) -> int:
    """Write `reading` of `model` to the file `path`, whole or not at all -> bytes written.

    Raises:
        UserError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(reading, "", tensors)
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    facts = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": fingerprint(model),
        "variant": model.config.variant,
        "tokens": json.dumps(row_positions(reading.state)),
        "tree": json.dumps(tree),
    }
    content = save(tensors, {**facts, "sha256": _digest(facts, tensors)})
    try:
        with atomic_file(Path(path)) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"cannot write the state {path}: {error.strerror or error}") from error
    return len(content)


def load_reading(path: str | Path, model: Titans) -> Reading:
    """The reading in the file `path`, on the model's device.

    Raises:
        UserError: the file is missing, damaged, of another format, or of another model.
    """
    facts, tensors = _read(Path(path))
    mine = fingerprint(model)
    if facts["model"] != mine:
        raise UserError(
            f"{path} is the state of another model ({facts['variant']}, fingerprint {facts['model']}; this one is "
            f"{model.config.variant}, {mine}): weights, config or dtype differ; read the text again with this model"
        )
    device = model.embedding.weight.device
    try:
        reading = _unflatten(json.loads(facts["tree"]), {name: x.to(device) for name, x in tensors.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is a state this program cannot read: {error}") from error
    if not isinstance(reading, Reading):
        raise UserError(f"{path} holds a {type(reading).__name__}, not what a model has read")
    return reading


def tokens_read(path: str | Path) -> list[int]:
    """How many tokens each row of the state in a file has consumed. Raises UserError as `load_reading` does."""
    return json.loads(_read(Path(path))[0]["tokens"])


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(
            f"there is no state at {path}; write one with: python tools/generate.py OUT --save-state {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            if facts.get("format") != FORMAT:
                raise UserError(f"{path} is not a state written by titans_pretrain (no format: {FORMAT!r})")
            if facts.get("format_version") != str(FORMAT_VERSION):
                raise UserError(
                    f"{path} has state format version {facts.get('format_version')}, this program reads version "
                    f"{FORMAT_VERSION}; read the text again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}; copy it again or read the text again") from error
    recorded = facts.pop("sha256", "")
    if _digest(facts, tensors) != recorded:
        raise UserError(f"{path} is damaged: its content does not have the sha256 it records; copy it again")
    return facts, tensors


def _flatten(part: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`part` as JSON, its tensors by path in `tensors`."""
    if isinstance(part, Tensor):
        tensors[path] = part
        return {"tensor": path}
    if isinstance(part, tuple):
        names = getattr(part, "_fields", range(len(part)))
        items = [_flatten(x, f"{path}.{n}" if path else str(n), tensors) for n, x in zip(names, part, strict=True)]
        return {"kind": type(part).__name__, "items": items} if hasattr(part, "_fields") else items
    assert part is None or isinstance(part, int), type(part)
    return part


def _unflatten(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(part, list):
        return tuple(_unflatten(x, tensors) for x in part)
    if not isinstance(part, dict):
        return part
    if "tensor" in part:
        return tensors[part["tensor"]]
    return _KINDS[part["kind"]](*(_unflatten(x, tensors) for x in part["items"]))


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        digest.update(_bytes(x))
    return digest.hexdigest()


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).flatten().numpy().data if x.numel() else b""
