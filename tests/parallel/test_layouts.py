"""The table: every layout x ZeRO stage x variant trains as one process does.

Loss, gradient norm and every gradient, gathered, over five optimizer steps, to 1e-5 in fp32 (the gated delta rule in two layers
to 4e-5). `make test` runs a part of the table that has every layout, strategy, stage and variant in it; `make test-layouts`
runs all of it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.parallel.layouts import SEQ_LEN, STEPS, Outcome, run_cases, tree
from titans_pretrain.config import VARIANTS, config_from_dict
from titans_pretrain.errors import UserError
from titans_pretrain.layout import choose_layout

WHOLE_TABLE = bool(os.environ.get("TITANS_WHOLE_TABLE"))
TOLERANCE, RECURRENT_TOLERANCE = 1e-5, 4e-5
"""The second is the gated delta rule's in two layers, which enlarges rounding: one process differs from itself by 0.9e-5 where
its batch is cut into micro-batches, the Titans by 0.2e-5."""
GATHERED = range(STEPS) if WHOLE_TABLE else (0, STEPS - 1)
"""Steps after which gradients are compared: gathering them takes as long as making them."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2": {"parallel__tensor": 2},
    "sequence 2, head_exchange": {"parallel__sequence": 2, "parallel__memory": "head_exchange"},
    "sequence 2, hand_off": {"parallel__sequence": 2, "parallel__memory": "hand_off"},
    "sequence 2, chunk_scan": {
        "parallel__sequence": 2,
        "parallel__memory": "chunk_scan",
        "model__memory_chunk": SEQ_LEN,
    },
    "data 2 x tensor 2": {"parallel__data": 2, "parallel__tensor": 2},
    "tensor 2 x sequence 2": {"parallel__tensor": 2, "parallel__sequence": 2},
    "tensor 2 x sequence 2, hand_off": {
        "parallel__tensor": 2,
        "parallel__sequence": 2,
        "parallel__memory": "hand_off",
    },
    "data 2 x sequence 2": {"parallel__data": 2, "parallel__sequence": 2},
    "sequence 4": {"parallel__sequence": 4},
    "sequence 4, hand_off": {"parallel__sequence": 4, "parallel__memory": "hand_off"},
    "sequence 4, chunk_scan": {
        "parallel__sequence": 4,
        "parallel__memory": "chunk_scan",
        "model__memory_chunk": SEQ_LEN // 2,
    },
}


LEFT_OUT = ("gated_deltanet", "linear_attention")
"""Not in the part: gated_deltanet_swa goes through the same seams, and more. tests/parallel/test_sequence.py has all."""


def world_size(layout: str) -> int:
    return 4 if "4" in layout or " x " in layout else 2


def num_layers(variant: str) -> int:
    """Two, so that ranks can be on different ones; in the part, where time is short, for mag alone."""
    return 2 if WHOLE_TABLE or variant == "mag" else 1


def case(variant: str, layout: str, stage: int) -> dict[str, Any] | None:
    """The config, or None where it is refused, or is another row's by another name."""
    sections = tree(variant, zero=stage, model__num_layers=num_layers(variant), **LAYOUTS[layout])
    if not config_from_dict(sections).model.carries_state and LAYOUTS[layout].get("parallel__memory") in (
        "hand_off",
        "chunk_scan",
    ):
        return None  # no memory: one of the strategies stands for all
    try:
        choose_layout(config_from_dict(sections), world_size(layout))
    except UserError:
        return None
    return sections


def in_the_part(variant: str, layout: str, stage: int) -> bool:
    """One stage for each variant and layout, such that every stage meets every kind of layout. Of four ranks' layouts every
    other one, but for mag, which has all."""
    place = VARIANTS.index(variant) + list(LAYOUTS).index(layout)
    if world_size(layout) == 4:
        if variant != "mag" and place % 2:
            return False
        place //= 2
    legal = [s for s in range(4) if case(variant, layout, s) is not None]
    return bool(legal) and stage == legal[place % len(legal)]


def rows(variant: str, size: int) -> list[tuple[str, int]]:
    return [
        (layout, stage)
        for layout in LAYOUTS
        for stage in range(4)
        if world_size(layout) == size
        and case(variant, layout, stage) is not None
        and (WHOLE_TABLE or in_the_part(variant, layout, stage))
    ]


@functools.cache
def alone(variant: str, chunk: int) -> Outcome:
    """One process. The chunk is part of the model, and chunk_scan wants long ones."""
    sections = tree(variant, model__num_layers=num_layers(variant), model__memory_chunk=chunk)
    return run_distributed(run_cases, 1, GATHERED, sections)[0][0]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if WHOLE_TABLE or v not in LEFT_OUT])
def test_every_layout_trains_as_one_process(variant: str, size: int) -> None:
    table = rows(variant, size)
    cases = [case(variant, *row) for row in table]
    outcomes = run_distributed(run_cases, size, GATHERED, *cases, timeout=280 if not WHOLE_TABLE else 3000)[0]
    worst = {}
    for row, sections, outcome in zip(table, cases, outcomes, strict=True):
        assert sections is not None
        differences = compare(outcome, alone(variant, sections["model"]["memory_chunk"]))
        for what, difference in differences.items():
            worst[(*row, what)] = difference
    tolerance = RECURRENT_TOLERANCE if WHOLE_TABLE and variant.startswith("gated_deltanet") else TOLERANCE
    print({key: f"{value:.1e}" for key, value in worst.items() if value > TOLERANCE / 10})
    assert {key: value for key, value in worst.items() if not value < tolerance} == {}


def compare(outcome: Outcome, expected: Outcome) -> dict[str, float]:
    """The largest relative difference of the losses, the norms, and over all steps of each parameter's gradient.

    A gradient is compared with its norm, or with its share of the whole norm where that is larger: what is left of a gate's
    bias after large terms have cancelled has the rounding error of the terms.
    """
    found = {
        "loss": max(abs(a - b) / b for a, b in zip(outcome.losses, expected.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(outcome.norms, expected.norms, strict=True)),
    }
    assert outcome.gradients.keys() == expected.gradients.keys()
    for step, wanted in expected.gradients.items():
        own = outcome.gradients[step]
        assert own.keys() == wanted.keys()
        count = sum(gradient.numel() for gradient in wanted.values())
        per_element = float(sum(gradient.square().sum() for gradient in wanted.values()) / count) ** 0.5
        for name, gradient in wanted.items():
            assert own[name].shape == gradient.shape, name
            size = max(float(gradient.norm()), per_element * gradient.numel() ** 0.5)
            difference = float((own[name] - gradient).norm()) / size
            found[name] = max(found.get(name, 0.0), difference)
    return found
