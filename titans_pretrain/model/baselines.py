"""What people would train instead: Transformer++ (Llama) and the sliding-window Transformer, from the same parts."""

from __future__ import annotations

from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.attention import Attention, AttentionState
from titans_pretrain.model.blocks import Block
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.sequence import LocalSequence


class TransformerBlock(Block):
    """Pre-norm attention and SwiGLU. `window` None: full causal attention."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence, window: int | None) -> None:
        super().__init__(config)
        self.attention = Attention(config, window, sequence)

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: AttentionState | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, AttentionState]:
        y, state = self.attention(self.mixer_norm(x), rotary, None, state, documents)
        return x + y, state
