"""How far is it? A bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30


class Progress:
    """Counts bytes of input (`total` of them, None: unknown) and tokens of output, on standard error."""

    def __init__(self, total: int | None):
        self._total = total
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=not sys.stderr.isatty())
        self._started = self._last = time.monotonic()
        self._bytes = self._tokens = 0

    def update(self, consumed: int, tokens: int) -> None:
        self._bytes += consumed
        self._tokens += tokens
        self._bar.update(consumed)
        now = time.monotonic()
        rate = self._tokens / max(now - self._started, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{rate / 1e6:.2f} Mtoken/s", refresh=False)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            share = f" of {self._total / 1e6:.0f}" if self._total else ""
            print(
                f"tokenising: {self._bytes / 1e6:.0f}{share} MB, {self._tokens / 1e6:.1f} Mtoken, {rate / 1e6:.2f} Mtoken/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()
