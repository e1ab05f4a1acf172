"""The configuration of a Titans model under transformers: the `model` section of a run's config, and token ids."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from titans_pretrain.config import ModelConfig


class TitansConfig(PretrainedConfig):
    """Config of `TitansForCausalLM`.

    Args:
        titans: the fields of `ModelConfig`, every size resolved.
        max_position_embeddings: the length of the training sequences, in tokens; nothing ends there.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        titans: dict[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        model = ModelConfig(**{"vocab_size": 32000, **(titans or {})})
        self.titans = dict(titans or {"vocab_size": 32000})
        self.vocab_size = model.vocab_size
        self.hidden_size = model.dim
        self.intermediate_size = model.resolved_hidden_dim
        self.num_hidden_layers = model.num_layers
        self.num_attention_heads = model.num_heads
        self.use_cache = use_cache
        self.max_position_embeddings = max_position_embeddings
        for derived in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(derived, None)  # the titans section decides
        kwargs["tie_word_embeddings"] = model.tie_embeddings
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """What the model itself is built from."""
        return ModelConfig(**self.titans)
