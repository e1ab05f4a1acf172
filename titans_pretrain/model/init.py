"""The initial value of every parameter, drawn from (seed, name) alone: the same under every layout and every order.

One table says, by the end of the parameter's name, how it is drawn and whether weight decay applies.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.titans import Titans


class Rule(NamedTuple):
    """How a parameter starts. kind: `normal` (std = scale), `fan_in` (std = scale / sqrt(inputs)), `constant`, `log_rate` (the
    logarithm of a number uniform in 0 to scale), `time_step` (softplus of it is log-uniform in 0.001 to scale)."""

    kind: str
    scale: float
    decay: bool = False


def rule_for(name: str, config: ModelConfig) -> Rule:
    """The rule of the parameter `name`, matched by the end of its name.

    Matrices that write to the residual stream start smaller by 1 / sqrt(2 * num_layers), so that its variance does not
    grow with depth (GPT-2). The others keep the variance of their input.
    """
    residual = 1.0 / math.sqrt(2 * config.num_layers)
    table = {
        "embedding.weight": Rule("normal", config.dim**-0.5, decay=True),
        "head.weight": Rule("fan_in", 1.0, decay=True),
        "memory_tokens.weight": Rule("normal", 1.0),  # as those written later, which a norm gives unit variance
        "persistent": Rule("normal", 1.0),  # joins after a norm, where tokens have unit variance
        "theta_gate.bias": Rule("constant", config.memory_theta_bias),
        "eta_gate.bias": Rule("constant", config.memory_eta_bias),
        "alpha_gate.bias": Rule("constant", config.memory_alpha_bias),
        # Small, so that gates start at their biases: in alpha's case one logit of noise is e-fold forgetting.
        "theta_gate.weight": Rule("normal", 0.02),
        "eta_gate.weight": Rule("normal", 0.02),
        "alpha_gate.weight": Rule("normal", 0.02),
        # Gated DeltaNet's decays, as the public model draws them (Mamba 2): half-lives of one to thousands of tokens.
        "recurrence.log_rate": Rule("log_rate", 16.0),
        "recurrence.decay_gate.bias": Rule("time_step", 0.1),
        "recurrence.decay_gate.weight": Rule("normal", 0.02),
        "recurrence.write_gate.weight": Rule("normal", 0.02),
        "query_conv.weight": Rule("fan_in", 1.0),
        "key_conv.weight": Rule("fan_in", 1.0),
        "value_conv.weight": Rule("fan_in", 1.0),
        "inner_norm_weight": Rule("constant", 1.0),
        "inner_norm_bias": Rule("constant", 0.0),
        "gate.attention_norm.weight": Rule("constant", residual),
        "norm.weight": Rule("constant", 1.0),
        "output.weight": Rule("fan_in", residual, decay=True),
        "down.weight": Rule("fan_in", residual, decay=True),
    }
    for ending, rule in table.items():
        if name == ending or name.endswith("." + ending) or (ending == "norm.weight" and name.endswith("_norm.weight")):
            return rule
    if name.endswith(".initial_weights.0"):
        # Keys have unit norm, not unit channels: 1 gives unit pre-activations. At 1 / sqrt(head_dim) the layer norm behind
        # divides by something small, and the outer gradient norm spiked to 73 where it now stays near 1 (docs/method.md 1c).
        return Rule("normal", 1.0)
    if ".initial_weights." in name:
        return Rule("fan_in", 1.0)
    if name.endswith(".weight"):
        return Rule("fan_in", 1.0, decay=True)
    raise KeyError(f"no initialisation rule for parameter {name}")


def initialize(model: Titans, seed: int) -> None:
    """Fill every parameter of `model` in place. Draws are made in fp32 on the CPU, then cast and copied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter, model.config, seed))


def draw(name: str, parameter: nn.Parameter, config: ModelConfig, seed: int) -> torch.Tensor:
    """The full initial value of one parameter, fp32 on the CPU."""
    rule = rule_for(name, config)
    if rule.kind == "constant":
        return torch.full(parameter.shape, rule.scale)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if rule.kind in ("log_rate", "time_step"):
        share = torch.rand(parameter.shape, generator=generator)
        if rule.kind == "log_rate":
            return (share * rule.scale).clamp(min=1e-4).log()
        step = torch.exp(math.log(1e-3) + share * math.log(rule.scale / 1e-3))
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    # nn.Linear keeps [out, in]; the memory's weights act on the right, [h, in, out]; a convolution has its taps last.
    inputs = parameter.shape[-2] if ".initial_weights." in name else parameter.shape[-1]
    std = rule.scale if rule.kind == "normal" else rule.scale / math.sqrt(inputs)
    return torch.randn(parameter.shape, generator=generator) * std


def weight_decay_applies(name: str) -> bool:
    """Whether AdamW decays the parameter `name` (config.py, optimizer.weight_decay)."""
    return rule_for(name, ModelConfig()).decay
