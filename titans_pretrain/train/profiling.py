"""Where does the time of a step go? A window of steps under torch's profiler, on every rank (log.profile_start).

RUN/profile/rank_00000.json is a trace for chrome://tracing or Perfetto, rank_00000.txt the operations that took longest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from titans_pretrain.config import LogConfig

ROWS = 40
"""Operations in the summary."""


class Profiler:
    """Profiles steps profile_start to profile_start + profile_steps - 1.

    Args:
        say: rank 0's log.
    """

    def __init__(
        self, config: LogConfig, run_dir: Path, rank: int, device: torch.device, say: Callable[[str], Any]
    ) -> None:
        self._first, self._stop = config.profile_start, config.profile_start + config.profile_steps
        self._path = run_dir / "profile" / f"rank_{rank:05d}.json"
        self._say, self._cuda = say, device.type == "cuda"
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """`step` begins."""
        if step == self._stop:
            self.close()
        if step == self._first and self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def close(self) -> None:
        """End the window if it is open, and write what it found."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        found.stop()
        self._path.parent.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self._path))
        order = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        self._path.with_suffix(".txt").write_text(str(found.key_averages().table(sort_by=order, row_limit=ROWS)))
        self._say(f"profiled steps {self._first} to {self._stop - 1}: {self._path.parent}")
