"""What is an exported model? A folder with the weights, the resolved config and the tokenizer: written here, read here.

titans_export.json   format and version, dtype of the weights, the whole resolved config of the run, facts of the training,
                     size and sha256 of every other file
config.json, generation_config.json, *.py
                     what transformers loads: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
model.safetensors    every parameter, `model.` before the name it has in `model.titans.Titans`, fp32 or bf16; above a size in
                     several files, with model.safetensors.index.json
tokenizer.model      the SentencePiece model; tokenizer.json and tokenizer_config.json: the same for AutoTokenizer
README.md            the facts for people
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_pretrain.config import Config, ModelConfig, config_from_dict, config_to_dict
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.inference.huggingface.files import generation_config, tokenizer_files, transformers_config
from titans_pretrain.inference.huggingface.flatten import modelling_files
from titans_pretrain.model.titans import Titans

FORMAT = "titans_pretrain export"
FORMAT_VERSION = 2
DESCRIPTION_NAME, TOKENIZER_NAME, CARD_NAME = "titans_export.json", "tokenizer.model", "README.md"
CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME = "config.json", "generation_config.json", "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EXPORT_NAMES = (
    *(DESCRIPTION_NAME, TOKENIZER_NAME, CARD_NAME, CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME, INDEX_NAME),
    *("tokenizer.json", "tokenizer_config.json"),
)
"""Besides the modelling code and the parts of large weights."""
PREFIX = "model."
"""Before every parameter's name: what transformers' class calls its `Titans`."""
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportInfo:
    """What titans_export.json says besides the weights' own description."""

    config: Config
    """The run's config, sizes resolved."""
    dtype: str
    """fp32 or bf16: how the weights are stored."""
    training: dict[str, Any]
    """Step, tokens, fingerprints: see `write_export`."""
    weights: list[str]
    """Names of the weights' files."""


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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the new folder `folder`.

    Args:
        config: of the run; `model.vocab_size` must be above 0. Sizes left to derive are stored derived, so an export keeps
            its meaning if a default changes.
        weights: full fp32 parameters by name, asked for one after another and not kept; a tied matrix may come under both
            of its names and is stored once.
        training: JSON-ready facts, stored as they are.
        dtype: fp32 or bf16.
        max_shard_bytes: of a weights file; a larger parameter has a file of its own.

    Raises:
        UserError: the weights do not fit the config.
        OSError: the disk is full, or the folder exists.
    """
    model = config.model.resolved()
    config = dataclasses.replace(config, model=model)
    with torch.device("meta"):
        skeleton = Titans(model)
    wanted = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    tied = skeleton.state_dict().keys() - wanted.keys()
    names = [name for name in weights if name not in tied]
    _check_names_and_shapes({name: tuple(weights[name].shape) for name in names}, wanted, "the checkpoint")
    folder.mkdir(parents=True)
    _write_weights(folder, wanted, weights, DTYPES[dtype], max_shard_bytes)
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_NAME)
    tokenizer = Tokenizer(tokenizer_file)
    texts = {
        CONFIG_NAME: json_text(transformers_config(config, tokenizer, dtype)),
        GENERATION_NAME: json_text(generation_config(tokenizer)),
        **modelling_files(),
        **tokenizer_files(tokenizer_file),
        CARD_NAME: _card(config.model, sum(map(math.prod, wanted.values())), dtype, training),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "parameters": sum(map(math.prod, wanted.values())),
        "training": training,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
        },
        "config": config_to_dict(config),
    }
    (folder / DESCRIPTION_NAME).write_text(json_text(description), encoding="utf-8")


def json_text(value: Any) -> str:
    """As the JSON files of an export are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int
) -> None:
    """Parameters in files of up to `limit` bytes. At most one file's tensors are in memory."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    count = len(groups)
    files = [WEIGHTS_NAME] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(files, groups, strict=True):
        tensors = {PREFIX + name: weights[name].detach().to(dtype).contiguous() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its way of reporting a full disk
            raise OSError(f"writing {folder / file}: {error}") from error
    if count > 1:
        places = {PREFIX + name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = sum(map(math.prod, shapes.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json_text(index), encoding="utf-8")


def _card(model: ModelConfig, parameters: int, dtype: str, training: Mapping[str, Any]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [titans]",
        "---",
        "",
        f"# Titans language model ({model.variant}, {parameters / 1e6:.1f} M parameters)",
        "",
        f"A {model.variant} model of {model.num_layers} blocks, width {model.dim}, vocabulary {model.vocab_size},",
        f"pretrained with titans_pretrain; weights in {dtype}. Architecture: arXiv 2501.00663.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in training.items() if not isinstance(value, dict)),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
        "",
        "Needs torch and transformers; the model's code is in this folder. Its cache is the memory's state, whose size does",
        "not depend on the length of the text (except for the variant `transformer`). With the package itself:",
        "`python tools/generate.py THIS_FOLDER --prompt TEXT`, or `titans_pretrain.inference.export.load_export`.",
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
    info = load_info(folder)
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    model_config = info.config.model
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces but model.vocab_size is {model_config.vocab_size}; "
            "they are not of the same model"
        )
    model = Titans(model_config).to(device=device, dtype=DTYPES[dtype or info.dtype])
    _read_weights(folder, info.weights, model)
    return Export(model.eval().requires_grad_(False), tokenizer, info)


def read_info(path: str | Path) -> ExportInfo:
    """What titans_export.json says, without reading the weights. Raises UserError as `load_export` does."""
    return _check_description(Path(path), _read_description(Path(path)))


def load_info(path: str | Path) -> ExportInfo:
    """`read_info`, once every file has the size and checksum it was written with.

    Raises:
        UserError: as `load_export` does, naming the file.
    """
    folder = Path(path)
    description = _read_description(folder)
    info = _check_description(folder, description)
    for name, recorded in description["files"].items():
        _check_file(folder / name, recorded)
    return info


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export of any version."""
    return any(_read_json(folder / name).get("format") == FORMAT for name in (DESCRIPTION_NAME, CONFIG_NAME))


def _read_json(path: Path) -> dict[str, Any]:
    """{} for a file that is not there or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"there is no exported model at {folder}; make one with: python tools/convert_checkpoint.py export RUN {folder}"
        )
    file = folder / DESCRIPTION_NAME
    if not file.is_file():
        old = _read_json(folder / CONFIG_NAME)
        if old.get("format") == FORMAT:
            raise UserError(_other_version(folder, old.get("format_version")))
        kind = (
            "a run folder"
            if (folder / "checkpoints").is_dir()
            else "a checkpoint"
            if (folder / "manifest.json").is_file()
            else ""
        )
        found = f"is {kind}, not an exported model" if kind else f"holds no {file.name}, so it is not an exported model"
        raise UserError(f"{folder} {found}; make one with: python tools/convert_checkpoint.py export RUN OUT")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file} is not of a model exported by titans_pretrain (no format: {FORMAT!r})")
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(_other_version(folder, description.get("format_version")))
    return description


def _other_version(folder: Path, version: Any) -> str:
    return (
        f"{folder} has export format version {version}, this program reads version {FORMAT_VERSION}; "
        "export again from the checkpoint, or use the program's version that wrote it"
    )


def _check_description(folder: Path, description: Mapping[str, Any]) -> ExportInfo:
    kinds = {"config": dict, "training": dict, "files": dict, "dtype": str}
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise UserError(
                f"{folder / DESCRIPTION_NAME} is damaged: {key} is missing or of the wrong type; export again"
            )
    tree = description["config"]
    if not all(isinstance(section, dict) for section in tree.values()):
        raise UserError(f"{folder / DESCRIPTION_NAME} is damaged: a section of config is not a mapping; export again")
    try:
        config = config_from_dict(tree)
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION_NAME}: {error}") from error
    if config.model.vocab_size <= 0 or description["dtype"] not in DTYPES:
        raise UserError(
            f"{folder / DESCRIPTION_NAME} is damaged: model.vocab_size is {config.model.vocab_size} and dtype is "
            f"{description['dtype']!r}; export again"
        )
    weights = sorted(name for name in description["files"] if name.endswith(".safetensors"))
    return ExportInfo(config, description["dtype"], description["training"], weights)


def _check_file(path: Path, recorded: Any) -> None:
    """Size first: it is free, and tells an interrupted copy from flipped bytes."""
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it again or export again")
    expected = recorded if isinstance(recorded, dict) else {}
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise UserError(
            f"{path} has {size} bytes, {DESCRIPTION_NAME} records {expected.get('bytes')}; copy it again or export again"
        )
    actual = sha256_of(path)
    if actual != expected.get("sha256"):
        raise UserError(
            f"{path} is damaged: its sha256 is {actual[:16]}..., {DESCRIPTION_NAME} records "
            f"{str(expected.get('sha256'))[:16]}...; copy it again or export again"
        )


def _read_weights(folder: Path, files: list[str], model: Titans) -> None:
    """Copy the files' tensors into `model`, one at a time: the peak is one model and one tensor."""
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[int, ...]] = {}
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(folder / file, framework="pt")) for file in files]
            for file in opened:
                found |= {n.removeprefix(PREFIX): tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            _check_names_and_shapes(found, {n: tuple(p.shape) for n, p in parameters.items()}, str(folder))
            with torch.no_grad():
                for file in opened:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        parameters[name.removeprefix(PREFIX)].copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{folder}: not readable safetensors: {error}; copy it again or export again") from error


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
