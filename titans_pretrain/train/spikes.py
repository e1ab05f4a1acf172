"""What becomes of a bad step: a loss or gradient that is not finite, or a loss far above those before it?

`skip` drops the update: weights and optimizer stay, the step counts, its tokens are gone. `rewind` also goes back to the
weights of the last checkpoint before it, since a spike is often the fruit of the updates before it, and trains on with the
data after it: the batches in between are left out, as PaLM did (arXiv 2204.02311, section 5.1). `stop` ends the run. All
ranks see the same numbers and decide alike.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titans_pretrain.config import FaultsConfig
from titans_pretrain.data.mixture import Mixture

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution, over its standard deviation, inverted."""


class SpikeWatch:
    """The losses of the last good steps, and how many bad ones there were since the start.

    Args:
        config: the section `faults`.
        losses: of the good steps before, oldest first.
    """

    def __init__(self, config: FaultsConfig, losses: Iterable[float] = ()) -> None:
        self._config = config
        self._losses: deque[float] = deque(losses, maxlen=config.spike_window)
        self.bad = 0

    def threshold(self) -> float:
        """Loss above which a step is a spike: median + spike_sigma standard deviations, the latter from the median absolute
        deviation, which a spike before does not move. Infinite until half the window is there."""
        if self._config.on_spike == "off" or len(self._losses) < self._config.spike_window // 2:
            return float("inf")
        middle = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self._config.spike_sigma * _MAD_TO_SIGMA * deviation

    def good(self, loss: float) -> None:
        """A step was made."""
        self._losses.append(loss)

    def count(self) -> bool:
        """One more bad step -> whether there may be that many (faults.max_skips)."""
        self.bad += 1
        return self.bad <= self._config.max_skips


def earlier_losses(run_dir: Path, step: int, count: int) -> list[float]:
    """The losses of the last `count` good steps up to `step` in a run's metrics, so that a run that was interrupted decides as
    one that was not."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found: deque[float] = deque(maxlen=count)
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row and row["step"] <= step:
            found.append(row["loss"])
    return list(found)


def samples_text(mixture: Mixture, first: int, stop: int) -> dict[str, Any]:
    """Sequences first <= number < stop of the stream, for faults.jsonl: their numbers, and how many are of which source."""
    sources = Counter(mixture.place(index)[0] for index in range(first, stop))
    return {
        "first": first,
        "count": stop - first,
        "by_source": {str(source): n for source, n in sorted(sources.items())},
    }
