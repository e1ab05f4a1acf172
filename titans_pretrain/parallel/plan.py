"""How many bytes will a GPU hold, and how many will it send, under a layout? Known before any GPU is there.

Activations and what tensor and sequence ranks send are those of a trace (`trace.py`). Weights, gradients and optimizer
states are what DeepSpeed 0.19 was seen to hold at each ZeRO stage, in the configuration of `train/engine.py`; a test
compares the sum with what two real processes allocate. Left out: what the driver and the libraries take (about a gigabyte
on a GPU), and what the allocator loses between blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from titans_pretrain.config import Config
from titans_pretrain.errors import UserError
from titans_pretrain.layout import Layout, choose_layout, memory_strategy, micro_batch_rows
from titans_pretrain.parallel.trace import FIRST, FORWARD, LAST, Trace, Traffic, local_shapes, trace

REDUCTION, UPDATE = "reduction of the gradients", "update"
LIVE = 1_000_000_000
"""Elements that ZeRO stage 3 keeps gathered at most: DeepSpeed's default."""
PARTS = ("weights", "gradients", "optimizer", "activations", "memory states")


@dataclass(frozen=True)
class Plan:
    """What one rank of a layout needs."""

    layout: Layout
    rows: int
    """Sequences of a micro-batch."""
    accumulation: int
    """Micro-batches of a step."""
    parameters: int
    """Elements of this rank's tensor slice, before ZeRO shards them."""
    bytes: dict[str, float]
    """By PARTS, in the moment when their sum is largest. Memory states: the states (W, S) that the backward pass needs."""
    peak: str
    """That moment: of trace.WINDOWS, REDUCTION or UPDATE."""
    traffic: dict[str, Traffic]
    """What this rank sends in a step, by group: "replicas" (data x sequence: gradients and weights), "sequence", "tensor"."""

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def sent_bytes(self) -> float:
        return sum(traffic.bytes for traffic in self.traffic.values())


def make_plan(config: Config, layout: Layout, device: str) -> Plan:
    """The plan of one layout.

    Args:
        config: resolved (model.vocab_size set), of a legal layout.
        device: "cpu" or "cuda": what will run it.
    """
    rows = micro_batch_rows(config, layout.data)
    accumulation = config.batch_size // layout.data // rows
    held = _Held(config, layout, accumulation)
    # In later micro-batches gradients add to those there are, and from stage 1 on they go to buckets: _Held counts both.
    traced = trace(config, layout, rows, device, keep_gradients=held.stage == 0 and accumulation == 1)
    moments = {moment: held.at(moment, traced) for moment in (FORWARD, LAST, FIRST)}
    moments[REDUCTION] = held.at_reduction()
    moments[UPDATE] = held.at_update(device)
    peak = max(moments, key=lambda moment: sum(moments[moment].values()))
    traffic = {"replicas": held.traffic(config.engine.activation_checkpointing)}
    traffic |= {axis: sent * accumulation for axis, sent in traced.traffic.items()}
    return Plan(layout, rows, accumulation, held.elements, moments[peak], peak, traffic)


class _Held:
    """What DeepSpeed holds on one rank, in bytes, found by counting the allocations of real runs."""

    def __init__(self, config: Config, layout: Layout, accumulation: int) -> None:
        sizes = [shape.numel() for shape in local_shapes(config, layout).values()]
        zero = config.engine.deepspeed.get("zero_optimization", {})
        self.stage = config.engine.zero_stage
        self.wide = config.engine.precision == "fp32"
        self.replicas = layout.replicas
        self.accumulation = accumulation
        self.elements = sum(sizes)
        self.weight = 4 if self.wide else 2
        hands_off = layout.sequence > 1 and config.model.carries_state and memory_strategy(config) == "hand_off"
        bucket = self.elements if hands_off else min(500_000_000, self.elements)
        self.bucket = zero.get("reduce_bucket_size", bucket)
        # Stage 3 leaves small parameters whole, and keeps large ones gathered until a bound.
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        large = [size for size in sizes if size >= threshold]
        self.small = self.elements - sum(large)
        self.gathered = min(sum(large), LIVE)

    def at(self, moment: str, traced: Trace) -> dict[str, float]:
        """Bytes by PARTS during a pass: the last micro-batch's, when the gradients of those before it are there."""
        bytes = self._standing()
        n, shard = self.elements, self.elements / self.replicas
        several, backward, ends = self.accumulation > 1, moment != FORWARD, moment == FIRST
        if self.stage == 0:
            bytes["gradients"] += 4 * n * several
        elif self.stage == 1 and self.wide:
            bytes["gradients"] += 4 * self.bucket * (several or backward) + 4 * n * several + 4 * shard * ends
        elif self.stage == 1:
            bytes["gradients"] += 2 * n * (several or ends)
        elif self.stage == 2:
            bytes["gradients"] += self.weight * self.bucket * backward + 4 * shard * (several or ends)
            bytes["gradients"] += self._copies() * (backward and self.bucket < n)
        else:
            bytes["weights"] += self.weight * self.gathered
        bytes["memory states"] = traced.memory_states if moment != FIRST else 0.0
        bytes["activations"] = traced.peaks[moment] - bytes["memory states"]
        return bytes

    def at_reduction(self) -> dict[str, float]:
        """After the backward pass, or at its end: gradients are copied into a message."""
        bytes = self._standing()
        n = self.elements
        if self.stage == 0 or (self.stage == 1 and self.wide):  # in stage 1 they move into the bucket one by one
            bytes["gradients"] += 4 * n + self._copies()
        elif self.stage == 1:
            bytes["gradients"] += 2 * n
        elif self.stage == 2:
            share = 0 if self.wide else 4 * n / self.replicas
            bytes["gradients"] += self.weight * self.bucket + self._copies() + share
        else:
            bytes["weights"] += self.weight * self.gathered
            bytes["gradients"] += self._copies()
        return bytes

    def _copies(self) -> float:
        """Of a bucket while it is reduced: one in fp32, in stage 2 after one in the bucket's dtype."""
        return (4 if self.wide or self.stage == 3 else 4 + self.weight) * self.bucket

    def at_update(self, device: str) -> dict[str, float]:
        bytes = self._standing()
        shard = self.elements / (self.replicas if self.stage else 1)
        bytes["gradients"] += 4 * shard * (self.stage < 3)
        bytes["optimizer"] += 4 * shard * (3 if device == "cpu" and self.stage else 1)  # AdamW's temporaries
        return bytes

    def _standing(self) -> dict[str, float]:
        """What is there all the time."""
        n, shard = self.elements, self.elements / self.replicas
        bytes = dict.fromkeys(PARTS, 0.0)
        if self.stage == 3:
            bytes["weights"] = self.weight * (shard + self.small)
            bytes["gradients"] = 4 * shard + 4 * self.bucket
        else:
            bytes["weights"] = self.weight * n
        if self.stage == 1 and not self.wide:
            bytes["gradients"] = 4 * n
        bytes["optimizer"] = 8 * n if self.stage == 0 else 12 * shard  # two moments; and from stage 1 on a master copy
        return bytes

    def traffic(self, recomputes: bool) -> Traffic:
        """What goes between replicas in a step, by rings: gradients in fp32, weights in their dtype."""
        if self.replicas == 1:
            return Traffic()
        share = (self.replicas - 1) / self.replicas
        gradients, weights = 4 * self.elements * share, self.weight * self.elements * share
        buckets = -(-self.elements // self.bucket)
        if self.stage == 0:
            return Traffic(2 * gradients, buckets)
        if self.stage == 1:
            return Traffic(2 * gradients + weights, buckets + 1)
        if self.stage == 2:
            return Traffic(2 * gradients * self.accumulation + weights, buckets * self.accumulation + 1)
        passes = 1 if self.elements <= LIVE else 3 if recomputes else 2
        gathers = self.weight * (self.elements - self.small) * share
        once = self.weight * self.small * share
        return Traffic((gradients + passes * gathers) * self.accumulation + once, buckets * self.accumulation + 1)


def legal_layouts(config: Config, world_size: int, most_shared: int = 8) -> Iterator[tuple[Config, Layout]]:
    """Every way to share `world_size` ranks that the config allows with another parallel.{data, sequence, tensor}.

    Args:
        most_shared: largest sequence and largest tensor looked at: more tensor ranks than GPUs in a machine do not pay.
    """
    for tensor in _divisors(world_size, most_shared):
        for sequence in _divisors(world_size // tensor, most_shared):
            parallel = dataclasses.replace(config.parallel, data=0, sequence=sequence, tensor=tensor)
            other = dataclasses.replace(config, parallel=parallel)
            try:
                yield other, choose_layout(other, world_size)
            except UserError:
                continue


def _divisors(count: int, most: int) -> list[int]:
    return [d for d in range(1, min(count, most) + 1) if count % d == 0]
