"""What is an exported model? A folder with the weights, the resolved config and the tokenizer: written here, read here.

config.json         format and version, dtype of the weights, the whole resolved config of the run, facts of the training,
                    size and sha256 of the other two files
model.safetensors   every parameter by the name it has in `model.titans.Titans`, fp32 or bf16
tokenizer.model     the SentencePiece model
README.md           the same facts for people
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_pretrain.config import Config, config_from_dict, config_to_dict
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.errors import UserError
from titans_pretrain.inference.tokenizer import Tokenizer
from titans_pretrain.model.titans import Titans

FORMAT = "titans_pretrain export"
FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, CARD_NAME = (
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "README.md",
)
EXPORT_NAMES = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, CARD_NAME)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportInfo:
    """What config.json says besides the weights' own description."""

    config: Config
    """The run's config, sizes resolved."""
    dtype: str
    """fp32 or bf16: how the weights are stored."""
    training: dict[str, Any]
    """Step, tokens, fingerprints: see `write_export`."""


class Export(NamedTuple):
    """A loaded export."""

    model: Titans
    tokenizer: Tokenizer
    info: ExportInfo


# --------------------------------------------------------------------------------------------------------------- writing


def write_export(
    folder: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer_file: Path,
    training: dict[str, Any],
    dtype: str = "fp32",
) -> None:
    """Write the four files into the new folder `folder`.

    Args:
        config: of the run; `model.vocab_size` must be above 0. Sizes left to derive are stored derived, so an export keeps
            its meaning if a default changes.
        weights: full fp32 parameters by name; a tied matrix may come under both of its names and is stored once.
        training: JSON-ready facts, stored as they are.
        dtype: fp32 or bf16.

    Raises:
        UserError: the weights do not fit the config.
        OSError: the disk is full, or the folder exists.
    """
    model = config.model
    model = dataclasses.replace(
        model,
        hidden_dim=model.resolved_hidden_dim,
        memory_heads=model.resolved_memory_heads,
        memory_theta_max=model.resolved_theta_max,
    )
    config = dataclasses.replace(config, model=model)
    with torch.device("meta"):
        skeleton = Titans(model)
    wanted = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    tied = skeleton.state_dict().keys() - wanted.keys()
    weights = {name: w for name, w in weights.items() if name not in tied}
    _check_names_and_shapes({name: tuple(w.shape) for name, w in weights.items()}, wanted, "the checkpoint")
    folder.mkdir(parents=True)
    tensors = {name: w.detach().to(DTYPES[dtype]).contiguous() for name, w in weights.items()}
    try:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # its way of reporting a full disk
        raise OSError(f"writing {folder / WEIGHTS_NAME}: {error}") from error
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_NAME)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "parameters": sum(w.numel() for w in weights.values()),
        "training": training,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in (WEIGHTS_NAME, TOKENIZER_NAME)
        },
        "config": config_to_dict(config),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(_card(description), encoding="utf-8")


def _card(description: Mapping[str, Any]) -> str:
    model = description["config"]["model"]
    lines = [
        f"# Titans language model ({model['variant']}, {description['parameters'] / 1e6:.1f} M parameters)",
        "",
        f"A {model['variant']} model of {model['num_layers']} blocks, width {model['dim']}, vocabulary {model['vocab_size']},",
        f"pretrained with titans_pretrain; weights in {description['dtype']}. Architecture: arXiv 2501.00663.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in description["training"].items()),
        "",
        "Continue a text: `python tools/generate.py THIS_FOLDER --prompt TEXT`.",
        "From Python: `titans_pretrain.inference.export.load_export(THIS_FOLDER)`.",
        "",
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- reading


def load_export(path: str | Path, device: str | torch.device = "cpu", dtype: str = "") -> Export:
    """The model (evaluation mode, no gradients), tokenizer and info of an exported folder.

    Args:
        device: where the parameters go.
        dtype: fp32 or bf16, what the model computes in; "": as stored.

    Raises:
        UserError: a file is missing, damaged (size, sha256), of another format, or does not fit the config.
    """
    folder = Path(path)
    description = _read_description(folder)
    info = _check_description(folder, description)
    for name in (WEIGHTS_NAME, TOKENIZER_NAME):
        _check_file(folder / name, description["files"].get(name))
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    model_config = info.config.model
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces but model.vocab_size is {model_config.vocab_size}; "
            "they are not of the same model"
        )
    model = Titans(model_config).to(device=device, dtype=DTYPES[dtype or info.dtype])
    _read_weights(folder / WEIGHTS_NAME, model)
    return Export(model.eval().requires_grad_(False), tokenizer, info)


def read_info(path: str | Path) -> ExportInfo:
    """What config.json says, without reading the weights. Raises UserError as `load_export` does."""
    return _check_description(Path(path), _read_description(Path(path)))


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export of any version."""
    try:
        description = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and description.get("format") == FORMAT


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"there is no exported model at {folder}; make one with: python tools/convert_checkpoint.py export RUN {folder}"
        )
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        kind = (
            "a run folder"
            if (folder / "checkpoints").is_dir()
            else "a checkpoint"
            if (folder / "manifest.json").is_file()
            else ""
        )
        found = (
            f"is {kind}, not an exported model" if kind else f"holds no {CONFIG_NAME}, so it is not an exported model"
        )
        raise UserError(f"{folder} {found}; make one with: python tools/convert_checkpoint.py export RUN OUT")
    try:
        description = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config_file} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(
            f"{config_file} is not the config of a model exported by titans_pretrain (no format: {FORMAT!r})"
        )
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has export format version {version}, this program reads version {FORMAT_VERSION}; "
            "export again from the checkpoint, or use the program's version that wrote it"
        )
    return description


def _check_description(folder: Path, description: Mapping[str, Any]) -> ExportInfo:
    kinds = {"config": dict, "training": dict, "files": dict, "dtype": str}
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise UserError(f"{folder / CONFIG_NAME} is damaged: {key} is missing or of the wrong type; export again")
    tree = description["config"]
    if not all(isinstance(section, dict) for section in tree.values()):
        raise UserError(f"{folder / CONFIG_NAME} is damaged: a section of config is not a mapping; export again")
    try:
        config = config_from_dict(tree)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}") from error
    if config.model.vocab_size <= 0 or description["dtype"] not in DTYPES:
        raise UserError(
            f"{folder / CONFIG_NAME} is damaged: model.vocab_size is {config.model.vocab_size} and dtype is "
            f"{description['dtype']!r}; export again"
        )
    return ExportInfo(config, description["dtype"], description["training"])


def _check_file(path: Path, recorded: Any) -> None:
    """Size first: it is free, and tells an interrupted copy from flipped bytes."""
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it again or export again")
    expected = recorded if isinstance(recorded, dict) else {}
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise UserError(
            f"{path} has {size} bytes, {CONFIG_NAME} records {expected.get('bytes')}; copy it again or export again"
        )
    actual = sha256_of(path)
    if actual != expected.get("sha256"):
        raise UserError(
            f"{path} is damaged: its sha256 is {actual[:16]}..., {CONFIG_NAME} records {str(expected.get('sha256'))[:16]}...; "
            "copy it again or export again"
        )


def _read_weights(path: Path, model: Titans) -> None:
    """Copy the file's tensors into `model`, one at a time: the peak is one model and one tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
            parameters = dict(model.named_parameters())
            _check_names_and_shapes(found, {n: tuple(p.shape) for n, p in parameters.items()}, str(path))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}; copy it again or export again") from error


def _check_names_and_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has the unknown", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{where} {what} parameter {min(names)}{more}; its model section does not describe these weights"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(f"{where} has {name} of shape {list(found[name])}, its model section gives {list(shape)}")
