"""What is in a study's YAML: variants, sizes, budgets, axes and the rules between them (docs/scaling.md has every key)."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.errors import UserError

COUNTS = ("non_embedding", "total", "without_memory_init")
BUDGETS = ("tokens", "tokens_per_parameter", "flops")

Words = tuple[str, ...]
"""Overrides, `section.key=value` each."""


@dataclass(frozen=True)
class Dial:
    """Sizes of one shape: layers say all. dim = layers * aspect, rounded to the nearest multiple of head_dim and at least one;
    num_heads = dim / head_dim."""

    layers: tuple[int, ...]
    aspect: float = 64.0
    head_dim: int = 64

    def words(self, layers: int) -> Words:
        heads = max(1, round(layers * self.aspect / self.head_dim))
        return (f"model.num_layers={layers}", f"model.dim={heads * self.head_dim}", f"model.num_heads={heads}")


@dataclass(frozen=True)
class BatchRule:
    """batch_tokens = tokens * (D / reference) ^ exponent, to the nearest multiple of what the ranks take, at least one."""

    tokens: int
    reference: float = 0.0
    exponent: float = 0.0

    def batch_tokens(self, training_tokens: float, multiple: int) -> int:
        wanted = self.tokens * (training_tokens / self.reference) ** self.exponent if self.exponent else self.tokens
        return max(1, round(wanted / multiple)) * multiple


@dataclass(frozen=True)
class Sweep:
    """Values of the base tried at the smallest sizes and their first budget; the best serves all sizes of that series."""

    values: tuple[float, ...]
    sizes: int = 1


@dataclass(frozen=True)
class RateRule:
    """learning_rate = base * (x / reference) ^ -exponent, x being N (by study.count) or model.dim."""

    base: float = 0.0
    by: str = "parameters"
    reference: float = 0.0
    exponent: float = 0.0
    sweep: Sweep | None = None

    def rate(self, base: float, parameters: float, dim: int) -> float:
        x = parameters if self.by == "parameters" else dim
        rate = base * (x / self.reference) ** -self.exponent if self.exponent else base
        return float(f"{rate:.4g}")  # a rate of 16 digits says no more


@dataclass(frozen=True)
class Collecting:
    """Which loss a run counts with, and when it does not count."""

    loss: str = "valid"
    """valid: the validation loss of the last step; train: the mean training loss of the `last` steps."""
    last: int = 10
    spike: float = 0.5
    """Nats: a run whose training loss, a mean of `last` steps, rises so far above its lowest before has diverged."""


@dataclass(frozen=True)
class Study:
    """One YAML."""

    name: str
    config: str
    variants: Mapping[str, Words]
    budget_kind: str
    budgets: tuple[float, ...]
    within: tuple[float, ...] = ()
    """Tokens per parameter, from and to, of the runs that are made; empty: all."""
    dial: Dial | None = None
    sizes: Mapping[str, Words] = field(default_factory=dict)
    dir: str = "runs/scaling"
    overrides: Words = ()
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    batch: BatchRule | None = None
    learning_rate: RateRule = RateRule()
    count: str = "non_embedding"
    parallel: int = 1
    collect: Collecting = Collecting()
    bootstrap: int = 200

    @property
    def folder(self) -> Path:
        """Where the runs are, each in a folder of its own, and what is collected and fitted."""
        return Path(self.dir) / self.name

    def size_words(self) -> dict[str, Words]:
        """The overrides of every size, smallest first."""
        if self.dial is not None:
            return {f"l{layers}": self.dial.words(layers) for layers in self.dial.layers}
        return dict(self.sizes)


def read_study(path: Path) -> Study:
    """Read and check a study.

    Raises:
        UserError: no such file, an unknown key (with the nearest name), a missing one, a value of the wrong kind.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read study {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"study {path} is not valid YAML: {' '.join(str(error).split())}") from error
    return study_from_dict(tree, str(path))


def study_from_dict(tree: Any, where: str = "the study") -> Study:
    """A study from what its YAML holds."""
    tree = _mapping(tree, where)
    names = {f.name for f in dataclasses.fields(Study)} - {"budget_kind", "within"}
    _check_keys(tree, names, where, ("name", "config", "variants", "budgets"))
    if ("dial" in tree) == ("sizes" in tree):
        raise UserError(f"{where} must have either dial (layers, aspect, head_dim) or sizes (overrides by name)")
    given = dict(tree)
    budgets = _mapping(given.pop("budgets"), f"{where}: budgets")
    budgets = dict(budgets)
    if "within" in budgets:
        given["within"] = _numbers(budgets.pop("within"), f"{where}: budgets.within")
        if len(given["within"]) != 2:
            raise UserError(f"{where}: budgets.within must be two numbers, from and to so many tokens per parameter")
    if len(budgets) != 1 or next(iter(budgets)) not in BUDGETS:
        raise UserError(
            f"{where}: budgets must have one key of {', '.join(BUDGETS)}, not {', '.join(map(str, budgets))}"
        )
    kind, values = next(iter(budgets.items()))
    given["budget_kind"] = kind
    given["budgets"] = _numbers(values, f"{where}: budgets.{kind}")
    for key in ("variants", "sizes"):
        if key in given:
            each = _mapping(given[key], f"{where}: {key}")
            given[key] = {str(name): _words(words, f"{where}: {key}.{name}") for name, words in each.items()}
    if "overrides" in given:
        given["overrides"] = _words(given["overrides"], f"{where}: overrides")
    if "axes" in given:
        axes = _mapping(given["axes"], f"{where}: axes")
        if not all(isinstance(values, list) and values for values in axes.values()):
            raise UserError(
                f"{where}: axes must be a list of values for each key, such as model.memory_chunk: [16, 64]"
            )
        given["axes"] = {str(key): tuple(values) for key, values in axes.items()}
    if "dial" in given:
        dial = _section(Dial, given["dial"], f"{where}: dial", ("layers",))
        layers = tuple(int(n) for n in _numbers(dial.pop("layers"), f"{where}: dial.layers"))
        given["dial"] = Dial(layers, **_all_numbers(dial, f"{where}: dial"))
    if "batch" in given:
        batch = _all_numbers(_section(BatchRule, given["batch"], f"{where}: batch", ("tokens",)), f"{where}: batch")
        given["batch"] = BatchRule(**{**batch, "tokens": int(batch["tokens"])})
        _check_rule(given["batch"], f"{where}: batch")
    if "learning_rate" in given:
        given["learning_rate"] = _rate_rule(given["learning_rate"], f"{where}: learning_rate")
    if "collect" in given:
        given["collect"] = _collecting(given["collect"], f"{where}: collect")
    for key in ("parallel", "bootstrap"):
        if key in given:
            given[key] = int(_number(given[key], f"{where}: {key}"))
    if given.get("count", COUNTS[0]) not in COUNTS:
        raise UserError(f"{where}: count must be one of {', '.join(COUNTS)}, not {given['count']!r}")
    for key in ("name", "config", "dir"):
        if key in given and not isinstance(given[key], str):
            raise UserError(f"{where}: {key} must be a string, not {given[key]!r}")
    if "/" in given["name"] or not given["name"]:
        raise UserError(f"{where}: name must be a folder name, not {given['name']!r}; use dir for its parent")
    return Study(**given)


def _rate_rule(value: Any, where: str) -> RateRule:
    tree = _section(RateRule, value, where)
    by = tree.pop("by", "parameters")
    if by not in ("parameters", "dim"):
        raise UserError(f"{where}.by must be parameters or dim, not {by!r}")
    sweep = None
    if "sweep" in tree:
        parts = _section(Sweep, tree.pop("sweep"), f"{where}.sweep", ("values",))
        values = _numbers(parts["values"], f"{where}.sweep.values")
        sweep = Sweep(values, int(_number(parts.get("sizes", 1), f"{where}.sweep.sizes")))
    rule = RateRule(by=by, sweep=sweep, **_all_numbers(tree, where))
    if (sweep is None) == (rule.base == 0):
        raise UserError(f"{where} must have either base or sweep.values, the bases to try")
    _check_rule(rule, where)
    return rule


def _check_rule(rule: BatchRule | RateRule, where: str) -> None:
    if rule.exponent and not rule.reference > 0:
        raise UserError(f"{where}.exponent is {rule.exponent}, so {where}.reference must say at what the base holds")


def _collecting(value: Any, where: str) -> Collecting:
    tree = _section(Collecting, value, where)
    loss = tree.pop("loss", "valid")
    if loss not in ("valid", "train"):
        raise UserError(f"{where}.loss must be valid or train, not {loss!r}")
    numbers = _all_numbers(tree, where)
    return Collecting(loss=loss, last=int(numbers.get("last", 10)), spike=numbers.get("spike", 0.5))


def _section(cls: Any, value: Any, where: str, required: Sequence[str] = ()) -> dict[str, Any]:
    tree = _mapping(value, where)
    _check_keys(tree, {f.name for f in dataclasses.fields(cls)}, where, required)
    return dict(tree)


def _check_keys(tree: Mapping[str, Any], names: set[str], where: str, required: Sequence[str] = ()) -> None:
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(names))}"
            raise UserError(f"{where}: unknown key {key}; {hint}")
    for key in required:
        if key not in tree:
            raise UserError(f"{where} lacks the key {key}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where} must hold keys and values, not {value!r}")
    return value


def _words(value: Any, where: str) -> Words:
    if not isinstance(value, list) or not all(isinstance(word, str) and "=" in word for word in value):
        raise UserError(f"{where} must be a list of section.key=value, such as [model.variant=mag], not {value!r}")
    return tuple(value)


def _number(value: Any, where: str) -> float:
    try:  # YAML reads 1e18 as a string
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise UserError(f"{where} must be a number of 0 or more, not {value!r}")
    return number


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    """Numbers above 0, rising."""
    numbers = tuple(_number(each, where) for each in value) if isinstance(value, list) else ()
    if not numbers or numbers[0] <= 0 or any(b <= a for a, b in itertools.pairwise(numbers)):
        raise UserError(f"{where} must be a list of numbers above 0, smallest first, not {value!r}")
    return numbers


def _all_numbers(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        key: int(number) if key == "head_dim" else number
        for key, number in ((key, _number(value, f"{where}.{key}")) for key, value in tree.items())
    }
