"""Which data does a run see from here on: the stream and batch sizes it has, those of its checkpoint, or a new phase?

Nothing is counted along the way. From the step of a checkpoint, the tokens and where the stream began (`Origin`) follow the
number of the next sequence and every later batch. What the past was made of must be what the config says, or the run would
not be the one it continues; what lies ahead may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.config import Config, DataConfig, StepPlan, config_from_dict
from titans_pretrain.data.blend import PERIOD
from titans_pretrain.data.mixture import Mixture, Sources, phase_starts
from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import Progress

FIRST_WINDOW = 16
"""Shards in a shuffle window before checkpoints said how many."""


@dataclass(frozen=True)
class Origin:
    """Where the present phase of a run began; all 0 unless run.new_phase began another."""

    stream_tokens: int = 0
    """Tokens the run had seen before sequence 0 of its stream."""
    step: int = 0
    tokens: int = 0
    """Steps made and tokens seen when the present data.batch_tokens began to hold."""


@dataclass(frozen=True)
class Course:
    """The data of a run from `start` on."""

    mixture: Mixture
    steps: StepPlan
    origin: Origin
    start: Progress
    changes: tuple[str, ...] = ()
    """Why a new phase begins at `start`, as `what: old -> new`; empty where none does."""

    def sizes(self) -> Iterator[int]:
        """Sequences of each step that is left."""
        for step in range(self.start.step, self.steps.num_steps):
            yield self.steps.batch_tokens(step) // self.mixture.seq_len

    def next(self, progress: Progress) -> Progress:
        """Where the run is after one more step."""
        tokens = self.steps.batch_tokens(progress.step)
        return Progress(progress.step + 1, progress.position + tokens // self.mixture.seq_len, progress.tokens + tokens)

    def identity(self, position: int) -> dict[str, Any]:
        """For the manifest of a checkpoint taken at `position`."""
        return {"origin": asdict(self.origin), "stream": self.mixture.identity(position)}


def chart(config: Config, sources: Sources, checkpoint: Path | None, manifest: Mapping[str, Any] | None) -> Course:
    """The course from a checkpoint, or from the beginning.

    Raises:
        UserError: another stream or another batch than the checkpoint's, without run.new_phase; or a source would be seen
            more often than data.sources allows.
    """
    if manifest is None:
        return _checked(config, Course(*_from(config, sources, Origin()), Progress()))
    progress = Progress(manifest["step"], manifest["position"], manifest["tokens"])
    saved_config = config_from_dict(manifest["config"])
    identity = manifest.get("data") or _identity_of_old(manifest, saved_config)
    origin = Origin(**identity["origin"])
    mixture, steps, _ = _from(config, sources, origin)
    stream = list(_stream_differences(identity["stream"], mixture.identity(progress.position), saved_config, config))
    saved_steps = StepPlan(saved_config.data, saved_config.schedule.tokens, origin.step, origin.tokens)
    batch = _batch_difference(saved_steps, steps, progress, saved_config.data, config.data)
    differences = stream + ([batch] if batch else [])
    if not differences:
        return _checked(config, Course(mixture, steps, origin, progress))
    if not config.run.new_phase:
        what, saved, here, _ = differences[0]
        raise UserError(
            f"{checkpoint} was trained {what}{saved}, but the config says {here}; set it back or start a new run.name, or set "
            f"run.new_phase=true to let this run go on with it from step {progress.step}"
            + (", its data from their beginning" if stream else "")
        )
    began = Origin(progress.tokens if stream else origin.stream_tokens, progress.step, progress.tokens)
    start = Progress(progress.step, 0 if stream else progress.position, progress.tokens)
    changes = tuple(f"{key}: {saved} -> {here}" for _, saved, here, key in differences)
    return _checked(config, Course(*_from(config, sources, began), start, changes))


def _from(config: Config, sources: Sources, origin: Origin) -> tuple[Mixture, StepPlan, Origin]:
    phases = phase_starts(config.data, sources, origin.stream_tokens)
    mixture = Mixture(sources, config.data.seq_len, config.run.seed, phases)
    return mixture, StepPlan(config.data, config.schedule.tokens, origin.step, origin.tokens), origin


def _checked(config: Config, course: Course) -> Course:
    left = course.steps.tokens(course.steps.num_steps) - course.origin.stream_tokens
    course.mixture.check_epochs(max(0, left) // config.data.seq_len)
    return course


def _identity_of_old(manifest: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Of a checkpoint from before there were mixtures."""
    source = {"name": "data", "dataset": manifest["dataset_fingerprint"], "shuffle_window": FIRST_WINDOW}
    phases = [{"start": 0, "quotas": [PERIOD]}]
    stream = {"seq_len": config.data.seq_len, "seed": config.run.seed, "period": PERIOD}
    return {"origin": asdict(Origin()), "stream": {**stream, "sources": [source], "phases": phases}}


Difference = tuple[str, str, str, str]
"""A phrase such as "with run.seed=", what the checkpoint had, what the config says, and the key or what else is meant."""


def _stream_differences(
    saved: Mapping[str, Any], here: Mapping[str, Any], saved_config: Config, config: Config
) -> Iterator[Difference]:
    for name, key in (("seq_len", "data.seq_len"), ("seed", "run.seed")):
        if saved[name] != here[name]:
            yield f"with {key}=", str(saved[name]), str(here[name]), key
    olds, news = saved["sources"], here["sources"]
    if len(olds) != len(news):
        yield "on ", _listed(saved_config.data, olds), _listed(config.data, news), "data.sources"
        return
    places = zip(olds, news, _paths(saved_config.data), _paths(config.data), strict=True)
    for number, (old, new, old_path, new_path) in enumerate(places):
        key = f"data.sources[{number}].path" if config.data.sources else "data.path"
        if old["dataset"] != new["dataset"]:
            old_text = f"dataset {old['dataset'][:12]} ({old_path})"
            yield "on ", old_text, f"{key} {new_path}, which is dataset {new['dataset'][:12]}", key
        elif old["shuffle_window"] != new["shuffle_window"]:
            windows = [f"windows of {source['shuffle_window']} shards" for source in (old, new)]
            yield "on sequences shuffled in ", windows[0], f"{windows[1]} in this version of the code", "shuffle window"
    weights = [[(p["start"], [q / s["period"] for q in p["quotas"]]) for p in s["phases"]] for s in (saved, here)]
    if weights[0] != weights[1]:
        old_text, new_text = (_weights_text(phases) for phases in weights)
        yield (
            "with the sources weighted ",
            old_text,
            f"{new_text} (data.sources, data.phases)",
            "weights of data.sources",
        )


def _batch_difference(
    saved: StepPlan, here: StepPlan, progress: Progress, saved_data: DataConfig, data: DataConfig
) -> Difference | None:
    """Where the past had batches of other sizes, or the size that holds now is not the one of the config."""
    if here.past(progress.step) == saved.past(progress.step):
        return None
    key = "data.batch_tokens" if data.batch_tokens != saved_data.batch_tokens else "data.batch_ramp"
    texts = []
    for part in (saved_data, data):
        ramp = [(change.tokens, change.batch_tokens) for change in part.batch_ramp]
        texts.append(str(part.batch_tokens if key == "data.batch_tokens" else ramp))
    return f"with {key}=", texts[0], texts[1], key


def _paths(data: DataConfig) -> list[str]:
    return [source.path for source in data.sources] or [data.path]


def _listed(data: DataConfig, sources: list[dict[str, Any]]) -> str:
    count = len(sources)
    return f"{count} dataset{'s' if count > 1 else ''} ({', '.join(_paths(data))})"


def _weights_text(phases: list[tuple[int, list[float]]]) -> str:
    return ", ".join(f"{[round(w, 5) for w in weights]} from sequence {start} on" for start, weights in phases)
