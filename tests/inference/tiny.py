"""The smallest tokenizer and exported models that behave like the real ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from tests.model.tiny import tiny_config
from titans_pretrain.config import Config, DataConfig
from titans_pretrain.inference.export import write_export
from titans_pretrain.model import Titans, initialize

VOCAB = 384
PHRASES = (
    *("the memory learns at test time", "a river of stone", "surprise forgets", "momentum and state", "the wave"),
    *("a neural token", "the long short context", "12 345", "6789", "bright quick slow window", "café naïve", "chunk"),
)


def prose(lines: int, seed: int = 0) -> list[str]:
    """Lines of a few words, capitalised, with digits and accents."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(PHRASES, k=draw.randint(1, 5))).capitalize() + "." for _ in range(lines)]


def train_tokenizer(folder: Path) -> Path:
    """A SentencePiece model with the options of tokenizer/train_tokenizer.py; accents are left to byte pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(400)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=0.98,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def tiny_export(folder: Path, tokenizer_file: Path, variant: str, dtype: str = "fp32", **changes: Any) -> Titans:
    """Export a tiny model with its initial weights; returns the model that was exported."""
    config = Config(
        model=tiny_config(variant, **{"vocab_size": VOCAB, **changes}),
        data=DataConfig(path="d", seq_len=32, batch_tokens=64),
    )
    model = Titans(config.model)
    initialize(model, seed=0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    write_export(folder, config, weights, tokenizer_file, {"step": 7, "tokens": 448}, dtype)
    return model.requires_grad_(False)


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
