"""What happens in a training run, from the config to the last line: one function, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

import titans_pretrain
from titans_pretrain.config import Config, config_to_yaml
from titans_pretrain.data.cache import Cache
from titans_pretrain.data.damage import IGNORED
from titans_pretrain.data.mixture import Sources, paths
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, MicroBatch
from titans_pretrain.errors import UserError
from titans_pretrain.layout import choose_layout, describe, micro_batch_rows
from titans_pretrain.model import delta_rule
from titans_pretrain.model.cost import flops_per_token, parameter_counts
from titans_pretrain.model.neural_memory import describe_path
from titans_pretrain.parallel.build import build_model
from titans_pretrain.parallel.grid import AgreedError, Grid
from titans_pretrain.train import checkpoint as checkpoints
from titans_pretrain.train.checkpoint import Progress
from titans_pretrain.train.compiler import check_compiler
from titans_pretrain.train.course import chart
from titans_pretrain.train.drift import check_copies
from titans_pretrain.train.engine import Engine, NotFiniteError
from titans_pretrain.train.evaluate import Evaluation
from titans_pretrain.train.garbage import Garbage
from titans_pretrain.train.heartbeat import FAILED, Heartbeat
from titans_pretrain.train.lifecycle import (
    DONE,
    FAULTS,
    PREEMPTED,
    STOP,
    STOP_FILE,
    Interruption,
    attempt,
    clear_markers,
    life,
    reason_text,
    record_fault,
    write_marker,
)
from titans_pretrain.train.masking import MaskedRows
from titans_pretrain.train.profiling import Profiler
from titans_pretrain.train.report import Reporter, code_text, memory_in_use
from titans_pretrain.train.saving import SaveFailed, Saver
from titans_pretrain.train.schedule import every, learning_rate
from titans_pretrain.train.spikes import SpikeWatch, earlier_losses, samples_text
from titans_pretrain.train.starting_weights import check_starting_weights, starting_weights
from titans_pretrain.train.stragglers import slowest
from titans_pretrain.train.watch import describe_failure


def train(config: Config, grid: Grid, interruption: Interruption | None = None) -> Progress:
    """Train by `config`; every rank of `grid` calls it.

    Args:
        interruption: who hears the signals that ask this process to stop.

    Returns:
        where the run stands at the end.

    Raises:
        AgreedError: on all ranks, for whatever the user can mend.
        LostRank: another rank is gone.
    """
    faults = config.faults
    heart = Heartbeat(config.run_dir, grid.rank, grid.world_size, faults.stall_seconds, faults.long_seconds)
    try:
        return _train(config, grid, interruption or Interruption(), heart)
    except UserError:
        heart.close("refused")
        raise
    except Exception as error:
        lost = heart.lost(error)
        if lost is not None:
            heart.close("lost a peer")
            raise lost from error
        heart.close(FAILED)
        raise
    finally:
        heart.close("ended")


def _train(config: Config, grid: Grid, interruption: Interruption, heart: Heartbeat) -> Progress:
    layout = choose_layout(config, grid.world_size)
    grid = grid.lay_out(layout)
    run_dir = config.run_dir

    # Data and run folder
    with grid.agreed():
        sources = open_sources(config)
        config = resolve(config, sources)
        if config.model.compile:
            check_compiler(grid.device)
        evaluation = Evaluation(config, sources, grid)
        make_run_dir(run_dir)
        report = Reporter(config, run_dir, grid)
        heart.start()
    report.say(f"life {life()}, attempt {attempt()}; {grid.started_by}; device {grid.device}")
    with grid.agreed():
        if grid.is_first:
            start_from = checkpoints.choose_resume(run_dir, config.run.resume, report.say)
            manifest = checkpoints.read_manifest(start_from) if start_from else None
            if start_from and manifest:
                checkpoints.check_fits(start_from, manifest, config, sources)
            elif config.run.init_from:
                report.say(check_starting_weights(Path(config.run.init_from), config, sources))
            chart(config, sources, start_from, manifest)
            checkpoints.clear_remains(run_dir, start_from, report.say)
            report.say(config_to_yaml(config))
            (run_dir / "config.yaml").write_text(config_to_yaml(config))
            (run_dir / "code.txt").write_text(code_text(Path(titans_pretrain.__file__).parent))
            halted = (run_dir / STOP).exists()
            clear_markers(run_dir)
    start_from, manifest, halted = grid.from_first((start_from, manifest, halted) if grid.is_first else None)
    if halted:
        report.say(f"{run_dir / STOP} is there: nothing is trained; remove it to go on")
        report.close()
        return Progress()
    with grid.agreed():
        course = chart(config, sources, start_from, manifest)

    # Model and engine
    model = build_model(config, grid, config.run.seed)
    if config.model.compile:
        model.compile_blocks()
    engine = Engine(config, model, grid)
    millions = parameter_counts(config.model)["total"] / 1e6
    report.say(
        f"{config.model.variant} with {millions:.2f}M parameters; {describe(config, layout)}; "
        f"{course.steps.num_steps} steps of {describe_batches(config, layout.data)}; ZeRO stage {config.engine.zero_stage}, "
        f"{config.engine.precision}; {sources.num_tokens('train'):,} training tokens in the data"
    )
    for source, stream in zip(sources.sources, course.mixture.streams, strict=True):
        if sources.several:
            sequences = f"{stream.num_sequences:,} sequences an epoch"
            report.say(f"source {source.name}: weight {source.weight:g}, {sequences}, {source.shards.path}")
    if evaluation.without:
        report.say(f"no part in the validation loss, having no validation split: {', '.join(evaluation.without)}")
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    if config.model.variant.startswith("gated_deltanet"):
        width, documents = config.model.memory_head_dim, config.data.reset_at_documents
        path = delta_rule.describe_path(grid.device, dtype, width, documents, config.model.compile)
        report.say(f"delta rule: {path}")
    if config.model.has_memory:
        report.say(
            f"memory operator: {describe_path(config.model, grid.device, dtype, config.data.reset_at_documents)}"
        )

    # Resume
    progress = course.start
    if start_from is not None:
        resharded = checkpoints.load_checkpoint(start_from, manifest, config, engine, grid)
        report.say(f"resumed from {start_from} at step {progress.step}, sequence {progress.position}")
        if resharded:
            report.say(resharded)
        for change in course.changes:
            report.say(f"a new phase begins at step {progress.step}: {change}")
        for change in checkpoints.changed_settings(manifest, config):
            report.say(f"changed since that checkpoint: {change}")
    elif config.run.init_from:
        engine.place(starting_weights(Path(config.run.init_from)))
    report.start(progress, flops_per_token(config.model, config.data.seq_len), course.steps.num_steps)
    if progress.step == 0:
        report.evaluation(progress, evaluation.run(engine), evaluation.find_needles(engine))

    loader = BatchLoader(
        course.mixture,
        batch_size=course.sizes(),
        micro_batch=config.data.micro_batch,
        data_rank=grid.data.rank,
        data_size=grid.data.size,
        sequence_rank=grid.sequence.rank,
        sequence_size=grid.sequence.size,
        start=progress.position,
        prefetch=config.data.prefetch,
        document_starts=config.data.reset_at_documents,
        skip_bad=config.data.on_bad == "skip",
    )
    saver = Saver(run_dir, config, sources, engine, grid, report.say, report.record, start_from)
    masked = MaskedRows(config.data.max_bad)
    window = config.faults.spike_window
    spikes = SpikeWatch(config.faults, grid.from_first(earlier_losses(run_dir, progress.step, window)))
    profiler = Profiler(config.log, run_dir, grid.rank, grid.device, report.say)
    first_step = agreed_at = progress.step
    garbage = Garbage(config.engine.gc_interval)
    try:
        asked = int(grid.gather_numbers([interruption.reason(run_dir, grid.is_first)]).max())
        while progress.step < course.steps.num_steps and not asked:
            profiler.begin(progress.step + 1)
            started = time.perf_counter()
            heart.phase("data", progress.step + 1)

            # Read one optimizer step of this rank; the loss is divided by the valid tokens of all ranks.
            batch: list[MicroBatch] = []
            failure: UserError | None = None
            try:
                batch = next(loader)
            except UserError as error:
                failure = error
            counted = grid.gather_numbers([count_valid(batch), failure is not None, len(loader.bad)])
            if counted[:, 1].any():
                grid.raise_agreed(failure)
            if counted[:, 2].any():
                for line in masked.agree(batch, loader.bad, grid, progress.step + 1):
                    report.say(line)
                counted = grid.gather_numbers([count_valid(batch)])
            num_valid = float(grid.distinct(counted)[:, 0].sum())
            if not num_valid:
                masked.stop_empty(progress.step + 1)
            scale = grid.replica.size / num_valid
            next_progress = course.next(progress)
            assert next_progress.position == loader.position
            rate = learning_rate(next_progress.tokens, config.schedule, config.optimizer)

            # Forward and backward
            wants_signals = next_progress.step % config.log.interval == 0
            local_loss = 0.0
            engine.begin_step(len(batch))
            for index, (tokens, labels, document_starts) in enumerate(batch):
                heart.phase("forward-backward", next_progress.step)
                if index:
                    engine.end_micro_batch()
                model.set_signals(wants_signals and index == len(batch) - 1)
                local_loss += float(engine.forward_backward(tokens, labels, scale, document_starts))
            signals = {name: float(value) for name, value in sorted(model.signals().items())} if wants_signals else {}
            heart.phase("agree", next_progress.step)
            asked = interruption.reason(run_dir, grid.is_first)
            shared = grid.gather_numbers(
                [
                    *(local_loss, memory_in_use(grid.device), saver.is_written(), asked),
                    *(engine.forward_time.seconds(), *signals.values()),
                ]
            )
            asked = int(shared[:, 3].max())
            loss = float(grid.distinct(shared)[:, 0].sum()) / num_valid

            # Update, unless the step is a bad one
            heart.phase("update", next_progress.step)
            norm, what, value = 0.0, "loss", loss
            spike = math.isfinite(loss) and loss > spikes.threshold()
            remedy = config.faults.on_spike if spike else config.faults.on_not_finite
            bad = spike or not math.isfinite(loss)
            if bad and remedy != "stop":
                engine.drop_step()
            elif not bad:
                try:
                    norm = engine.step(rate)
                except NotFiniteError as error:
                    bad, what, value = True, "gradient norm", error.norm
            if bad:
                text = (
                    spike_text(loss, spikes.threshold())
                    if spike
                    else f"the {what} is {value} at step {next_progress.step}"
                )
                if grid.is_first:
                    samples = samples_text(course.mixture, progress.position, next_progress.position)
                    kind = "spike" if spike else "not_finite"
                    record_fault(run_dir, kind, step=next_progress.step, remedy=remedy, text=text, samples=samples)
                if remedy == "stop" and spike:
                    raise AgreedError(
                        f"{text} at step {next_progress.step}; {FAULTS} has the batch's samples; {HOW_TO_GO_ON}"
                    )
                if remedy == "stop":
                    cause = describe_failure(engine, batch, scale, grid)
                    stop_not_finite(what, value, next_progress.step, cause, saver.last)
                if not spikes.count():
                    raise AgreedError(
                        f"{text}; it is bad step {spikes.bad} since the start, and faults.max_skips={config.faults.max_skips} "
                        f"are allowed; the last checkpoint is {saver.last}"
                    )
                if remedy == "rewind":
                    saver.finish()
                    if saver.last is not None:
                        manifest = checkpoints.read_manifest(saver.last)
                        checkpoints.load_checkpoint(saver.last, manifest, config, engine, grid)
                        text += f"; the weights are again those of {saver.last.name}"
                report.skipped(next_progress, loss, f"{text}; the update was not made")
            progress = next_progress
            if not bad:
                spikes.good(loss)
                batch_tokens = course.steps.batch_tokens(progress.step - 1)
                if every(config.parallel.check_interval, progress.step):
                    check_copies(engine, grid, progress.step, partial(way_back, run_dir, agreed_at, start_from))
                    agreed_at = progress.step
                report.step(
                    progress,
                    batch_tokens=batch_tokens,
                    loss=loss,
                    grad_norm=norm,
                    learning_rate=rate,
                    seconds=time.perf_counter() - started,
                    memory_bytes=float(shared[:, 1].max()),
                    signals=dict(zip(signals, shared[:, 5:].mean(0).tolist(), strict=True))
                    | slowest(shared[:, 4].tolist())
                    | (course.mixture.served(progress.position) if wants_signals else {})
                    | ({"masked_rows": masked.of_step(progress.step)} if config.data.on_bad == "skip" else {}),
                )

            # Evaluate and save
            complete = progress.step == course.steps.num_steps
            stopping = complete or progress.step - first_step == config.run.stop_after or asked
            # Who is asked to stop has seconds: evaluation waits for the next life, unless this was the last step.
            if complete or (every(config.eval.interval, progress.step) and not asked):
                heart.phase("evaluate", progress.step)
                model.set_signals(False)
                report.evaluation(progress, evaluation.run(engine), evaluation.find_needles(engine))
            heart.phase("save", progress.step)
            if saver.busy and shared[:, 2].all():
                saver.finish()
            # After a rewind too, or the next life would begin before the bad step.
            if stopping or every(config.checkpoint.interval, progress.step) or (bad and remedy == "rewind"):
                saver.save(progress, course.identity(progress.position), evaluation.prefix, last=bool(stopping))
            garbage.step(progress.step)
            if stopping:
                break
        profiler.close()
        if progress.step == course.steps.num_steps:
            if grid.is_first:
                facts = {"step": progress.step, "tokens": progress.tokens, "schedule_tokens": config.schedule.tokens}
                write_marker(run_dir, DONE, **facts)
        elif asked:
            report.say(
                f"stopping at step {progress.step} because of {reason_text(asked)}; the checkpoint is {saver.last}"
            )
            if grid.is_first and asked != STOP_FILE:
                write_marker(run_dir, PREEMPTED, step=progress.step, signal=reason_text(asked))
                record_fault(run_dir, "preempted", step=progress.step, text=f"saved after {reason_text(asked)}")
        report.summary(progress, sources.unigram_entropy, saver.last)
        if masked.total:
            report.say(masked.summary())
    except AgreedError as error:
        with contextlib.suppress(SaveFailed):  # the first reason is the one to tell
            saver.finish()
        report.note(f"stopped: {error}")
        raise
    finally:
        garbage.close()
        loader.close()
        saver.close()
        report.close()
    return progress


def open_sources(config: Config) -> Sources:
    """The datasets of data.path or data.sources."""
    cache, skip_bad = Cache.of(config.data), config.data.on_bad == "skip"
    return Sources.of(config.data, [ShardSet.open(path, cache, skip_bad=skip_bad) for path in paths(config.data)])


def count_valid(batch: list[MicroBatch]) -> int:
    """Labels that count."""
    return sum(int((micro_batch.labels != IGNORED).sum()) for micro_batch in batch)


def resolve(config: Config, sources: Sources) -> Config:
    """`config` with model.vocab_size taken from the data where it is 0, once it fits the data."""
    for source in sources.sources:
        check_documents(config, source.shards)
    vocab_size = config.model.vocab_size or sources.vocab_size
    if vocab_size < sources.vocab_size:
        raise UserError(
            f"model.vocab_size ({vocab_size}) is below the {sources.vocab_size} tokens of the dataset's tokenizer; "
            "set model.vocab_size=0 to take it from the data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def check_documents(config: Config, shards: ShardSet) -> None:
    """Refuse data.reset_at_documents where the dataset's documents do not begin where the model can begin anew.

    Raises:
        UserError: names the keys, and how to build the dataset.
    """
    if not config.data.reset_at_documents:
        return
    grid, key = config.model.document_grid, config.model.document_grid_key
    packing = shards.manifest.options.get("packing", {"kind": "concat"})
    rebuild = f"build the dataset with --packing bestfit --seq-len {config.data.seq_len} --align {grid}"
    if packing["kind"] != "bestfit":
        raise UserError(
            f"data.reset_at_documents=true needs whole documents in rows, but {shards.path} has packing {packing['kind']}; "
            f"{rebuild}, or set data.reset_at_documents=false"
        )
    if packing["align"] % grid:
        raise UserError(
            f"data.reset_at_documents=true needs documents that begin at multiples of {key} ({grid}), but those of "
            f"{shards.path} begin at multiples of {packing['align']}; {rebuild}, or set {key} to a divisor of "
            f"{packing['align']}"
        )


def describe_batches(config: Config, data_size: int) -> str:
    """What a step is made of, for the log."""
    rows = micro_batch_rows(config, data_size)
    text = (
        f"{config.data.batch_tokens:,} tokens = {data_size} x {config.batch_size // data_size // rows} micro-batches x "
        f"{rows} sequences x {config.data.seq_len}"
    )
    for change in config.data.batch_ramp:
        text += f", of {change.batch_tokens:,} tokens after {change.tokens:,}"
    return text


def make_run_dir(run_dir: Path) -> None:
    """Create the run folder."""
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create run folder {run_dir}: {error.strerror}; change run.dir or run.name") from error


HOW_TO_GO_ON = "start again with faults.on_spike=skip or rewind to leave it out"


def spike_text(loss: float, threshold: float) -> str:
    """What was seen."""
    return f"the loss is {loss:.4f}, above {threshold:.4f}: a spike (faults.spike_sigma)"


def way_back(run_dir: Path, agreed_at: int, start_from: Path | None) -> str:
    """What to do about copies that differ: a checkpoint made after the last check that passed may hold the difference.

    Args:
        agreed_at: step at which all copies last agreed, or the run's first.
    """
    saved = checkpoints.finished_folders(run_dir / "checkpoints")
    sound = next((folder for folder in saved if checkpoints.step_of(folder) <= agreed_at), start_from)
    if sound is not None:
        return f"set run.resume={sound}, which is from before they differed"
    if saved:
        return (
            f"no checkpoint is from step {agreed_at} or before, where they last agreed: start again in another run.name"
        )
    return "there is no checkpoint yet: start again"


def stop_not_finite(what: str, value: float, step: int, cause: str, last_saved: Path | None) -> NoReturn:
    """End the run on all ranks with one sentence.

    Raises:
        AgreedError: always.
    """
    saved = f"the last checkpoint is {last_saved}" if last_saved else "there is no checkpoint yet"
    raise AgreedError(
        f"the {what} is {value} at step {step}: {cause}; the update was not made and {saved}; if the data is sound, lower "
        "optimizer.learning_rate or lengthen schedule.warmup_fraction"
    )
