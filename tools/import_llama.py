"""How does a pretrained Llama become the start of a run here? `import-llama` maps a Hugging Face folder onto our parameters.

The Transformer is a Llama: the same logits. MAG and MAL take its attention and feed-forward, and their memory begins as in any
new run; so does all that the Llama has no counterpart of. MAL's memory is given an output of zero, so that the first step
starts from the Llama's own function as far as its window reaches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_pretrain.config import Config, config_to_dict, load_config
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.errors import UserError
from titans_pretrain.model import Titans, initialize
from titans_pretrain.train.checkpoint import TOKENIZER
from tools.import_command import write_imported

VARIANTS = ("transformer", "sliding_window", "mag", "mal")
"""Models with a Llama's attention and feed-forward in them."""
MODEL_YAML = "model.yaml"
"""File in the checkpoint with the model section to train with."""
LOGIT_TOKENS = 256
"""Tokens whose logits the checkpoint keeps."""

_IMPLIED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Tensors that some files hold although others say the same: the frequencies, and a tied head."""

# What our attention, norms and feed-forward are; a Llama that is something else cannot be told by them.
_MUST_BE = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "pretraining_tp": (1, None),
}
_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}


def add_import_llama(commands: Any) -> None:
    """`import-llama FOLDER CHECKPOINT`."""
    parser = commands.add_parser(
        "import-llama", help="make starting weights (run.init_from) of a Llama-like Hugging Face folder"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="config.json and *.safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to create")
    parser.add_argument(
        "--variant", choices=VARIANTS, help="default: transformer, or sliding_window where the model has one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what the Llama has no weights for (default 0)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="model.KEY=VALUE", help="settings of the model that is made"
    )
    parser.set_defaults(run=run_import_llama)


def run_import_llama(options: argparse.Namespace) -> None:
    """Write OUT.

    Raises:
        UserError: the folder is no Llama that our model can be, lacks a tensor or is damaged; OUT exists or cannot be written.
    """
    if options.out.exists():
        raise UserError(f"{options.out} exists; choose another folder or remove it")
    llama = _read_json(options.folder / "config.json")
    config = config_of(llama, options.variant, options.set)
    model = Titans(config.model)
    initialize(model, options.seed)
    weights = _Weights(options.folder)
    taken = dict(translate(config, llama, weights))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in taken.items():
            if parameters[name].shape != value.shape:
                raise UserError(
                    f"{options.folder}: {name} would be {list(value.shape)}, but by config.json it is "
                    f"{list(parameters[name].shape)}"
                )
            parameters[name].copy_(value)
        if config.model.variant == "mal":
            for name, parameter in parameters.items():
                if name.endswith("memory.output.weight"):
                    parameter.zero_()
    weights.check_all_used()

    tokenizer = options.folder / TOKENIZER
    facts = {
        "step": 0,
        "tokens": 0,
        "position": 0,
        "data": None,
        "dataset_fingerprint": "",
        "tokenizer_sha256": sha256_of(tokenizer) if tokenizer.is_file() else "",
        "weights_only": True,
    }
    with tempfile.TemporaryDirectory() as scratch:
        section = Path(scratch) / MODEL_YAML
        section.write_text(yaml.safe_dump({"model": config_to_dict(config)["model"]}, sort_keys=False))
        others = {MODEL_YAML: section, **({TOKENIZER: tokenizer} if tokenizer.is_file() else {})}
        write_imported(options.out, model, config, facts, others, min(LOGIT_TOKENS, config.data.seq_len))
    _report(options, config, llama, parameters, taken)


def config_of(llama: Mapping[str, Any], variant: str | None, overrides: list[str]) -> Config:
    """Our config of a model with the sizes of a Hugging Face config.

    Raises:
        UserError: it has something that our attention, norms or feed-forward do not.
    """
    kind = llama.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UserError(f"config.json has model_type {kind}; llama and mistral can be imported")
    for key, (ours, absent) in _MUST_BE.items():
        if llama.get(key, absent) not in (ours, None):
            raise UserError(
                f"config.json has {key}={llama[key]}, but the model here has {ours}: it cannot be imported exactly"
            )
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if key not in llama:
            raise UserError(f"config.json has no {key}")
    head_dim = llama.get("head_dim") or llama["hidden_size"] // llama["num_attention_heads"]
    if head_dim * llama["num_attention_heads"] != llama["hidden_size"]:
        raise UserError(
            f"config.json has {llama['num_attention_heads']} heads of head_dim {head_dim}, but here they fill hidden_size "
            f"({llama['hidden_size']})"
        )
    window = llama.get("sliding_window") if kind == "mistral" or llama.get("use_sliding_window") else None
    variant = variant or ("sliding_window" if window else "transformer")
    if window and variant == "transformer":
        raise UserError(
            f"config.json has sliding_window={window}, which variant transformer has not; use --variant sliding_window"
        )
    defaults = {"norm_eps": 1e-6, "tie_embeddings": False}  # those of transformers' LlamaConfig
    sizes = {**defaults, **{ours: llama[theirs] for theirs, ours in _SIZES.items() if theirs in llama}}
    sizes |= {"variant": variant, "rope_theta": _rope_theta(llama), "num_persistent": 0}
    if window and variant != "transformer":
        sizes["window"] = window
    chosen = [word.split("=")[0] for word in overrides]
    fixed = {f"model.{key}" for key in (*_SIZES.values(), "variant", "rope_theta")}
    for name in chosen:
        if name in fixed or not name.startswith("model."):
            raise UserError(f"{name} cannot be chosen: only keys of the model section that the Llama does not decide")
    words = [f"model.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in sizes.items()]
    return load_config(None, [*words, *overrides])


def _rope_theta(llama: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, which transformers 5 writes into rope_parameters and 4 beside the sizes."""
    rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json has rotary positions of type {kind}, but the model here has plain ones (default)")
    return float(rope.get("rope_theta", llama.get("rope_theta", 10000.0)))


def translate(config: Config, llama: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our names and values of the Llama's parameters, fp32. Grouped key and value heads are written out, one for each query
    head: the same function."""
    heads = config.model.num_heads
    groups = heads // (llama.get("num_key_value_heads") or heads)
    norm = "attention_norm" if config.model.variant == "mal" else "mixer_norm"
    yield "embedding.weight", weights["model.embed_tokens.weight"]
    for i in range(config.model.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield f"{ours}{norm}.weight", weights[f"{theirs}input_layernorm.weight"]
        yield f"{ours}attention.query.weight", weights[f"{theirs}self_attn.q_proj.weight"]
        for name, source in (("key", "k_proj"), ("value", "v_proj")):
            grouped = weights[f"{theirs}self_attn.{source}.weight"].unflatten(0, (heads // groups, -1))
            yield f"{ours}attention.{name}.weight", grouped.repeat_interleave(groups, dim=0).flatten(0, 1)
        yield f"{ours}attention.output.weight", weights[f"{theirs}self_attn.o_proj.weight"]
        yield f"{ours}feed_forward_norm.weight", weights[f"{theirs}post_attention_layernorm.weight"]
        for name in ("gate", "up", "down"):
            yield f"{ours}feed_forward.{name}.weight", weights[f"{theirs}mlp.{name}_proj.weight"]
    yield "norm.weight", weights["model.norm.weight"]
    if not config.model.tie_embeddings:
        yield "head.weight", weights["lm_head.weight"]


class _Weights(Mapping[str, Tensor]):
    """The tensors of all *.safetensors in a folder by name, in fp32, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no *.safetensors; save the model with safe_serialization=True")
        try:
            self._files = {name: file for path in files for file in [safe_open(path, "pt")] for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{folder} has a damaged *.safetensors: {error}") from error
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}")
        self._used.add(name)
        return self._files[name].get_tensor(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def check_all_used(self) -> None:
        """
        Raises:
            UserError: a tensor that changes what the model computes was left out.
        """
        left = [
            n
            for n in self._files
            if n not in self._used and not n.endswith("rotary_emb.inv_freq") and n != "lm_head.weight"
        ]
        if left:
            raise UserError(f"{self._folder} has {len(left)} tensors that a Llama has not, such as {left[0]}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _report(
    options: argparse.Namespace,
    config: Config,
    llama: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
) -> None:
    fresh = [name for name in parameters if name not in taken]
    count = sum(parameters[name].numel() for name in taken)
    print(
        f"imported {options.folder} to {options.out} as {config.model.variant}: {len(taken)} parameters, {count:,} elements"
    )
    grouped = llama.get("num_key_value_heads") or config.model.num_heads
    if grouped != config.model.num_heads:
        print(
            f"{grouped} key and value heads were written out as {config.model.num_heads}: the same function, more parameters"
        )
    if fresh:
        kinds = sorted({name.split(".", 2)[2] if name.startswith("blocks.") else name for name in fresh})
        print(f"fresh, by seed {options.seed}: {len(fresh)} parameters: {', '.join(kinds)}")
    print(
        f"train with: python -m titans_pretrain.train {options.out}/{MODEL_YAML} data.path=DATA run.init_from={options.out} ..."
    )
