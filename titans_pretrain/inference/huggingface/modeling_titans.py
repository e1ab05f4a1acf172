"""A Titans language model for transformers: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.

The cache is the model's recurrent state: of fixed size for the Titans variants, whatever the length of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titans_pretrain.inference.huggingface.configuration_titans import TitansConfig
from titans_pretrain.model.init import initialize
from titans_pretrain.model.rows import count_rows, read_padded, select_rows
from titans_pretrain.model.titans import ModelState, Titans


class TitansCache:
    """What generation carries from token to token.

    Reading a long text once and asking later: `cache = model(ids, use_cache=True).past_key_values`, then pass
    `past_key_values=cache.copy()` with the ids of the text and the question to `generate`.
    """

    is_compileable = False

    def __init__(self, state: ModelState, columns: int) -> None:
        self.state = state
        self.columns = columns
        """Columns of input_ids read so far, padding included."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids that need not be given again."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit."""
        return -1

    def copy(self) -> TitansCache:
        """Another cache at the same place. States are never changed in place, so nothing is copied."""
        return TitansCache(self.state, self.columns)

    def __len__(self) -> int:
        return self.columns


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model over `Titans`.

    Rows of different lengths are padded on the left (`tokenizer.padding_side = "left"`), with an attention_mask; padding
    changes nothing of a row's results.
    """

    config_class = TitansConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - as transformers declares it
    _is_stateful = True  # what a token needs of the past cannot be cut back: no assisted decoding

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = Titans(config.model_config())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def initialize_weights(self) -> None:
        """A model made from a config alone begins as a run of the trainer does; one that was loaded is left alone.

        Raises:
            ValueError: only a part of the parameters was loaded.
        """
        parameters = dict(self.model.named_parameters())
        fresh = [name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)]
        if len(fresh) == len(parameters):
            initialize(self.model, int(torch.randint(1 << 31, ())))
        elif fresh:
            raise ValueError(f"the weights' files lack parameter {fresh[0]} and {len(fresh) - 1} more")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids int64 [b, t], the tokens after those in `past_key_values` -> fp32 logits [b, t, v].

        Args:
            attention_mask: [b, t] or [b, earlier + t]; 0 for padding in front of a row.
            labels: int64 [b, t], -100 where none; shifted here, as transformers does.
            logits_to_keep: compute only the last so many logits (0: all), or those at these places.

        Raises:
            ValueError: no input_ids, or padding that is not on the left.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not supported by {type(self).__name__}: give input_ids, take logits")
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} needs input_ids")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        before = past_key_values.state if past_key_values is not None else None
        hidden, state = read_padded(self.model, input_ids, attention_mask, before)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept] if logits_to_keep is not None else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        columns = input_ids.shape[1] + (past_key_values.columns if past_key_values is not None else 0)
        cache: Any = TitansCache(state, columns) if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        if return_dict is False:
            return output.to_tuple()
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: TitansCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only what the cache has not read."""
        if past_key_values is not None:
            if input_ids.shape[1] <= past_key_values.columns:
                raise ValueError(
                    f"the cache has read {past_key_values.columns} tokens, so input_ids must be these and at least one more, "
                    f"not {input_ids.shape[1]} in all"
                )
            input_ids = input_ids[:, past_key_values.columns :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
        }

    def _reorder_cache(self, past_key_values: TitansCache, beam_idx: Tensor) -> TitansCache:
        """For beam search: the rows that live on."""
        rows = beam_idx.to(self.model.embedding.weight.device)
        if len(rows) == count_rows(past_key_values.state) and bool(
            (rows == torch.arange(len(rows), device=rows.device)).all()
        ):
            return past_key_values
        state = select_rows(past_key_values.state, rows, self.model.config)
        return TitansCache(state, past_key_values.columns)
