"""What is due when: the learning rate after so many tokens, and what comes every so many steps. Pure functions, so that
resuming needs no scheduler state."""

from __future__ import annotations

import math

from titans_pretrain.config import OptimizerConfig, ScheduleConfig


def learning_rate(tokens: int, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> float:
    """The rate of the update that completes `tokens` tokens of training.

    Warm-up rises linearly from 0 over the first `warmup_fraction`. Then `cosine` falls along half a cosine to
    `final_fraction` of the peak at `schedule.tokens`; `wsd` stays at the peak and falls linearly to the same value over
    the last `decay_fraction` (arXiv 2404.06395). Beyond `schedule.tokens` the rate stays at its final value.
    """
    done = min(tokens / schedule.tokens, 1.0)
    return optimizer.learning_rate * _fraction_of_peak(done, schedule)


def every(interval: int, step: int) -> bool:
    """Whether `step` is one of those `interval` asks for; 0 asks for none."""
    return interval > 0 and step % interval == 0


def _fraction_of_peak(done: float, schedule: ScheduleConfig) -> float:
    warmup, final = schedule.warmup_fraction, schedule.final_fraction
    if done < warmup:
        return done / warmup
    if schedule.kind == "wsd":
        left = 1.0 - done
        if left >= schedule.decay_fraction:
            return 1.0
        return final + (1.0 - final) * left / schedule.decay_fraction
    if warmup == 1.0:
        return 1.0
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / (1.0 - warmup)))
