"""Which runs does a study have, with what sizes, tokens, batches and learning rates, and what do they cost?"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from titans_pretrain.config import Config, ModelConfig, load_config
from titans_pretrain.errors import UserError
from titans_pretrain.layout import choose_layout
from titans_pretrain.model.cost import flops_per_token, parameter_counts
from titans_pretrain.scaling.study import Study, Words


@dataclass(frozen=True)
class Series:
    """A variant at one place of the axes: what gets a law of its own."""

    name: str
    words: Words


@dataclass(frozen=True)
class Shape:
    """A model on the dial and what a token of it costs."""

    config: Config
    counts: Mapping[str, int]
    """N by study.COUNTS."""
    flops_per_token: float


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid."""

    name: str
    series: str
    size: str
    budget: str
    config: Config
    counts: Mapping[str, int]
    flops_per_token: float
    base: float
    """Of the learning-rate rule; 0: the config's own rate."""
    swept: bool = False
    """One of several rates tried at this size and budget."""

    @property
    def tokens(self) -> int:
        """D: what the run trains on, whole steps."""
        return self.config.steps.tokens(self.config.num_steps)

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Grid:
    """The runs of a study in order of launching."""

    sweep: tuple[PlannedRun, ...]
    """Runs that try learning rates; the winners are points of the grid."""
    points: tuple[PlannedRun, ...]
    """The points of the law. Where a sweep is not decided yet, without its own."""
    undecided: tuple[str, ...]
    """Series whose rate the sweep has not settled; their `points` have the middle of the values."""

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All there are, each once."""
        return (*self.sweep, *(run for run in self.points if not run.swept))


def all_series(study: Study) -> list[Series]:
    """Variants times axes."""
    found = []
    for variant, words in study.variants.items():
        for values in itertools.product(*study.axes.values()):
            point = dict(zip(study.axes, values, strict=True))
            parts = [variant, *(f"{key.partition('.')[2]}{_plain(value)}" for key, value in point.items())]
            more = [
                f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
                for key, value in point.items()
            ]
            found.append(Series(_file_name("-".join(parts)), (*words, *more)))
    return found


def shape(study: Study, series: Series, size: Words, vocab_size: int) -> Shape:
    """The model of one size.

    Args:
        vocab_size: of the tokenizer, for where the config leaves it to the data.
    """
    config = load_config(study.config, [*study.overrides, *series.words, *size])
    model = config.model if config.model.vocab_size else dataclasses.replace(config.model, vocab_size=vocab_size)
    if not model.vocab_size:
        raise UserError("model.vocab_size is 0 and there is no data to ask: add model.vocab_size=32000 to overrides")
    config = dataclasses.replace(config, model=model)
    return Shape(config, counts(model), flops_per_token(model, config.data.seq_len))


def counts(model: ModelConfig) -> dict[str, int]:
    """N in the ways of study.COUNTS: without embedding and head; with them; and without the memory's initial weights as
    well, which are a starting state rather than knowledge."""
    counted = parameter_counts(model)
    initial = 0
    if model.has_memory:
        initial = model.num_layers * model.resolved_memory_heads * sum(a * b for a, b in model.memory_shapes)
    return {
        "non_embedding": counted["non_embedding"],
        "total": counted["total"],
        "without_memory_init": counted["non_embedding"] - initial,
    }


def ranks(config: Config) -> int:
    """Processes of a run, as the launchers start them."""
    cluster = config.cluster
    return cluster.nodes * (cluster.processes_per_node or cluster.gpus_per_node or 1)


def complete(study: Study, of: Shape, tokens: float, base: float, name: str) -> Config:
    """The config of a run of `tokens`, rounded to whole steps, by the study's rules; base 0: the config's own rate.

    Raises:
        UserError: the ranks cannot share the batch.
    """
    config = of.config
    shared = config.parallel.sequence * config.parallel.tensor
    multiple = config.data.seq_len * max(1, ranks(config) // shared) * (config.data.micro_batch or 1)
    batch = config.data.batch_tokens
    if study.batch is not None:
        batch = study.batch.batch_tokens(tokens, multiple)
    rate = config.optimizer.learning_rate
    if base:
        rate = study.learning_rate.rate(base, of.counts[study.count], config.model.dim)
    steps = max(1, round(tokens / batch))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_tokens=batch),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        schedule=dataclasses.replace(config.schedule, tokens=steps * batch),
        run=dataclasses.replace(config.run, dir=str(study.folder), name=name),
    )
    choose_layout(config, ranks(config))
    return config


def budget_tokens(study: Study, of: Shape, budget: float) -> float:
    """Tokens of one budget for one model."""
    if study.budget_kind == "tokens":
        return budget
    if study.budget_kind == "flops":
        return budget / of.flops_per_token
    return budget * of.counts[study.count]


class _Slot(NamedTuple):
    """One size and budget of a series, to be filled with a run, or with several of other rates."""

    study: Study
    series: str
    size: str
    of: Shape
    budget: float

    def run(self, base: float, swept: bool = False) -> PlannedRun:
        label = budget_label(self.study, self.budget)
        name = _file_name(f"{self.series}-{self.size}-{label}" + (f"-lr{base:g}" if swept else ""))
        config = complete(self.study, self.of, budget_tokens(self.study, self.of, self.budget), base, name)
        counted, flops = self.of.counts, self.of.flops_per_token
        return PlannedRun(name, self.series, self.size, label, config, counted, flops, base, swept)


def make_grid(study: Study, vocab_size: int, bases: Mapping[str, float] | None = None) -> Grid:
    """All runs.

    Args:
        bases: the base of each series' learning-rate rule that a sweep has settled.

    Raises:
        UserError: a config is refused, sizes are not listed smallest first, or a batch ramp would fight the batch rule.
    """
    bases = bases or {}
    sweep, points, undecided = [], [], []
    for series in all_series(study):
        shapes = {size: shape(study, series, words, vocab_size) for size, words in study.size_words().items()}
        _check_rising(study, series, shapes)
        tried = study.learning_rate.sweep
        base = study.learning_rate.base
        if tried is not None:
            base = bases.get(series.name, 0.0)
            if not base:
                undecided.append(series.name)
                base = tried.values[len(tried.values) // 2]
        for place, (size, of) in enumerate(shapes.items()):
            budgets = [budget for budget in study.budgets if _is_within(study, of, budget)]
            for budget in budgets:
                slot = _Slot(study, series.name, size, of, budget)
                if tried is None or place >= tried.sizes or budget != budgets[0]:
                    points.append(slot.run(base))
                    continue
                here = [slot.run(value, swept=True) for value in tried.values]
                sweep += here
                points += [run for run in here if run.base == bases.get(series.name)]
    if not sweep and not points:
        raise UserError("no run is left: budgets.within shuts out every size and budget")
    return Grid(tuple(sweep), tuple(points), tuple(undecided))


def _is_within(study: Study, of: Shape, budget: float) -> bool:
    if not study.within:
        return True
    low, high = study.within
    return low <= budget_tokens(study, of, budget) / of.counts[study.count] <= high


def budget_label(study: Study, budget: float) -> str:
    """`20x`, `1e18` or `400k`."""
    if study.budget_kind == "tokens_per_parameter":
        return f"{budget:g}x"
    if study.budget_kind == "flops":
        return f"{budget:.3g}".replace("e+", "e")
    return short(budget)


def short(number: float) -> str:
    """A count in three digits: `400k`, `1.5M`, `15B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _check_rising(study: Study, series: Series, shapes: Mapping[str, Shape]) -> None:
    sized = [(size, of.counts[study.count]) for size, of in shapes.items()]
    for (before, n), (after, m) in itertools.pairwise(sized):
        if m <= n:
            raise UserError(
                f"sizes must be listed smallest first, but for {series.name} {after} has {m:,} parameters and {before} {n:,}"
            )
    if any(of.config.data.batch_ramp for of in shapes.values()) and study.batch is not None:
        raise UserError("data.batch_ramp and the study's batch rule both set the batch: remove one of them")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)
