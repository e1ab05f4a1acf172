"""How DeepSpeed is used: the only file that imports it.

Everything DeepSpeed does differently by ZeRO stage or dtype ends here; the rest of the package sees forward-backward,
step, save and load. docs: the facts this relies on were found by trial with DeepSpeed 0.19.8 and are guarded by tests.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_pretrain.config import Config
from titans_pretrain.errors import UserError
from titans_pretrain.layout import memory_strategy, micro_batch_rows
from titans_pretrain.model import Titans, weight_decay_applies
from titans_pretrain.parallel.grid import Grid, ModelParallelUnit
from titans_pretrain.parallel.tensor import is_split
from titans_pretrain.train.durable import Pages, write_file
from titans_pretrain.train.saved_state import DEEPSPEED_FOLDER, KINDS, SavedState
from titans_pretrain.train.stragglers import Stopwatch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402


def _import_without_compiler(name: str) -> None:
    """Import a module of DeepSpeed that decorates a function with torch.compile; loading the compiler for it would cost
    every process five seconds at start, and nothing here uses the function."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module(name)
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


_import_without_compiler("deepspeed.runtime.zero.muon.original_muon")
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402

# On CPU, DeepSpeed would compile this op for half a minute at start; only its inference collectives use it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Top-level DeepSpeed keys an expert may add. DeepSpeed ignores keys it does not know, so they are checked here.
PASSED_THROUGH = (
    *("zero_optimization", "bf16", "data_types", "communication_data_type", "sparse_gradients", "disable_allgather"),
    *("prescale_gradients", "gradient_predivide_factor", "zero_force_ds_cpu_optimizer", "aio", "disable_python_gc"),
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers"),
    *("steps_per_print", "log_level"),
)
# Keys DeepSpeed knows that would do behind this stack's back what a setting of its own does.
DECIDED_ELSEWHERE = {
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "fp16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "the checkpoint section",
    "tensorboard": "log.tensorboard",
    "csv_monitor": "the run folder's metrics.jsonl",
    "wandb": "the run folder's metrics.jsonl",
    "comet": "the run folder's metrics.jsonl",
    "data_efficiency": "the data section",
    "tensor_parallel": "the parallel section",
    "sequence_parallel_size": "the parallel section",
    "data_parallel_size": "parallel.data",
    "managed_gradient_accumulation": "data.micro_batch",
    "gradient_allreduce_op": "the loss, which is already divided by the global token count",
}


class NotFiniteError(Exception):
    """The gradient norm is not finite. The update was not made: parameters and optimizer state are as before."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"gradient norm is {norm}")
        self.norm = norm


class _Root(nn.Module):
    """The module DeepSpeed is given. Its forward runs any function of the model, so that every pass, training or not,
    goes through the one forward whose hooks gather ZeRO-3 parameters."""

    def __init__(self, model: Titans) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


def _training_loss(model: Titans, *batch: Tensor | None) -> Tensor:
    return model(*batch)


class Engine:
    """A model under DeepSpeed with AdamW.

    Args:
        config: resolved (model.vocab_size set).
        model: initialised, on the CPU, fp32. DeepSpeed casts, moves and, in stage 3, partitions it in place.
        grid: this rank's place.
    """

    def __init__(self, config: Config, model: Titans, grid: Grid) -> None:
        self.model = model
        self.stage = config.engine.zero_stage
        self.device = grid.device
        self.num_parameters = sum(p.numel() for p in model.parameters())
        """Of this rank: a tensor rank has its slice."""
        self.forward_time = Stopwatch(grid.device)
        """Of the present step's forward passes."""
        self._tensor, self._replica = grid.tensor, grid.replica
        self._adamw = _adamw(config, model, grid.device)
        with _quiet():
            deepspeed.init_distributed(auto_mpi_discovery=False)  # takes over the process group of `grid`
            settings, unit = deepspeed_settings(config, grid), ModelParallelUnit(grid)
            zero = settings["zero_optimization"]
            _size_bucket(zero, config, grid, self.num_parameters)
            # Its own linear layer for stage 3 rounds twice where there is a bias: bf16 logits were off by 0.5 % RMS.
            zero.setdefault("memory_efficient_linear", False)
            if config.engine.deepspeed:
                _let_deepspeed_check(settings, config.engine.deepspeed, unit)
            self._engine, *_ = deepspeed.initialize(
                model=_Root(model), optimizer=self._adamw, config=settings, mpu=unit
            )
        self._checkpoint_engine = _RecordingCheckpointEngine()
        self._engine.checkpoint_engine = self._checkpoint_engine
        # It copies DeepSpeed's conversion scripts into every checkpoint, and on a full disk would raise on rank 0 alone.
        self._engine._copy_recovery_script = lambda save_path: None

    def begin_step(self, micro_batches: int) -> None:
        """Before a step's first micro-batch: how many it has, where that may change (data.batch_ramp)."""
        self.forward_time.restart()
        engine = self._engine
        if micro_batches == engine.gradient_accumulation_steps():
            return
        engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        # It takes every so manieth micro-batch since the start for a step's last, so the count starts anew.
        engine.micro_steps = 0
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = micro_batches

    def forward_backward(
        self, tokens: Tensor, labels: Tensor, scale: float, document_starts: Tensor | None = None
    ) -> Tensor:
        """Accumulate the gradient of `scale` times the sum of token losses.

        DeepSpeed averages gradients over data ranks, so for the mean over all tokens of a step `scale` is
        replica.size / (valid tokens of the step over all ranks and micro-batches).

        Args:
            tokens, labels: int64 [rows, seq_len], on any device.
            document_starts: bool, as tokens; see Titans.forward.

        Returns:
            this rank's unscaled loss sum, fp32 scalar, detached.
        """
        with self.forward_time.running():
            loss = self._engine(_training_loss, *self.at_hand(tokens, labels, document_starts))
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def at_hand(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """`tensors` on this rank's device."""
        return [None if x is None else x.to(self.device, non_blocking=True) for x in tensors]

    @property
    def at_last_micro_batch(self) -> bool:
        """Whether the running or next micro-batch completes a step."""
        return self._engine.is_gradient_accumulation_boundary()

    def end_micro_batch(self) -> None:
        """Between two micro-batches of one step: keep accumulating."""
        assert not self.at_last_micro_batch
        self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients. Call after the last micro-batch.

        Returns:
            the global gradient norm before clipping.

        Raises:
            NotFiniteError: on every rank, before anything was updated.
        """
        assert self.at_last_micro_batch
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            # Stage 0 neither reports the norm nor stops at a bad one. Its gradients are whole on every rank.
            norm = self._gradient_norm()
            if not math.isfinite(norm):
                self._engine.zero_grad()
                raise NotFiniteError(norm)
        self._engine.step()
        if self.stage > 0:
            # Stages 1 to 3 skip the update on every rank when the norm is not finite, and report it as inf.
            norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied() or not math.isfinite(norm):
            raise NotFiniteError(norm)
        return norm

    def drop_step(self) -> None:
        """End a step whose micro-batches are done without an update. Collective.

        DeepSpeed drops a step by itself when its gradients are not finite, and clears all it has accumulated; there is no
        other door. So they are made so.
        """
        if self.stage == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        else:
            held = self._engine.optimizer.averaged_gradients
            gradients = [tensor for tensors in held.values() for tensor in tensors or () if tensor is not None]
        for gradient in gradients:
            gradient.fill_(math.inf)
        try:
            self.step(0.0)
        except NotFiniteError:
            return
        raise RuntimeError("DeepSpeed applied a step that was to be dropped")

    def _gradient_norm(self) -> float:
        """Of whole gradients at hand, each parameter counted once: split ones over the tensor ranks, others here."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                squares[int(is_split(parameter))] += parameter.grad.double().square().sum()
        if self._tensor.size > 1:
            dist.all_reduce(squares[1:], group=self._tensor.group)
        return float(squares.sum().sqrt())

    def copies(self) -> Iterator[tuple[str, Tensor, bool, bool]]:
        """What this rank holds of every parameter: its name, the tensor, and whether the same bits must be on the other
        replicas, and on the other tensor ranks."""
        for name, parameter in self.model.named_parameters():
            split: Any = parameter  # ZeRO-3 hangs what it holds on the parameter
            whole = self.stage < 3 or split.ds_persist
            held = parameter.data if whole else split.ds_tensor.data
            yield name, held, whole, not is_split(parameter)

    @torch.no_grad()
    def evaluate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(model, *arguments)` without gradients, with parameters at hand under every ZeRO stage.

        Collective: all ranks pass the same function and equally shaped tensors.
        """
        return self._engine.module(function, *arguments)

    # -------------------------------------------------------------------------------------------------------- checkpoints

    def state_bytes(self) -> int:
        """Bytes that `save` will write, all ranks together: weights, two fp32 moments, and from stage 1 on fp32 masters."""
        weight = next(self.model.parameters()).element_size()
        return self._tensor.size * self.num_parameters * (weight + 8 + (4 if self.stage > 0 else 0))

    def save(
        self, folder: Path, hold: bool = False
    ) -> tuple[dict[str, dict[str, Any]], OSError | None, list[tuple[Path, Pages]]]:
        """Write DeepSpeed's files under `folder`/deepspeed, or make their contents in memory. Collective.

        Args:
            hold: write nothing; what the files would contain comes back, and does not change with the training.

        Returns:
            the files this rank wrote, path relative to `folder` -> {"bytes", "sha256"}, the first error of this rank, and
            the files held. An error does not raise here: the other ranks would wait for this one in DeepSpeed's barriers.
        """
        self._checkpoint_engine.begin(folder, hold)
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=DEEPSPEED_FOLDER, save_latest=False)
        recorded = self._checkpoint_engine
        return recorded.written, recorded.error, recorded.held

    def load(self, folder: Path) -> None:
        """Restore weights and optimizer state saved with the same stage and precision and, from stage 1 on, the same world
        size: in stage 0 every rank reads the one copy of both. Collective."""
        own = [{key: value for key, value in g.items() if key != "params"} for g in self._adamw.param_groups]
        with _quiet():
            path, _ = self._engine.load_checkpoint(str(folder), tag=DEEPSPEED_FOLDER, load_lr_scheduler_states=False)
        assert path is not None
        for group, settings in zip(self._adamw.param_groups, own, strict=True):
            group.update(settings)  # the config's, which the saved ones have replaced

    @torch.no_grad()
    def place(self, saved: SavedState) -> None:
        """Restore weights and optimizer state saved in any layout. Collective.

        Each rank reads what it owns: no rank sends state to another, so none waits for one that could not read.
        """
        optimizer = self._engine.optimizer
        if self.stage == 3:
            self._place_in_stage_3(saved, optimizer)
        elif self.stage > 0:
            for name, parameter in self.model.named_parameters():
                noted: Any = parameter
                mapping = noted._hp_mapping  # DeepSpeed's note of which elements are in this rank's partition
                if mapping is None:
                    continue
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
                state = self._state_of(flat, saved.step)
                for kind, target in zip(KINDS, (flat, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    wanted = saved.slice_of(name, kind, self._tensor.rank, self._tensor.size, here.start, here.numel)
                    target.narrow(0, there.start, there.numel).copy_(wanted)
            optimizer.update_lp_params()
        else:
            for name, parameter in self.model.named_parameters():
                state = self._state_of(parameter, saved.step)
                for kind, target in zip(KINDS, (parameter, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    target.copy_(saved.slice_of(name, kind, self._tensor.rank, self._tensor.size).view_as(target))

    def _place_in_stage_3(self, saved: SavedState, optimizer: Any) -> None:
        optimizer._partition_all_parameters()
        flats = optimizer.fp32_partitioned_groups_flat
        for name, parameter in self.model.named_parameters():
            split: Any = parameter
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self._replica.rank * split.ds_tensor.ds_numel
            there = max(0, min(count, split.ds_numel - start))  # the last ranks' partitions end in padding
            state = self._state_of(flats[group], saved.step)
            for kind, target in zip(KINDS, (flats[group], state["exp_avg"], state["exp_avg_sq"]), strict=True):
                if there:
                    wanted = saved.slice_of(name, kind, self._tensor.rank, self._tensor.size, start, there)
                    target.narrow(0, offset, there).copy_(wanted)
        for group in range(len(flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # those too small to be worth gathering each time, at hand everywhere
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _state_of(self, flat: Tensor, step: float) -> dict[str, Tensor]:
        """AdamW's state of a tensor it updates, made new where there is none; each has a step of its own, as torch counts."""
        state = self._adamw.state[flat]
        if not state:
            device = flat.device if self._adamw.param_groups[0]["fused"] else "cpu"
            state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        else:
            state["step"].fill_(step)
        return state


def _adamw(config: Config, model: Titans, device: torch.device) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if weight_decay_applies(name)],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for name, p in named if not weight_decay_applies(name)], "weight_decay": 0.0},
    ]
    # An object, not DeepSpeed's "AdamW", which would compile an extension. On CUDA the fused one is as fast.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=True if device.type == "cuda" else None,
    )


def _size_bucket(zero: dict[str, Any], config: Config, grid: Grid, num_parameters: int) -> None:
    """Choose how many elements of gradients DeepSpeed gathers before it reduces them over the replicas.

    Raises:
        UserError: the expert's choice would stop a hand-off.
    """
    hands_off = grid.sequence.size > 1 and config.model.carries_state and memory_strategy(config) == "hand_off"
    if hands_off:
        # A full bucket is reduced in the middle of the backward pass, where this rank would wait for ranks that are layers
        # behind and wait for it. One bucket for all is reduced after the last layer.
        asked = zero.setdefault("reduce_bucket_size", num_parameters)
        if asked < num_parameters:
            raise UserError(
                f"engine.deepspeed.zero_optimization.reduce_bucket_size ({asked}) must hold all {num_parameters} parameters of "
                "a rank where the memory is handed off (parallel.memory): remove it"
            )
    else:
        # DeepSpeed allocates the whole bucket, 2 GB by default, however small the model.
        zero.setdefault("reduce_bucket_size", min(500_000_000, num_parameters))


def deepspeed_settings(config: Config, grid: Grid) -> dict[str, Any]:
    """The DeepSpeed config of a run: ours, then the expert's raw keys.

    Raises:
        UserError: a raw key that this stack sets, that it decides elsewhere, or that DeepSpeed does not know.
    """
    rows = micro_batch_rows(config, grid.data.size)
    accumulation = config.batch_size // grid.data.size // rows
    settings: dict[str, Any] = {
        # DeepSpeed counts every replica as data-parallel: ranks that share a row enter as if each had rows of its own.
        "train_batch_size": rows * accumulation * grid.replica.size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "bf16": {"enabled": config.engine.precision == "bf16"},
        # The defaults accumulate and reduce in the weights' dtype: bf16 would lose small gradients.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # Offload then works with torch's AdamW instead of one that must be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    ours = {
        key: value for key, value in settings.items() if key not in ("steps_per_print", "zero_force_ds_cpu_optimizer")
    }
    raw = config.engine.deepspeed
    for key in raw:
        _check_raw_key(key, ours)
    _merge(settings, raw, ours, "engine.deepspeed")
    return settings


def _let_deepspeed_check(settings: dict[str, Any], raw: Mapping[str, Any], unit: ModelParallelUnit) -> None:
    try:
        DeepSpeedConfig(settings, mpu=unit)
    except Exception as error:  # pydantic's, DeepSpeed's own, AssertionError: all mean a bad key or value
        raise UserError(f"DeepSpeed refuses engine.deepspeed {raw}: {' '.join(str(error).split())}") from error


def _check_raw_key(key: str, ours: Mapping[str, Any]) -> None:
    if key in DECIDED_ELSEWHERE:
        raise UserError(
            f"engine.deepspeed.{key} is decided by {DECIDED_ELSEWHERE[key]}; remove it from engine.deepspeed"
        )
    if key not in PASSED_THROUGH and key not in ours:
        near = difflib.get_close_matches(key, sorted(PASSED_THROUGH), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(PASSED_THROUGH))}"
        raise UserError(f"unknown key engine.deepspeed.{key}; {hint}")


def _merge(settings: dict[str, Any], raw: Mapping[str, Any], ours: Mapping[str, Any], name: str) -> None:
    """Add `raw` to `settings` in place; a leaf that is in `ours` with another value is the user's contradiction."""
    for key, value in raw.items():
        if key in ours and isinstance(ours[key], dict) and isinstance(value, Mapping):
            _merge(settings[key], value, ours[key], f"{name}.{key}")
        elif key in ours:
            raise UserError(
                f"{name}.{key} is {value!r} but this stack sets it to {ours[key]!r} from the config; remove it"
            )
        else:
            settings[key] = value


class _RecordingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's plain torch.save, made durable, checksummed, and silent about errors until all ranks can hear them."""

    def __init__(self) -> None:
        super().__init__()
        self.begin(Path())

    def begin(self, folder: Path, hold: bool = False) -> None:
        self.folder, self.hold = folder, hold
        self.written: dict[str, dict[str, Any]] = {}
        self.held: list[tuple[Path, Pages]] = []
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        if self.hold:
            pages = Pages()
            torch.save(state_dict, cast(IO[bytes], pages))
            self.held.append((Path(path), pages))
            return
        try:
            entry = write_file(Path(path), lambda file: torch.save(state_dict, file))
            self.written[str(Path(path).relative_to(self.folder))] = entry
        except OSError as error:
            self.error = error


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence what DeepSpeed prints on the way; its warnings, which go through a logger, stay."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
