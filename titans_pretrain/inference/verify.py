"""Does an exported model compute what the trainer's model computed? Compared with logits the trainer stored.

    python -m titans_pretrain.inference.verify EXPORT LOGITS_FILE PRECISION [DEVICE]

prints one JSON object (`Comparison`) and ends with code 0 when they agree, 1 when they do not. Where transformers is
installed the model is the one that it makes of the export's own files, else this package's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import DTYPES, load_export, load_info, read_info

FP32_TOLERANCE = 1e-5
"""Largest absolute difference of a logit over the largest logit (or over 1, if that is larger) when trainer and export both
compute in fp32. Only the order of sums differs, which follows from where the weights lie in memory and from the number of
threads. Measured on a 4-block model with logits up to 10.4: export against trainer 3.8e-6, either against float64 6.2e-6;
both grow with the logits, so an absolute 1e-5 would refuse sound exports of well-trained models."""

BF16_TOLERANCE = 2.0**-5
"""Largest root mean square of the difference over that of the logits, per square root of the number of blocks, where bf16 is
involved. The mean over the vocabulary, which no probability depends on, is removed from both.

A bf16 rounding is off by at most 2^-9 of the value, and the roundings of the blocks add up like independent errors. Measured
(bf16 weights and arithmetic against fp32, initial weights, dim 128, vocabulary 2048, 128 tokens), 2 and 12 blocks: mac 1.5 %
and 3.0 %, mag 1.3 and 2.3, mal 1.7 and 3.4, lmm 1.6 and 3.5, transformer 1.1 and 1.4; at most 1.2 % times the square root.
The factor 2.6 to the tolerance is for trained weights and other devices; a misplaced or missing matrix gives about 100 %."""


@dataclass(frozen=True)
class Comparison:
    """Trainer's logits against the export's, over the same tokens."""

    tokens: int
    max_difference: float
    """Largest absolute difference of a logit."""
    relative_rms: float
    """Root mean square difference over root mean square of the logits, both with the mean over the vocabulary removed."""
    loaded_by: str
    """transformers, or titans_pretrain where that is not installed."""
    computed_in: str
    """fp32, or bf16 when the trainer computed or the export stores in bf16."""
    tolerance: float
    agree: bool

    def __str__(self) -> str:
        if self.computed_in == "fp32":
            measured = f"largest difference {self.max_difference:.2g}, tolerance {self.tolerance:.2g}"
        else:
            measured = f"relative RMS difference {self.relative_rms:.2g}, tolerance {self.tolerance:.2g}"
            measured += f" (largest difference {self.max_difference:.2g})"
        return (
            f"logits of {self.tokens} tokens, computed in {self.computed_in} by what {self.loaded_by} loads: {measured}"
        )


def compare(expected: Tensor, actual: Tensor, computed_in: str, num_layers: int, loaded_by: str = "") -> Comparison:
    """expected, actual: fp32 logits [1, n, v] of a model of `num_layers` blocks. NaN on either side never agrees."""
    difference = (actual - expected).double()
    max_difference = difference.abs().max().item()
    centred = expected.double() - expected.double().mean(dim=-1, keepdim=True)
    difference = difference - difference.mean(dim=-1, keepdim=True)
    scale = centred.square().mean().sqrt().item()
    rms = difference.square().mean().sqrt().item()
    relative_rms = rms / scale if scale else math.inf if rms else 0.0
    if computed_in == "fp32":
        measured, tolerance = max_difference, FP32_TOLERANCE * max(1.0, expected.abs().max().item())
    else:
        measured, tolerance = relative_rms, BF16_TOLERANCE * math.sqrt(num_layers)
    return Comparison(
        expected.shape[1], max_difference, relative_rms, loaded_by, computed_in, tolerance, measured <= tolerance
    )


def read_logits(path: Path) -> tuple[Tensor, Tensor]:
    """The trainer's `tokens` int64 [1, n] and `logits` fp32 [1, n, v].

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the checkpoint has no logits to verify an export against")
    try:
        tensors = load_file(path)
        tokens, logits = tensors["tokens"], tensors["logits"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged, so an export cannot be verified against it: {error}") from error
    if tokens.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != tokens.shape or logits.numel() == 0:
        raise UserError(
            f"{path} is damaged: tokens of shape {list(tokens.shape)} and logits of shape {list(logits.shape)} "
            "do not belong together"
        )
    return tokens, logits.float()


@torch.inference_mode()
def verify_export(folder: Path, logits_file: Path, precision: str, device: str = "cpu") -> Comparison:
    """Run the export in `folder` over the tokens of `logits_file` and compare.

    Args:
        precision: fp32 or bf16, what the trainer computed in. The export computes in the coarser of this and its own.
    """
    tokens, expected = read_logits(logits_file)
    computed_in = "bf16" if "bf16" in (precision, read_info(folder).dtype) else "fp32"
    config = load_info(folder).config.model
    if expected.shape[-1] != config.vocab_size:
        raise UserError(
            f"{logits_file} has logits over {expected.shape[-1]} tokens, the model's vocabulary has {config.vocab_size}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise UserError(f"{logits_file} is damaged: it holds token ids outside the vocabulary of {config.vocab_size}")
    by_transformers = importlib.util.find_spec("transformers") is not None
    logits_of = _by_transformers if by_transformers else _by_this_package
    logits = logits_of(folder, device, computed_in, tokens.to(device)).float().cpu()
    loaded_by = "transformers" if by_transformers else "titans_pretrain (transformers is not installed)"
    return compare(expected, logits, computed_in, config.num_layers, loaded_by)


def _by_transformers(folder: Path, device: str, dtype: str, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=DTYPES[dtype])
    return model.to(device)(tokens, use_cache=False).logits


def _by_this_package(folder: Path, device: str, dtype: str, tokens: Tensor) -> Tensor:
    model = load_export(folder, device, dtype).model
    return model.logits(model.hidden(tokens)[0])


@exit_on_user_error
def main(arguments: list[str]) -> None:
    folder, logits_file, precision, *device = arguments
    comparison = verify_export(Path(folder), Path(logits_file), precision, *device)
    print(json.dumps(dataclasses.asdict(comparison)))
    sys.exit(0 if comparison.agree else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
