"""The language model: embedding, blocks, norm, head; one forward for training, one with state for everything else."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.baselines import TransformerBlock
from titans_pretrain.model.blocks import Block, LMMBlock, MACBlock, MAGBlock, MALBlock
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.gated_deltanet import GatedDeltaNet
from titans_pretrain.model.layers import LanguageModelHead, RMSNorm, rotary_table
from titans_pretrain.model.linear_attention import LinearAttention
from titans_pretrain.model.neural_memory import NeuralMemory, TokenSignals
from titans_pretrain.model.recurrence import RecurrentBlock, RecurrentHybridBlock
from titans_pretrain.model.rmt import RMTBlock, SegmentRecurrence
from titans_pretrain.model.sequence import LocalSequence


class ModelState(NamedTuple):
    """Everything the next token needs."""

    position: int
    """Tokens consumed so far; of the longest row where rows differ."""
    blocks: tuple[Any, ...]
    """One state per block; of variant rmt one for all of them."""
    row_positions: Tensor | None = None
    """int64 [b]: tokens consumed by each row, where rows differ; see model/rows.py."""


def state_bytes(state: Any) -> int:
    """Bytes of memory that the tensors of a state keep alive: each storage once and whole, so a small view of a large
    tensor counts as the large one."""
    storages: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, (tuple, list)):
            for item in part:
                visit(item)

    visit(state)
    return sum(storages.values())


def build_block(config: ModelConfig, sequence: LocalSequence) -> Block | RMTBlock:
    """The block of `config.variant`."""
    if config.variant == "rmt":
        return RMTBlock(config, sequence)
    if config.variant == "transformer":
        return TransformerBlock(config, sequence, window=None)
    if config.variant == "sliding_window":
        return TransformerBlock(config, sequence, window=config.window)
    if config.variant == "gated_deltanet":
        return RecurrentBlock(config, GatedDeltaNet(config, sequence))
    if config.variant == "gated_deltanet_swa":
        return RecurrentHybridBlock(config, GatedDeltaNet(config, sequence), sequence)
    if config.variant == "linear_attention":
        return RecurrentBlock(config, LinearAttention(config, sequence))
    titans = {"mac": MACBlock, "mag": MAGBlock, "mal": MALBlock, "lmm": LMMBlock}
    return titans[config.variant](config, sequence)


def run_block(
    block: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], sight: Documents | Tensor | None = None
) -> Tensor:
    """A block over whole sequences, or of rmt over a whole segment. The state is dropped here, inside what is compiled, so
    that no gradient of it is made. `sight`: the documents in the rows; of rmt the mask of the segment."""
    return block(x, rotary, None, sight)[0]


class Titans(nn.Module):
    """A causal language model. Parameters are empty until `model.init.initialize` or a checkpoint fills them.

    Args:
        config: `vocab_size` must be resolved (above 0).
        loss_chunk: tokens whose logits exist at one time.
        sequence: the sequence seam; the default does everything in this process.
    """

    def __init__(self, config: ModelConfig, loss_chunk: int = 2048, sequence: LocalSequence | None = None) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise ValueError("ModelConfig.vocab_size is 0: resolve it from the data before building the model")
        self.config = config
        self.sequence = sequence or LocalSequence()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(build_block(config, self.sequence) for _ in range(config.num_layers))
        self.segments = SegmentRecurrence(config) if config.variant == "rmt" else None
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = LanguageModelHead(config.dim, config.vocab_size, loss_chunk)
        if config.tie_embeddings:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)
        self.activation_checkpointing = False
        self._run_block = run_block

    def forward(self, tokens: Tensor, labels: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """tokens, labels int64 [b, t]; labels of -100 do not count -> the fp32 sum of the token losses, nats.

        t is what the sequence seam says is here: with a distributed one this rank's slice of each sequence.

        document_starts: bool [b, t], true where a document begins, at multiples of config.document_grid; then every document
            is computed as if it were alone at the beginning of a row. None: a row is one sequence.

        Raises:
            ValueError: document_starts do not fit the tokens or the grid.
            UserError: there are some, and the rows are spread over ranks.
        """
        x = self.embedding(tokens)
        documents = None
        if document_starts is not None:
            if document_starts.dtype != torch.bool or document_starts.shape != tokens.shape:
                raise ValueError(
                    f"document_starts must be bool {list(tokens.shape)} as the tokens, not {document_starts.dtype} "
                    f"{list(document_starts.shape)}"
                )
            documents = self.sequence.documents(document_starts, self.config, x.dtype)
        if self.segments is not None:
            return self.head(self.norm(self.segments(x, self.blocks, self._run, documents)), labels)
        rotary = self._rotary(0, tokens)
        if documents is not None:
            rotary = rotary_table(documents.places, self.config.head_dim, self.config.rope_theta)
        for block in self.blocks:
            x = self._run(block, x, rotary, documents)
        return self.head(self.norm(x), labels)

    def _run(
        self, block: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], sight: Documents | Tensor | None
    ) -> Tensor:
        """`run_block` in training: compiled, or run again in the backward pass, where that is asked for."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self._run_block(block, x, rotary, sight)
        # determinism_check compares shapes, which ZeRO-3 changes when it releases gathered parameters
        return checkpoint(
            self._run_block,
            block,
            x,
            rotary,
            sight,
            use_reentrant=False,
            determinism_check="none",
            context_fn=self.sequence.checkpoint_contexts,
        )

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch.compile make one kernel-fused program of the blocks' forward in `forward`, each block by itself: all
        share one program (of rmt two: the last segment of a row writes no memory). Parameter names stay; `hidden` runs as
        written, since its state grows and moves with every call.
        """
        self._run_block = torch.compile(run_block, backend=backend, fullgraph=True, dynamic=False)

    def run_as_written(self) -> None:
        """Undo `compile_blocks`."""
        self._run_block = run_block

    def hidden(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """tokens int64 [b, t], the next t of each sequence -> final hidden states [b, t, c] and the state after them.

        Under every layout the tokens are those of the whole sequence, on each rank.

        Raises:
            ValueError: rows at different positions (state.row_positions) and more than one token; see model/rows.py.
        """
        position = 0 if state is None else state.position
        row_positions = None if state is None else state.row_positions
        if row_positions is not None and tokens.shape[1] != 1:
            raise ValueError(
                f"rows at different positions go on one token at a time, not {tokens.shape[1]}; model.rows.read_rows takes more"
            )
        x = self.embedding(tokens)
        states = []
        after = None if row_positions is None else row_positions + 1
        if self.segments is not None:
            x, recurrent = self.segments.advance(x, self.blocks, None if state is None else state.blocks[0])
            return self.norm(x), ModelState(position + tokens.shape[1], (recurrent,), after)
        with self.sequence.whole():
            rotary = self._rotary(position, tokens) if row_positions is None else self._rotary_of_rows(row_positions)
            for i, block in enumerate(self.blocks):
                x, block_state = block(x, rotary, None if state is None else state.blocks[i])
                states.append(block_state)
        return self.norm(x), ModelState(position + tokens.shape[1], tuple(states), after)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, t, c] -> fp32 logits [b, t, v]."""
        return self.head(hidden)

    def set_signals(self, on: bool) -> None:
        """Collect the memories' signals in the next forwards; costs a few reductions per layer."""
        for _, memory in self._memories():
            memory.collect_signals = on

    def signals(self) -> dict[str, Tensor]:
        """Scalars of the last forward on this rank, named block_N/NAME; none for models without memory."""
        return {f"block_{i}/{name}": value for i, memory in self._memories() for name, value in memory.signals.items()}

    @torch.no_grad()
    def observe(
        self, tokens: Tensor, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState, dict[int, TokenSignals]]:
        """`hidden`, and by block number what each memory made of every token; empty for models without memory."""
        memories = self._memories()
        for _, memory in memories:
            memory.collect_tokens = True
        try:
            hidden, state = self.hidden(tokens, state)
            found = {i: _join(memory.token_signals) for i, memory in memories}
        finally:
            for _, memory in memories:
                memory.collect_tokens, memory.token_signals = False, []
        return hidden, state, found

    def _memories(self) -> list[tuple[int, NeuralMemory]]:
        found = []
        for i, block in enumerate(self.blocks):
            memory = getattr(block, "memory", None)
            if isinstance(memory, NeuralMemory):
                found.append((i, memory))
        return found

    def _rotary(self, start: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.sequence.positions(start, tokens.shape[1], tokens.device)
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta)

    def _rotary_of_rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The table of one token a row, the rows at `positions` [b]."""
        return rotary_table(positions[:, None], self.config.head_dim, self.config.rope_theta)


def _join(parts: list[TokenSignals]) -> TokenSignals:
    """One after another in time: MAC's memory sees a segment at a time."""
    fields = zip(*parts, strict=True)
    return TokenSignals(*(None if xs[0] is None else torch.cat(xs, dim=1) for xs in fields))  # type: ignore[arg-type]
