"""The smallest models that still cross every border: chunks, segments and windows that do not divide the length."""

from __future__ import annotations

from typing import Any

import torch

from titans_pretrain.config import ModelConfig
from titans_pretrain.model import Titans, initialize

VOCAB = 61


def tiny_config(variant: str, **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = dict(
        variant=variant,
        num_layers=2,
        dim=32,
        num_heads=2,
        hidden_dim=48,
        vocab_size=VOCAB,
        window=12,
        segment_len=20,
        num_persistent=5,
        memory_chunk=8,
        memory_expansion=1.5,
    )
    return ModelConfig(**{**settings, **changes})


def tiny_model(variant: str, seed: int = 0, **changes: Any) -> Titans:
    model = Titans(tiny_config(variant, **changes))
    initialize(model, seed)
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
