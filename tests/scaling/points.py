"""Points of laws that are known, and a small study they could have come from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.scaling.collect import Point
from titans_pretrain.scaling.law import Law, optimum
from titans_pretrain.scaling.study import Study, study_from_dict

Array = NDArray[np.float64]

REFIT = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Besiroglu et al., arXiv 2404.10102, table 1: the law through the points of Hoffmann et al.'s figure 4."""
REFIT_ERRORS = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
"""Their standard errors, from the same table."""


def noisy(law: Law, n: Array, d: Array, noise: float, seed: int) -> Array:
    """Losses of `law` with log-normal noise."""
    return law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))


def chinchilla_points(noise: float, seed: int) -> tuple[Array, Array, Array]:
    """240 (N, D, loss) as in Hoffmann et al.: nine isoFLOP curves of 6e18 to 3e21, sizes of 44M to 16B about the best one."""
    n, d = [], []
    for number, flops in enumerate((6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)):
        best = optimum(REFIT, flops, lambda x: 6 * x, 1e6, 1e12).parameters
        sizes = np.geomspace(max(best / 10, 4.4e7), min(best * 10, 1.6e10), 27 if number < 6 else 26)
        n += list(sizes)
        d += list(flops / (6 * sizes))
    sizes, tokens = np.array(n), np.array(d)
    return sizes, tokens, noisy(REFIT, sizes, tokens, noise, seed)


def study(**changes: Any) -> Study:
    """A study over the demo's config, without data."""
    tree: dict[str, Any] = {
        "name": "known",
        "config": "configs/demo.yaml",
        "overrides": ["model.vocab_size=4096", "cluster.gpus_per_node=0"],
        "variants": {"mag": ["model.variant=mag"]},
        "dial": {"layers": [1, 2, 3, 4], "aspect": 32, "head_dim": 16},
        "budgets": {"flops": [1e12, 1e13, 1e14]},
        "bootstrap": 20,
    }
    for key, value in changes.items():
        tree.pop({"sizes": "dial", "dial": "sizes"}.get(key, ""), None)
        tree[key] = value
    return study_from_dict(tree)


def point(n: float, d: float, loss: float, **changes: Any) -> Point:
    """A run that came to this; it costs 6 N a token."""
    known: dict[str, Any] = {
        "run": f"mag-{n:.4g}-{d:.4g}",
        "series": "mag",
        "size": f"{n:.4g}",
        "budget": f"{6 * n * d:.2g}",
        "swept": False,
        "parameters": {"non_embedding": n, "total": 1.5 * n, "without_memory_init": 0.9 * n},
        "tokens": d,
        "flops_per_token": 6 * n,
        "loss": loss,
        "valid_loss": loss,
        "train_loss": loss,
        "learning_rate": 1e-3,
        "batch_tokens": 1024,
        "seconds": 100.0,
        "tokens_per_second": d / 100,
        "mfu": 0.25,
        "peak_tflops": 100.0,
    }
    return Point(**{**known, **changes})


def law_points(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Three isoFLOP curves of seven sizes about the best."""
    points = []
    for flops in (1e16, 1e17, 1e18):
        best = optimum(law, flops, lambda x: 6 * x, 1e3, 1e12).parameters
        sizes = np.round(np.geomspace(best / 8, best * 8, 7))
        losses = noisy(law, sizes, flops / (6 * sizes), noise, seed + int(np.log10(flops)))
        points += [
            point(float(n), flops / (6 * n), float(loss), budget=f"{flops:g}")
            for n, loss in zip(sizes, losses, strict=True)
        ]
    return points
