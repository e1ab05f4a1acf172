"""What does a checkpoint hold of a parameter, whatever layout wrote it? Read parameter by parameter, in one process.

A run saves in DeepSpeed's own files, which is fast and bit-exact and welds the state to its layout: flat fp32 partitions of
weights and moments, one file a rank. This reader undoes that from the files' own tables of what lies where. Files are mapped
into memory, not loaded: the peak is what is asked for. A checkpoint may also be whole, one file per parameter with its
weight and moments (`tools/convert_checkpoint.py reshape`); both kinds are read alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from titans_pretrain.config import ModelConfig, config_from_dict
from titans_pretrain.model import Titans, weight_decay_applies
from titans_pretrain.parallel.split_table import part_of, rows_per_rank, split_dim, whole_of

DEEPSPEED_FOLDER = "deepspeed"
"""Sub-folder of a checkpoint with DeepSpeed's own files."""
WHOLE_FOLDER = "parameters"
"""Sub-folder of a whole checkpoint: NAME.safetensors of each parameter."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The fp32 master weight and AdamW's two moments."""
_PREFIX = "model."
"""What the module given to DeepSpeed puts before parameter names."""


class SavedState:
    """The training state in a checkpoint folder. A tied head is its embedding, as in `Titans.named_parameters`.

    Args:
        checkpoint: the folder; whole and undamaged (`checkpoint.find_damage`).
        manifest: as `checkpoint.read_manifest` gives it.
    """

    def __init__(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        layout = manifest["layout"]
        self.config: ModelConfig = config_from_dict(manifest["config"]).model
        with torch.device("meta"):
            skeleton = Titans(self.config)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in skeleton.named_parameters()}
        """Full shape of every parameter by name."""
        self.tied = sorted(skeleton.state_dict().keys() - self.shapes.keys())
        """Other names that parameters have in a state_dict."""
        self.tensor = layout["tensor"]
        """Tensor ranks that wrote it; 1 if whole."""
        self._files: list[_Whole] | list[_Stage0] | list[_Partitioned]
        if (checkpoint / WHOLE_FOLDER).is_dir():
            self._files = [_Whole(checkpoint / WHOLE_FOLDER)]
        elif layout["zero_stage"] == 0:
            order = sorted(self.shapes, key=lambda name: not weight_decay_applies(name))  # as the optimizer's groups
            self._files = [_Stage0(checkpoint / DEEPSPEED_FOLDER, rank, order) for rank in range(self.tensor)]
        else:
            stage, folder = layout["zero_stage"], checkpoint / DEEPSPEED_FOLDER
            self._files = [_Partitioned(folder, rank, stage) for rank in range(self.tensor)]

    @property
    def step(self) -> float:
        """Updates the optimizer has made, for its bias correction."""
        return self._files[0].step

    def whole(self, name: str, kind: str) -> Tensor:
        """The full fp32 tensor of a parameter. May be a view of the files: do not write to it.

        Args:
            kind: one of KINDS.
        """
        parts = [self._stored(name, kind, rank, 0, None) for rank in range(self.tensor)]
        return whole_of(name, parts, self.config.vocab_size).view(self.shapes[name])

    def slice_of(self, name: str, kind: str, rank: int, size: int, start: int = 0, count: int | None = None) -> Tensor:
        """What tensor rank `rank` of `size` has of a parameter, flat, from element `start` on -> fp32 [count].

        Reads no more than that where the checkpoint was written by as many tensor ranks.
        """
        if size == self.tensor:
            return self._stored(name, kind, rank, start, count).flatten()
        part = part_of(name, self.whole(name, kind), rank, size).flatten()
        return part[start:] if count is None else part[start : start + count]

    def _stored(self, name: str, kind: str, rank: int, start: int, count: int | None) -> Tensor:
        shape = self._part_shape(name)
        whole = start == 0 and count is None
        count = math.prod(shape) - start if count is None else count
        flat = self._files[rank].read(name, kind, start, count)
        return flat.view(shape) if whole else flat

    def _part_shape(self, name: str) -> list[int]:
        """What one of the ranks that wrote this had of a parameter."""
        shape, dim = list(self.shapes[name]), split_dim(name)
        if dim is not None:
            # Only the vocabulary is ever uneven.
            shape[dim] = rows_per_rank(shape[dim], self.tensor)
        return shape


class StoredWeights(Mapping[str, Tensor]):
    """The full fp32 weights in a checkpoint by name, read when asked for; a tied head under both of its names."""

    def __init__(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        self._saved = SavedState(checkpoint, manifest)
        self.shapes = self._saved.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.whole("embedding.weight" if name in self._saved.tied else name, "weight")

    def __iter__(self) -> Iterator[str]:
        return iter([*self._saved.shapes, *self._saved.tied])

    def __len__(self) -> int:
        return len(self._saved.shapes) + len(self._saved.tied)


class _Whole:
    """One file per parameter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cached_property
    def step(self) -> float:
        with safe_open(min(self._folder.glob("*.safetensors")), framework="pt") as file:
            return float(file.metadata()["step"])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        with safe_open(whole_file(self._folder, name), framework="pt") as file:
            return file.get_tensor(kind).flatten()[start : start + count]


def whole_file(folder: Path, name: str) -> Path:
    """Where a whole checkpoint keeps the parameter `name`."""
    return folder / f"{name}.safetensors"


class _Stage0:
    """Without ZeRO: one file with the module and torch's optimizer state, whose keys are places in its groups."""

    def __init__(self, folder: Path, tensor_rank: int, order: list[str]) -> None:
        self._path = folder / f"mp_rank_{tensor_rank:02d}_model_states.pt"
        self._index = {name: i for i, name in enumerate(order)}

    @functools.cached_property
    def _states(self) -> Any:
        return _load(self._path)

    @property
    def step(self) -> float:
        return float(self._states["optimizer"]["state"][0]["step"])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        if kind == "weight":
            stored = self._states["module"][_PREFIX + name]
        else:
            stored = self._states["optimizer"]["state"][self._index[name]][kind]
        return stored.detach().flatten()[start : start + count].float()


class _Piece(NamedTuple):
    """Consecutive elements of a parameter in one rank's flat partition."""

    rank: int
    group: int
    start: int
    length: int


class _Partitioned:
    """ZeRO 1 to 3: per rank and group one flat fp32 tensor, and two of its moments."""

    def __init__(self, folder: Path, tensor_rank: int, stage: int) -> None:
        ending = f"_mp_rank_{tensor_rank:02d}_optim_states.pt"
        # In bf16 the names begin with bf16_.
        by_rank = {
            int(p.name.removesuffix(ending).rpartition("_")[2]): p for p in folder.glob("*zero_pp_rank_*" + ending)
        }
        self._paths = [by_rank[rank] for rank in sorted(by_rank)]
        self._model_states = folder / f"zero_pp_rank_0_mp_rank_{tensor_rank:02d}_model_states.pt"
        self._stage = stage

    @functools.cached_property
    def _ranks(self) -> list[tuple[list[Tensor], dict[int, Any]]]:
        """Per rank: the flat weights by group, the optimizer state by group."""
        states = [_load(path)["optimizer_state_dict"] for path in self._paths]
        if self._stage == 3:
            return [(s["fp32_flat_groups"], s["optimizer_state_dict"]["state"]) for s in states]
        return [(s["single_partition_of_fp32_groups"], s["base_optimizer_state"]["state"]) for s in states]

    @functools.cached_property
    def _pieces(self) -> dict[str, list[_Piece]]:
        """Where each parameter lies, in the order of its elements."""
        return self._pieces_of_stage_3() if self._stage == 3 else self._pieces_of_stages_1_and_2()

    def _pieces_of_stages_1_and_2(self) -> dict[str, list[_Piece]]:
        """A group's parameters one after another, cut evenly over the ranks, who each wrote down what they have."""
        pieces: dict[str, list[_Piece]] = {}
        for rank, path in enumerate(self._paths):
            for group, table in enumerate(_load(path)["optimizer_state_dict"]["param_slice_mappings"]):
                for name, address in table.items():
                    pieces.setdefault(name.removeprefix(_PREFIX), []).append(
                        _Piece(rank, group, address.start, address.numel)
                    )
        return pieces

    def _pieces_of_stage_3(self) -> dict[str, list[_Piece]]:
        """Each parameter is cut evenly over the ranks; all put theirs at the same place, in the order of param_shapes."""
        pieces: dict[str, list[_Piece]] = {}
        sizes = [flat.numel() for flat in self._ranks[0][0]]
        group, start = 0, 0
        for shapes in _load(self._model_states)["param_shapes"]:
            for name, shape in shapes.items():
                count = -(-shape.numel() // len(self._paths))
                if start == sizes[group]:
                    group, start = group + 1, 0
                pieces[name.removeprefix(_PREFIX)] = [_Piece(r, group, start, count) for r in range(len(self._paths))]
                start += count
        return pieces

    @property
    def step(self) -> float:
        return float(self._ranks[0][1][0]["step"])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        found, first = [], 0
        for piece in self._pieces[name]:
            low, high = max(start - first, 0), min(start + count - first, piece.length)
            if low < high:
                weights, optimizer = self._ranks[piece.rank]
                flat = weights[piece.group] if kind == "weight" else optimizer[piece.group][kind]
                found.append(flat.detach()[piece.start + low : piece.start + high])
            first += piece.length
        return found[0] if len(found) == 1 else torch.cat(found)


def _load(path: Path) -> Any:
    from titans_pretrain.train import engine  # noqa: F401 - its classes are in the files; imported so that it does not compile

    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
