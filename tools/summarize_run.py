"""How did these runs go? Reads their config.yaml and metrics.jsonl; a run still under way is fine.

python tools/summarize_run.py RUN [RUN ...]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from titans_pretrain.config import Config, StepPlan, load_config
from titans_pretrain.data.fetch import manifest_at
from titans_pretrain.errors import UserError, exit_on_user_error

AVERAGED_STEPS = 10
"""One step's loss depends on its batch; the end of training is the mean of so many."""


class Metrics(NamedTuple):
    """The rows of metrics.jsonl by kind; report.py says what they hold."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_metrics(run: Path) -> Metrics:
    """Read a run's metrics.jsonl. A last line that is still being written is left out.

    Raises:
        UserError: there is none, or a line before the last is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a run folder that training has written") from error
    metrics = Metrics([], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged: {error}") from error
        if "loss" in row:
            metrics.steps.append(row)
        elif "valid_loss" in row:  # others say what a checkpoint took
            metrics.evaluations.append(row)
    return metrics


def summarize(run: Path) -> list[tuple[str, str]]:
    """What to tell of one run, as (subject, text).

    Raises:
        UserError: `run` is not a run folder.
    """
    metrics = read_metrics(run)
    config = load_config(run / "config.yaml")
    told = [
        ("run", str(run)),
        ("model", f"{config.model.variant}, {config.model.num_layers} blocks, width {config.model.dim}"),
        ("data", data_text(config)),
    ]
    if metrics.steps:
        first, last = metrics.steps[0], metrics.steps[-1]
        end = metrics.steps[-AVERAGED_STEPS:]
        seconds = sum(row["seconds"] for row in metrics.steps)
        per_second = [row.get("tokens_per_second", config.data.batch_tokens / row["seconds"]) for row in metrics.steps]
        rate = sum(speed * row["seconds"] for speed, row in zip(per_second, metrics.steps, strict=True)) / seconds
        # What is left is planned from here: earlier phases may have had other batches.
        plan = StepPlan(config.data, config.schedule.tokens, last["step"], last["tokens"])
        told += [
            ("progress", f"step {last['step']:,} of {plan.num_steps:,}, {last['tokens']:,} tokens"),
            (
                "training loss",
                f"{first['loss']:.3f} -> {sum(row['loss'] for row in end) / len(end):.3f} nats per token "
                f"(first step -> mean of the last {len(end)})",
            ),
            (
                "speed",
                f"{rate:,.0f} tokens/s over {seconds:,.0f} s of training steps",
            ),
        ]
    told += sources_text(metrics)
    if metrics.evaluations:
        first, last = metrics.evaluations[0], metrics.evaluations[-1]
        for name in (name for name in last if name.startswith("valid_loss")):
            start = f"{first[name]:.3f} -> " if name in first else ""
            told.append(
                (
                    "validation" + name.removeprefix("valid_loss").replace("_x", " x", 1).replace("/", " ", 1),
                    f"{start}{last[name]:.3f} nats per token, perplexity {math.exp(last[name]):,.1f} at step {last['step']:,}",
                )
            )
    if (run / "tensorboard").is_dir():
        told.append(("TensorBoard", f".venv/bin/tensorboard --logdir {run / 'tensorboard'}"))
    return told


def sources_text(metrics: Metrics) -> list[tuple[str, str]]:
    """What each source of a mixture has served, from the last step that says so."""
    nothing: dict[str, Any] = {}
    said = next((row for row in reversed(metrics.steps) if any(key.startswith("tokens/") for key in row)), nothing)
    served = {key.removeprefix("tokens/"): tokens for key, tokens in said.items() if key.startswith("tokens/")}
    return [
        (
            f"source {name}",
            f"{tokens:,} tokens, {tokens / sum(served.values()):.1%}, {said[f'epochs/{name}']:.2f} epochs",
        )
        for name, tokens in served.items()
    ]


def data_text(config: Config) -> str:
    """The yardstick for every loss: what a model scores that knows only how often each token occurs (in each source)."""
    weights = [source.weight for source in config.data.sources] or [1.0]
    paths = [source.path for source in config.data.sources] or [config.data.path]
    listed = ", ".join(paths)
    try:
        entropies = [manifest_at(path).unigram_entropy for path in paths]
    except UserError:
        return f"{listed} (no longer there, so the unigram entropy is unknown)"
    entropy = sum(w * e for w, e in zip(weights, entropies, strict=True)) / sum(weights)
    return f"{listed}, unigram entropy {entropy:.3f} nats per token"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    for number, run in enumerate(parser.parse_args(argv).runs):
        if number:
            print()
        for subject, text in summarize(run):
            print(f"{subject:<16} {text}")


if __name__ == "__main__":
    main()
