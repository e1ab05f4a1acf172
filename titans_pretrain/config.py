"""Every setting of a run: what it means, its unit, why its default is what it is, and which settings contradict.

A config is one YAML file with the sections below, then `section.key=value` overrides. Nothing is accepted and
ignored: an unknown key is an error that names the nearest one. Zero means "derive it" where the docstring says so;
`Config.resolved_*` properties hold the derivations.
"""

from __future__ import annotations

import ast
import bisect
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.errors import UserError

TITANS_VARIANTS = ("mac", "mag", "mal", "lmm")
BASELINE_VARIANTS = (
    "transformer",
    "sliding_window",
    "gated_deltanet",
    "gated_deltanet_swa",
    "linear_attention",
    "rmt",
)
RECURRENT_VARIANTS = ("gated_deltanet", "gated_deltanet_swa", "linear_attention")
VARIANTS = TITANS_VARIANTS + BASELINE_VARIANTS


def one_of(default: str, *choices: str) -> Any:
    """A string field that accepts only `choices`."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The model: shape, attention, and the neural memory (method.md sections 1 to 3)."""

    variant: str = one_of("mag", *VARIANTS)
    """Architecture: memory as context (mac), as gate (mag), as layer (mal), alone (lmm), or a baseline: full causal
    attention (transformer, Llama-like), attention over a window (sliding_window), Gated DeltaNet alone (gated_deltanet) or
    followed in each block by attention over a window (gated_deltanet_swa), linear attention (linear_attention), or attention
    within segments that hand memory tokens on (rmt). Default mag: the steadiest hybrid in the paper's tables."""
    num_layers: int = 12
    """Blocks. Default: the paper's 170M model."""
    dim: int = 768
    """Width of the residual stream, channels. Default: the paper's 170M model."""
    num_heads: int = 16
    """Attention heads; head_dim = dim / num_heads. Default: the paper's 170M model."""
    hidden_dim: int = 0
    """Inner width of the SwiGLU feed-forward, channels. 0: 8/3 * dim rounded up to a multiple of 64, which costs what a
    4 * dim two-matrix feed-forward costs (Llama)."""
    vocab_size: int = 0
    """Rows of the embedding. 0: the tokenizer's size, read from the data manifest."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head. Default false as in Llama; true saves parameters in small models."""
    norm_eps: float = 1e-5
    """Added to the mean square inside every RMS norm. Default: Llama's."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies. Default: Llama's."""
    window: int = 2048
    """Tokens a sliding-window query sees, itself included (mag, mal, sliding_window, gated_deltanet_swa). Default: the
    paper's."""
    segment_len: int = 512
    """Tokens per segment, the unit of attention (mac, rmt). Default: the paper's, of MAC."""
    retrieve_every: int = 1
    """MAC keeps every n-th retrieved memory token as attention context. Default 1: all; the paper's appendix keeps
    256 of 512, which is 2."""
    num_persistent: int = 128
    """Learned tokens per block that do not depend on the input. Default: the paper's."""
    num_memory_tokens: int = 16
    """Vectors that a segment of rmt hands to the next. Default 16: its paper uses 5 to 25 and finds little gain above 10; with
    the default segment_len, 16 keeps a segment's input at a multiple of 32 places, as GPU kernels like it."""
    gate_activation: str = one_of("sigmoid", "sigmoid", "silu", "tanh")
    """MAG: nonlinearity on the memory branch before it multiplies the attention branch. Default sigmoid: bounded, it
    cannot blow up the residual stream."""
    mal_residual: bool = True
    """MAL: give the memory sublayer a residual of its own before attention reads it. Default true: a stacked layer of a
    pre-norm network; false is the bare composition attention(memory(x))."""
    arrangement: str = one_of("llama", "llama", "h3")
    """What stands around the memory of lmm and mal. llama: convolutions and SiLU on q, k and v, a gate on the read. h3: the
    layer of H3 (arXiv 2212.14052), `q * memory(shift(k), shift(k) * v)`: the convolution on the key alone, two products for
    gates, no SiLU. Default llama: mac and mag share it, and it is what the trials of method.md ran."""
    memory_heads: int = 0
    """Heads of the memory, or of the recurrence of gated_deltanet, gated_deltanet_swa and linear_attention; its head_dim =
    dim / memory_heads. Such a recurrence carries head_dim numbers for each of dim channels. 0: num_heads."""
    memory_depth: int = 2
    """Weight matrices in each head's memory network, 1 (linear) to 4. Default: the paper's."""
    memory_expansion: float = 4.0
    """Hidden width of the memory network over head_dim; unused at depth 1. Default: the paper's."""
    memory_activation: str = one_of("gelu", "gelu", "silu")
    """Nonlinearity inside the memory network. Default: the paper's."""
    memory_residual_norm: bool = True
    """Memory computes k + LayerNorm(network(k)) rather than network(k). Default: the paper's appendix."""
    memory_chunk: int = 64
    """Tokens whose inner gradients are taken at the same weights. Part of the model, not a speed knob: a model trained
    at one value does badly at another. Default 64 trains 2.6 times faster than the paper's 16 (published)."""
    memory_momentum: bool = True
    """Carry past surprise into the update (eta). Default: the paper's."""
    memory_forgetting: bool = True
    """Let the memory forget (alpha). Default: the paper's."""
    memory_forget_toward: str = one_of("init", "init", "zero")
    """What forgetting decays to: the learned initial weights or zero. The paper's text is zero, which fails beyond the
    training length in our trials (method.md 1b); default init holds at 8 times the length."""
    memory_per_layer_gates: bool = True
    """One set of gates (theta, eta, alpha) for each matrix of the memory network rather than one shared. Default true:
    the paper finds it necessary for depth to help."""
    memory_theta_max: float = 0.0
    """Largest inner learning rate. 0: 1 / head_dim, which trained stably where 0.1 did not (method.md 1b)."""
    memory_theta_scaling: str = one_of("momentum", "momentum", "none")
    """Multiply theta by (1 - eta) so that momentum does not change the total step of a token. Default momentum: without
    it the effective step grows as 1 / (1 - eta)."""
    memory_theta_bias: float = 0.0
    """Initial bias of theta's gate, a logit. Default 0: half of memory_theta_max."""
    memory_eta_bias: float = 0.0
    """Initial bias of eta's gate, a logit. Default 0: momentum 0.5."""
    memory_alpha_bias: float = -6.0
    """Initial bias of alpha's gate, a logit. Default -6: 0.25 % forgotten per token; faster forgetting is chaotic with
    the inner layer norm (method.md 1)."""
    conv_kernel: int = 4
    """Taps of the causal depthwise convolution on the q, k, v of the memory (arrangement h3: on k alone) or recurrence. 1: no
    convolution. Default: the paper's family (Mamba, Gated DeltaNet)."""
    compile: bool = False
    """Run the blocks of the training forward through torch.compile. Speed only: not part of the model, checkpoints and
    exports are the same. Default false: the first steps take up to minutes longer, and a C++ compiler must be there; with
    gated_deltanet and gated_deltanet_swa about 2 seconds of a processor more for every 64 tokens of data.seq_len, since the
    loop over chunks is unrolled."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def resolved(self) -> ModelConfig:
        """The same model with the sizes that 0 leaves to derive written out."""
        return dataclasses.replace(
            self,
            hidden_dim=self.resolved_hidden_dim,
            memory_heads=self.resolved_memory_heads,
            memory_theta_max=self.resolved_theta_max,
        )

    @property
    def resolved_hidden_dim(self) -> int:
        return self.hidden_dim or 64 * math.ceil(8 * self.dim / 3 / 64)

    @property
    def resolved_memory_heads(self) -> int:
        return self.memory_heads or self.num_heads

    @property
    def memory_head_dim(self) -> int:
        return self.dim // self.resolved_memory_heads

    @property
    def memory_hidden_dim(self) -> int:
        return int(self.memory_expansion * self.memory_head_dim)

    @property
    def memory_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each weight matrix of the memory network."""
        hidden = [self.memory_hidden_dim] * (self.memory_depth - 1)
        return list(itertools.pairwise([self.memory_head_dim, *hidden, self.memory_head_dim]))

    @property
    def resolved_theta_max(self) -> float:
        return self.memory_theta_max or 1.0 / self.memory_head_dim

    @property
    def has_memory(self) -> bool:
        return self.variant in TITANS_VARIANTS

    @property
    def has_recurrence(self) -> bool:
        """A baseline whose state passes from token to token as the memory's does."""
        return self.variant in RECURRENT_VARIANTS

    @property
    def carries_state(self) -> bool:
        """Something passes from every token to all later ones: parallel.memory says how ranks that share a row do that."""
        return self.has_memory or self.has_recurrence

    @property
    def has_attention(self) -> bool:
        return self.variant not in ("lmm", "gated_deltanet", "linear_attention")

    @property
    def document_grid_key(self) -> str:
        """The key that says where in a row a document may begin; empty: anywhere."""
        if self.variant in ("mac", "rmt"):  # every segment begins a chunk; the memory of a segment is one document's
            return "model.segment_len"
        return "model.memory_chunk" if self.has_memory else ""

    @property
    def document_grid(self) -> int:
        """A document inside a row begins at a multiple of so many tokens (data.reset_at_documents)."""
        key = self.document_grid_key
        return int(getattr(self, key.removeprefix("model."))) if key else 1


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture."""

    path: str = ""
    """As data.path. Required."""
    weight: float = 1.0
    """Its share of the sequences, over the sum of all sources' weights; 0: none until data.phases gives it some."""
    max_epochs: float = 0.0
    """Most times its sequences may be seen over the run; a schedule that needs more is refused at the start. 0: no limit."""
    name: str = ""
    """What metrics and sentences call it; letters, digits, . _ and -. Empty: the last part of its path."""


@dataclass(frozen=True)
class PhaseConfig:
    """New weights of the sources from some point of training on."""

    tokens: int = 0
    """Tokens trained on before they hold, rounded up to whole sequences."""
    weights: tuple[float, ...] = ()
    """One for each of data.sources, in their order."""


@dataclass(frozen=True)
class RampConfig:
    """A new batch size from some point of training on."""

    tokens: int = 0
    """Tokens trained on before it holds; it changes between steps."""
    batch_tokens: int = 0
    """Tokens per optimizer step over all ranks from there on."""


@dataclass(frozen=True)
class DataConfig:
    """The token stream."""

    path: str = ""
    """Directory written by tokenizer/build_shards.py (index.json and shards), or where it was copied: http://, https://,
    s3://BUCKET/PREFIX, or pipe:COMMAND with {name} for the file that the command writes to its output
    (docs/remote-data.md). Required, unless `sources` is given."""
    sources: tuple[SourceConfig, ...] = ()
    """Several such directories instead of `path`, mixed by weight: `[{path: a, weight: 0.7}, {path: b, weight: 0.3,
    max_epochs: 4, name: code}]`. Only `path` must be given; weight defaults to 1, max_epochs to 0 (no limit), name to the
    last part of the path. All must have been made with one tokenizer."""
    phases: tuple[PhaseConfig, ...] = ()
    """Weights of `sources` that change in the course of training: `[{tokens: 8e9, weights: [0.2, 0.8]}]` holds from 8
    billion tokens on. What each source has served carries over."""
    seq_len: int = 4096
    """Tokens a sequence predicts. Default: the paper's training length."""
    batch_tokens: int = 524288
    """Tokens per optimizer step over all ranks. Default: the paper's half a million."""
    batch_ramp: tuple[RampConfig, ...] = ()
    """Batch sizes that change in the course of training: `[{tokens: 1e9, batch_tokens: 1048576}]` takes that many tokens per
    step from the first step after a billion tokens on; before, data.batch_tokens. Every size must divide over the ranks."""
    micro_batch: int = 0
    """Sequences per rank and forward pass; the rest of the batch is gradient accumulation. 0: the rank's whole share
    at once."""
    reset_at_documents: bool = False
    """Compute every document as if it were alone at the beginning of a row: attention, convolutions and memory see nothing
    of the documents before it. Needs rows packed by build_shards.py --packing bestfit with an --align that is a multiple of
    model.memory_chunk (of model.segment_len for mac), and parallel.sequence 1. Default false: documents follow each other
    in one stream, as in the paper, and the memory learns across them."""
    prefetch: int = 2
    """Optimizer steps the reader thread works ahead. Default 2: hides one slow read."""
    cache_dir: str = ""
    """Folder for the shards of a remote dataset, shared by the ranks and runs of a node; best on a disk of the node. Empty:
    titans_pretrain-UID in the system's folder for temporary files (TMPDIR, else /tmp), which is such a disk on most
    clusters."""
    cache_gib: float = 64.0
    """Bound of `cache_dir`, GiB. The least recently opened shards make way; one in use never does. Default: several times
    the 2 windows of 16 shards of 256 MiB that a run works on, 8 GiB for each source."""
    on_bad: str = one_of("raise", "raise", "skip")
    """A row of the training data that cannot be read (damaged, missing, not to be downloaded). raise: stop with one sentence.
    skip: the row stays in its place, none of its labels counts, and the metrics count it (masked_rows). Default raise:
    lost data should be mended, not got used to. Validation data always stops the run."""
    max_bad: int = 100
    """on_bad=skip: rows that may be masked between a start or resume and the next; one more stops the run. Default 100: a
    few bad blocks, not a lost shard, which at 128 Mi tokens has thousands of rows."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    learning_rate: float = 3e-3
    """Peak learning rate. Default: the paper's 170M model."""
    beta1: float = 0.9
    """AdamW first-moment decay. Default: the paper's."""
    beta2: float = 0.95
    """AdamW second-moment decay. Default: the paper's."""
    eps: float = 1e-8
    """AdamW denominator term. Default: torch's."""
    weight_decay: float = 0.1
    """Decoupled weight decay on the matrices of linear layers and the embedding; never on norms, biases, gates,
    convolutions, persistent tokens or the memory's initial weights. Default: the paper's."""
    clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping. Default: the paper's."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of training and learning rate, as functions of tokens."""

    tokens: int = 15_000_000_000
    """Tokens to train on. Default: the paper's for 170M to 400M."""
    kind: str = one_of("cosine", "cosine", "wsd")
    """After warm-up: cosine to the end, or warm-up-stable-decay (flat, then linear). Default: the paper's."""
    warmup_fraction: float = 0.01
    """Share of `tokens` over which the rate rises linearly from 0. Default: 1 %, the recipe the paper follows."""
    decay_fraction: float = 0.2
    """wsd: share of `tokens` at the end over which the rate falls linearly. Default: common practice for WSD."""
    final_fraction: float = 0.1
    """Learning rate at the end over its peak. Default: a tenth, the recipe the paper follows."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks divide the work."""

    data: int = 0
    """Ranks that read different rows of the batch. 0: all that sequence and tensor leave; any other value must agree with
    the number of processes."""
    sequence: int = 1
    """Ranks that share a row, each with its slice of the tokens: for sequences too long for one GPU. Must divide
    data.seq_len. Default 1: data parallelism communicates less while a row fits."""
    tensor: int = 1
    """Neighbouring ranks that share every token, each with its slice of the heads, the feed-forward and the vocabulary: for
    models too large for one GPU. They talk in every layer, so keep them within a node. Default 1: ZeRO shards the optimizer
    with less communication."""
    memory: str = one_of("auto", "auto", "head_exchange", "hand_off", "chunk_scan")
    """How the memory's scan is shared where `sequence` is above 1. head_exchange: each rank scans all tokens for its share
    of the heads. hand_off: each rank scans its own tokens and passes the state on; ranks work on different layers at one
    time. chunk_scan: ranks share one long chunk (model.memory_chunk a multiple of a rank's tokens) and merge their updates.
    The recurrences of gated_deltanet, gated_deltanet_swa and linear_attention go by one of the first two. Default auto:
    hand_off for mac, else head_exchange."""
    check_interval: int = 500
    """Steps between checks that parameters which must be equal on several ranks are, bit for bit; a difference stops the
    run. 0: never. Default 500: once in hundreds of steps costs nothing."""


@dataclass(frozen=True)
class EngineConfig:
    """Precision, memory savings, and DeepSpeed."""

    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters. Default 1: shards
    the largest state at no extra communication."""
    precision: str = one_of("bf16", "bf16", "fp32")
    """Compute dtype. bf16 keeps fp32 master weights, gradient accumulation, memory state and gates. Default: what GPUs
    are fast at."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more compute."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at one time in the cross entropy. Default: 250 MB of fp32 logits at a 32K
    vocabulary."""
    gc_interval: int = 100
    """Steps between Python's garbage collections, which all ranks make at the same step: left to Python they come at another
    moment on every rank, and the others wait. 0: leave them to Python. Default 100: a step leaves little behind."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys merged last, for the expert. A key that this stack sets itself is an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_last: int = 2
    """Complete checkpoints kept; older ones are deleted after a newer one is whole. 0: all. Default 2: one to spare if
    the newest is damaged on disk."""
    keep_every: int = 0
    """Steps: checkpoints at multiples of it are never deleted. 0: none is kept beyond keep_last."""
    background: bool = True
    """Hold a checkpoint in host memory and write it while training goes on; the last one, and all where the hosts' free
    memory is less than twice a checkpoint, are written while it waits. Default true: a step is late by the copy, not by the
    disk."""
    on_full_disk: str = one_of("stop", "stop", "warn")
    """When a checkpoint cannot be written (disk full, file system gone): stop with the reason, or warn and train on with the
    checkpoint before it. The last one of a run always stops. Default stop: a run that cannot save can lose days."""


@dataclass(frozen=True)
class LogConfig:
    """Console, metrics.jsonl and TensorBoard."""

    interval: int = 10
    """Steps between console lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run's tensorboard folder."""
    peak_tflops: float = 0.0
    """The device's peak TFLOP/s that MFU divides by. 0: the data sheet's value for a known GPU, else a matrix product
    measured at start."""
    profile_start: int = 0
    """First step of a window under torch's profiler, on every rank; traces go to RUN/profile. 0: none."""
    profile_steps: int = 3
    """Steps of that window. Default 3: enough to see a step repeat, and files of some megabytes."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss during training."""

    interval: int = 500
    """Steps between evaluations; the first and last step are always evaluated. 0: only those."""
    tokens: int = 1_048_576
    """Validation tokens per evaluation, rounded down to whole sequences (at least one) and to what the split holds."""
    length_multiples: tuple[int, ...] = (1,)
    """Sequence lengths to evaluate at, as multiples of data.seq_len, the memory state carried over the whole length.
    Each adds a pass; multiples above 1 are logged as valid_loss_xN."""
    needle_lengths: tuple[int, ...] = ()
    """Text lengths, tokens, at which every evaluation also measures how well the model finds a needle (docs/evaluation.md): the
    accuracy on the answer's tokens and their loss, as needle_accuracy/LENGTH and needle_nll/LENGTH. Default none: it costs
    needle_samples passes over each length, and small models find nothing for long."""
    needle_task: str = one_of(
        "niah_single_1", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"
    )
    """Which needle. Default niah_single_1, the easiest, which a model learns first. Prose is the validation split."""
    needle_samples: int = 32
    """Needles at each length, at depths spread evenly over the text. Default 32: some 250 tokens to be right about."""


@dataclass(frozen=True)
class FaultsConfig:
    """What a run does when something goes wrong around it (docs/launching.md)."""

    stall_seconds: float = 600.0
    """Longest time that a rank may stay in one phase of a step; then it dumps its Python stacks, names the rank that the
    others wait for, and ends. 0: never. Default 600: far above any step, far below what a queue's time costs."""
    long_seconds: float = 3600.0
    """The same for the start, the first step (compilation), evaluations and waiting for a save. 0: never."""
    on_not_finite: str = one_of("stop", "stop", "skip", "rewind")
    """A loss or gradient norm that is not finite: stop; skip the update, count the step and go on; or rewind, which also goes
    back to the weights and optimizer of the last checkpoint. Default stop: skipping in silence hides a broken run."""
    on_spike: str = one_of("off", "off", "skip", "rewind", "stop")
    """The same for a loss far above those before it (spike_sigma). Default off: a warm learning rate's own jumps are not
    spikes, and what is one depends on the data."""
    spike_sigma: float = 8.0
    """A spike is above the median of the last losses by this many standard deviations, taken from their median absolute
    deviation. Default 8: noise of a batch stays below 5."""
    spike_window: int = 128
    """Steps whose losses say what is normal; nothing is a spike before half of them are made."""
    max_skips: int = 10
    """Most bad steps between a start of the run and the next; one more stops it. Default 10: more is no accident."""
    grace_seconds: float = 120.0
    """Time between the signal that announces a preemption and the kill, which launch/slurm.sbatch asks SLURM for. A save that
    takes longer than it is warned of. 0: unknown."""


@dataclass(frozen=True)
class ClusterConfig:
    """What launch/submit.py asks SLURM for (docs/launching.md). The trainer reads none of it."""

    nodes: int = 1
    """Machines of the job; the ranks are this many times those of one."""
    gpus_per_node: int = 8
    """GPUs to ask for on each; 0 for machines without. Default: the usual node."""
    processes_per_node: int = 0
    """Ranks on each machine. 0: gpus_per_node."""
    cpus_per_process: int = 8
    """CPU cores of a rank: its own, those of the reader and of background saving."""
    time: str = "24:00:00"
    """Time limit of one life, as SLURM writes it. The run saves and is requeued when it is near."""
    partition: str = ""
    """Empty: the cluster's default."""
    account: str = ""
    """Empty: the user's default."""
    sbatch: str = ""
    """More flags of sbatch, such as `--qos=low --constraint=h100`."""
    srun: str = ""
    """More flags of srun, such as `--container-image=... --container-mounts=...` where the cluster runs containers."""
    setup: str = ""
    """Shell commands before the ranks start, such as `module load cuda`."""
    preflight: bool = True
    """Check nodes and ranks before each life's first step (launch/preflight.py); nodes that fail are left out, and the job is
    submitted again without them."""
    max_lives: int = 100
    """Most times a job may be requeued. Default 100: months of preemption, not a loop for ever."""
    attempts: int = 3
    """Most times the ranks are started in one life, after a fault."""


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    name: str = "run"
    """Folder of the run under `dir`."""
    dir: str = "runs"
    """Parent folder of runs."""
    seed: int = 0
    """Initial weights and data order are pure functions of it."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in the run folder, or start anew; never: refuse to start where
    the run folder holds checkpoints; or the path of one checkpoint folder to continue from."""
    init_from: str = ""
    """Folder of weights that a new run begins with: any checkpoint of the same model, or what `convert_checkpoint.py
    import-llama` wrote (docs/importing.md). Optimizer, schedule and data begin anew. Of no effect once the run folder has a
    checkpoint to continue from. Empty: weights are drawn from `seed`."""
    new_phase: bool = False
    """Allow a checkpoint to go on with another stream of data: where the sources, weights, data.seq_len or run.seed differ
    from the checkpoint's, the new stream starts at its beginning with fresh counts; data.batch_tokens may differ too. Where
    nothing differs it does nothing, so it may stay set. Default false: such a difference is mostly a mistake."""
    stop_after: int = 0
    """Stop, saving, after this many steps of this process (a planned interruption; the schedule is unchanged). 0: run
    to the end."""
    device: str = one_of("auto", "auto", "cpu", "cuda")
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True)
class Config:
    """A run's whole configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step over all ranks, before data.batch_ramp."""
        return self.data.batch_tokens // self.data.seq_len

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences per optimizer step over all ranks: every size the run comes to."""
        return [
            size // self.data.seq_len
            for size in (self.data.batch_tokens, *(r.batch_tokens for r in self.data.batch_ramp))
        ]

    @property
    def steps(self) -> StepPlan:
        """Steps against tokens of a run that starts by this config."""
        return StepPlan(self.data, self.schedule.tokens)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run (the last one may overshoot schedule.tokens by part of a batch)."""
        return self.steps.num_steps


class StepPlan:
    """How many tokens come before each optimizer step, under data.batch_ramp: closed forms, no counters.

    Args:
        data: batch_tokens and batch_ramp.
        total: tokens of the whole run.
        step, tokens: where the plan starts: after so many steps the run had seen so many tokens.
    """

    def __init__(self, data: DataConfig, total: int, step: int = 0, tokens: int = 0) -> None:
        self._steps, self._tokens, self._sizes = [step], [tokens], [data.batch_tokens]
        for change in data.batch_ramp:
            if change.tokens <= tokens:  # passed before the plan starts
                self._sizes[0] = change.batch_tokens
                continue
            steps = max(0, math.ceil((change.tokens - self._tokens[-1]) / self._sizes[-1]))
            self._steps.append(self._steps[-1] + steps)
            self._tokens.append(self._tokens[-1] + steps * self._sizes[-1])
            self._sizes.append(change.batch_tokens)
        stage = max(0, bisect.bisect_left(self._tokens, total) - 1)
        self.num_steps = self._steps[stage] + max(0, math.ceil((total - self._tokens[stage]) / self._sizes[stage]))
        """Steps of the whole run; the last may overshoot `total` by part of a batch."""

    def batch_tokens(self, step: int) -> int:
        """Tokens of the step that follows after `step` steps."""
        return self._sizes[self._stage(step)]

    def tokens(self, step: int) -> int:
        """Tokens seen after `step` steps, step not before the plan's start."""
        stage = self._stage(step)
        return self._tokens[stage] + (step - self._steps[stage]) * self._sizes[stage]

    def past(self, step: int) -> list[tuple[int, int]]:
        """(first step, batch tokens) of all that began before `step` was made, the size that holds at the start included."""
        stages = [(first, size) for first, size in zip(self._steps, self._sizes, strict=True) if first < max(step, 1)]
        # A stage that was passed over whole left nothing.
        return [stage for stage, after in zip(stages, [*stages[1:], (None, 0)], strict=True) if after[0] != stage[0]]

    def _stage(self, step: int) -> int:
        # Of stages that start at one step, being passed over whole, the last counts.
        return max(0, bisect.bisect_right(self._steps, step) - 1)


# --------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: all defaults), apply `section.key=value` overrides, check keys, types and cross-field rules.

    Raises:
        UserError: missing file, unknown section or key (with the nearest name), wrong type, contradiction.
    """
    tree: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read config {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read config {path}: it is not UTF-8 text") from error
        try:
            loaded = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
        loaded = {} if loaded is None else loaded
        if not isinstance(loaded, dict):
            raise UserError(f"config {path} must hold sections ({', '.join(section_names())}), not a {_kind(loaded)}")
        for section, values in loaded.items():
            _known(str(section), section_names(), f"section in {path}")
            if values is not None and not isinstance(values, dict):
                raise UserError(f"config {path}: section {section} must hold keys, not a {_kind(values)}")
            tree[section] = dict(values or {})
    for override in overrides:
        section, key, value = _split_override(override)
        tree.setdefault(section, {})[key] = value
    return config_from_dict(tree)


def config_from_dict(tree: Mapping[str, Mapping[str, Any]]) -> Config:
    """Build and check a `Config` from nested mappings, as stored in run folders, checkpoints and exports."""
    sections: dict[str, Any] = {}
    for section, values in tree.items():
        _known(section, section_names(), "section")
        cls = _section_class(section)
        sections[section] = _build(cls, values, section, f"key in section {section}")
    config = Config(**sections)
    check(config)
    return config


def _build(cls: Any, values: Mapping[Any, Any], name: str, what: str) -> Any:
    """A dataclass of settings from a mapping; `name` is what leads to it, such as `model` or `data.sources[0]`."""
    types = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        _known(str(key), names, what, prefix=f"{name}.")
    return cls(**{key: _convert(value, types[key], f"{name}.{key}") for key, value in values.items()})


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain mappings, ready for YAML or JSON; `config_from_dict` is its inverse."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    """Tuples become lists, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def config_to_yaml(config: Config) -> str:
    """The resolved config as YAML, sections and keys in the order of their definition."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice: plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # the parent reports it
                continue
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} appears twice, the second time on line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def section_names() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _section_class(section: str) -> Any:
    return typing.get_type_hints(Config)[section]


def _split_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise UserError(f"override {text!r} is not of the form section.key=value, such as optimizer.learning_rate=1e-3")
    _known(section, section_names(), "section")
    cls = _section_class(section)
    _known(key, [f.name for f in dataclasses.fields(cls)], f"key in section {section}", prefix=f"{section}.")
    if typing.get_type_hints(cls)[key] is str:
        return section, key, value
    try:
        return section, key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {text!r} is not valid YAML") from error


def _known(name: str, names: Sequence[str], what: str, prefix: str = "") -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
    raise UserError(f"unknown {what}: {prefix}{name}; {hint}")


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _convert(value: Any, wanted: Any, name: str) -> Any:
    """`value` as type `wanted`, or a UserError. YAML reads 1e-3 as a string and 15.0e9 as a float: both mean numbers."""
    origin = typing.get_origin(wanted) or wanted
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if wanted is float and math.isfinite(number):
            return number
        if wanted is int and math.isfinite(number) and number == int(number):
            return int(value) if isinstance(value, int) else int(number)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(v, typing.get_args(wanted)[0], f"{name}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _build(wanted, value, name, f"key in {name}")
    if dataclasses.is_dataclass(wanted) and isinstance(value, wanted):  # type: ignore[arg-type]
        return value
    if origin is dict and isinstance(value, dict):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
    raise UserError(f"{name} must be {names.get(wanted, 'a list' if origin is tuple else 'a mapping')}, not {value!r}")


# ------------------------------------------------------------------------------------------------ cross-field rules


def check(config: Config) -> None:
    """Refuse values and pairs of values that cannot work. Needs no files, ranks or devices.

    Raises:
        UserError: one sentence that names the keys, their values and the way out.
    """
    for section in section_names():
        part = getattr(config, section)
        for f in dataclasses.fields(part):
            choices = f.metadata.get("choices")
            value = getattr(part, f.name)
            if choices and value not in choices:
                raise UserError(f"{section}.{f.name} must be one of {', '.join(choices)}, not {value!r}")
    _check_ranges(config)
    _check_model(config.model)
    _check_sources(config.data)
    _check_batch(config)
    _check_documents(config)
    _check_rmt(config)
    _check_compile(config)


def _check_ranges(config: Config) -> None:
    positive = (
        "model.num_layers model.dim model.num_heads model.window model.segment_len model.retrieve_every model.norm_eps "
        "model.num_memory_tokens "
        "model.rope_theta model.memory_depth model.memory_expansion model.memory_chunk model.conv_kernel data.seq_len "
        "data.batch_tokens data.prefetch data.cache_gib parallel.sequence parallel.tensor optimizer.learning_rate "
        "optimizer.eps schedule.tokens engine.loss_chunk log.interval log.profile_steps eval.tokens eval.needle_samples "
        "faults.spike_sigma faults.spike_window "
        "cluster.nodes cluster.cpus_per_process "
        "cluster.attempts"
    )
    not_negative = (
        "model.hidden_dim model.vocab_size model.num_persistent model.memory_heads model.memory_theta_max "
        "data.micro_batch data.max_bad optimizer.weight_decay optimizer.clip parallel.data parallel.check_interval "
        "engine.gc_interval checkpoint.interval checkpoint.keep_last checkpoint.keep_every log.peak_tflops eval.interval "
        "run.stop_after run.seed faults.stall_seconds faults.long_seconds faults.grace_seconds faults.max_skips "
        "log.profile_start cluster.gpus_per_node cluster.processes_per_node cluster.max_lives"
    )
    shares = "optimizer.beta1 optimizer.beta2 schedule.warmup_fraction schedule.decay_fraction schedule.final_fraction"

    def value_of(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    for name in positive.split():
        if not value_of(name) > 0:
            raise UserError(f"{name} must be above 0, not {value_of(name)}")
    for name in not_negative.split():
        if not value_of(name) >= 0:
            raise UserError(f"{name} must be 0 or more, not {value_of(name)}")
    for name in shares.split():
        if not 0 <= value_of(name) <= 1:
            raise UserError(f"{name} must lie between 0 and 1, not {value_of(name)}")
    for name in ("optimizer.beta1", "optimizer.beta2"):
        if value_of(name) == 1:
            raise UserError(f"{name} must be below 1: at 1 AdamW never sees a gradient")
    if config.engine.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"engine.zero_stage must be 0, 1, 2 or 3, not {config.engine.zero_stage}")
    if any(m < 1 for m in config.eval.length_multiples) or not config.eval.length_multiples:
        given = list(config.eval.length_multiples)
        raise UserError(f"eval.length_multiples must be whole numbers of 1 or more, not {given}")
    if any(length < 1 for length in config.eval.needle_lengths):
        raise UserError(
            f"eval.needle_lengths must be whole numbers of 1 or more, not {list(config.eval.needle_lengths)}"
        )
    if not config.run.name or "/" in config.run.name or config.run.name in (".", ".."):
        raise UserError(f"run.name must be a folder name, not {config.run.name!r}; use run.dir for its parent")


def _check_model(model: ModelConfig) -> None:
    for key, heads in (("num_heads", model.num_heads), ("memory_heads", model.resolved_memory_heads)):
        if model.dim % heads:
            raise UserError(f"model.dim ({model.dim}) must be a multiple of model.{key} ({heads})")
    if model.head_dim % 2 and model.has_attention:
        raise UserError(
            f"model.dim ({model.dim}) / model.num_heads ({model.num_heads}) is {model.head_dim}, "
            "but rotary positions need an even head_dim; change model.num_heads"
        )
    if model.arrangement == "h3" and model.variant not in ("lmm", "mal"):
        raise UserError(
            "model.arrangement=h3 puts the memory in the place of a state-space layer, as a layer of model.variant lmm or mal; "
            f"{model.variant} has no such layer: set model.arrangement=llama or another variant"
        )
    if model.memory_depth > 4:
        raise UserError(f"model.memory_depth must be 1 to 4, not {model.memory_depth}")
    if model.has_memory and model.memory_depth > 1 and model.memory_hidden_dim < 1:
        raise UserError(
            f"model.memory_expansion ({model.memory_expansion}) times the memory's head_dim ({model.memory_head_dim}) "
            "leaves no hidden channel; raise model.memory_expansion"
        )
    if model.retrieve_every > model.segment_len:
        raise UserError(
            f"model.retrieve_every ({model.retrieve_every}) must not exceed model.segment_len ({model.segment_len}), "
            "or no memory token is ever kept"
        )


def _check_sources(data: DataConfig) -> None:
    if data.path and data.sources:
        raise UserError(
            f"data.path ({data.path}) and data.sources are both set: keep one; a single dataset needs only data.path"
        )
    names = source_names(data)
    for number, (source, name) in enumerate(zip(data.sources, names, strict=True)):
        key = f"data.sources[{number}]"
        if not source.path:
            raise UserError(f"{key}.path is empty: set it to a folder written by tokenizer/build_shards.py")
        if source.weight < 0 or source.max_epochs < 0:
            what = "weight" if source.weight < 0 else "max_epochs"
            raise UserError(f"{key}.{what} must be 0 or more, not {getattr(source, what)}")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{key}.name must be made of letters, digits, . _ and -, not {name!r}")
        if name in names[:number]:
            raise UserError(
                f"data.sources[{names.index(name)}] and {key} are both called {name}: give one another name"
            )
    if data.sources and not any(source.weight for source in data.sources):
        raise UserError("every weight in data.sources is 0: give at least one source a weight above 0")
    if data.phases and not data.sources:
        raise UserError(
            "data.phases changes the weights of data.sources, but there are none: remove data.phases or set sources"
        )
    _check_rising("data.phases", [phase.tokens for phase in data.phases])
    for number, phase in enumerate(data.phases):
        if len(phase.weights) != len(data.sources):
            raise UserError(
                f"data.phases[{number}].weights has {len(phase.weights)} weights for {len(data.sources)} sources "
                f"({', '.join(names)}): give one for each, 0 for none"
            )
        if min(phase.weights) < 0 or not any(phase.weights):
            given = list(phase.weights)
            raise UserError(f"data.phases[{number}].weights must be 0 or more and one of them above 0, not {given}")


def source_names(data: DataConfig) -> list[str]:
    """What each of data.sources is called."""
    # Of a URL without its query, of a command without the place of the file's name.
    shown = [s.path.split("?", 1)[0].replace("{name}", "").rstrip("/'\" ") for s in data.sources]
    return [
        source.name or re.sub(r"[^\w.-]", "-", path.rpartition("/")[2])
        for source, path in zip(data.sources, shown, strict=True)
    ]


def _check_rising(key: str, tokens: list[int]) -> None:
    for number, (before, here) in enumerate(itertools.pairwise([0, *tokens])):
        if here <= before:
            raise UserError(
                f"{key}[{number}].tokens ({here}) must be above {before}: entries follow one another, and what holds at the "
                f"start is {'data.batch_tokens' if 'ramp' in key else 'the weight of each source'}"
            )


def _check_batch(config: Config) -> None:
    data, schedule, engine = config.data, config.schedule, config.engine
    _check_rising("data.batch_ramp", [change.tokens for change in data.batch_ramp])
    sizes = {"data.batch_tokens": data.batch_tokens}
    sizes |= {f"data.batch_ramp[{i}].batch_tokens": change.batch_tokens for i, change in enumerate(data.batch_ramp)}
    for key, size in sizes.items():
        if size % data.seq_len or size <= 0:
            below = max(1, size // data.seq_len) * data.seq_len
            raise UserError(
                f"{key} ({size}) must be a multiple of data.seq_len ({data.seq_len}): try {below} or {below + data.seq_len}"
            )
        if data.micro_batch and size // data.seq_len % data.micro_batch:
            raise UserError(
                f"the batch of {size // data.seq_len} sequences ({key} / data.seq_len) must be a multiple of "
                f"data.micro_batch ({data.micro_batch})"
            )
    if schedule.kind == "wsd" and schedule.warmup_fraction + schedule.decay_fraction > 1:
        raise UserError(
            f"schedule.warmup_fraction ({schedule.warmup_fraction}) and "
            f"schedule.decay_fraction ({schedule.decay_fraction}) sum to more than 1: lower one"
        )
    if engine.zero_stage == 0 and engine.precision == "bf16":
        raise UserError(
            "engine.zero_stage=0 with engine.precision=bf16 gives wrong AdamW updates in DeepSpeed; "
            "use engine.zero_stage=1 (the same without sharding on one process) or engine.precision=fp32"
        )


def _check_documents(config: Config) -> None:
    longer = [m for m in config.eval.length_multiples if m > 1]
    if config.data.reset_at_documents and longer:
        raise UserError(
            f"eval.length_multiples ({list(config.eval.length_multiples)}) above 1 does not go with "
            "data.reset_at_documents=true: no document is longer than data.seq_len there; set eval.length_multiples=[1]"
        )


def _check_rmt(config: Config) -> None:
    model, seq_len = config.model, config.data.seq_len
    if model.variant == "rmt" and model.segment_len >= seq_len:
        raise UserError(
            f"model.segment_len ({model.segment_len}) is not below data.seq_len ({seq_len}), so no segment would ever read "
            "what another wrote and rmt would not learn to; lower model.segment_len or raise data.seq_len"
        )


def _check_compile(config: Config) -> None:
    if config.model.compile and config.engine.zero_stage == 3:
        raise UserError(
            "model.compile=true does not go with engine.zero_stage=3, which gathers parameters between the layers of a "
            "block and would cut what is compiled to pieces; use engine.zero_stage=2 or model.compile=false"
        )


# ------------------------------------------------------------------------------------------------------- reference


@dataclass(frozen=True)
class FieldReference:
    """One line of the reference: name `section.key`, type, default as YAML, choices, docstring."""

    name: str
    type: str
    default: str
    choices: tuple[str, ...]
    text: str


def iterate_reference() -> Iterator[tuple[str, str, list[FieldReference]]]:
    """Yield (section, the section's docstring, its fields), read from the docstrings in this file."""
    for section in section_names():
        cls = _section_class(section)
        texts = _field_docstrings(cls)
        fields = []
        for f in dataclasses.fields(cls):
            default = getattr(cls(), f.name)
            default = _plain(default)
            shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
            choices = tuple(f.metadata.get("choices", ()))
            fields.append(FieldReference(f"{section}.{f.name}", str(f.type), shown, choices, texts[f.name]))
        yield section, inspect.getdoc(cls) or "", fields


def _field_docstrings(cls: type) -> dict[str, str]:
    """Docstrings under dataclass fields: Python drops them, so they are read from the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts


def reference_markdown() -> str:
    """The reference page docs/config.md; a test keeps the file equal to this."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from `titans_pretrain/config.py` by `make docs`. Every key can be given in the YAML file or as",
        "`section.key=value` on the command line.",
    ]
    for section, text, fields in iterate_reference():
        lines += ["", f"## {section}", "", text, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for f in fields:
            kind = " \\| ".join(f.choices) if f.choices else f.type
            lines.append(f"| `{f.name}` | {kind} | `{f.default}` | {f.text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def reference_text(width: int = 100) -> str:
    """The same reference for a terminal (`python -m titans_pretrain.train --help`)."""
    lines = []
    for section, text, fields in iterate_reference():
        lines += ["", f"{section}: {text}"]
        for f in fields:
            kind = "|".join(f.choices) if f.choices else f.type
            lines.append(f"  {f.name} ({kind}, default {f.default})")
            lines += textwrap.wrap(f.text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_markdown(), end="")
