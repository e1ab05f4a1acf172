"""Initial values: a function of seed and name alone, at the intended scale."""

from __future__ import annotations

import math

import torch

from tests.model.tiny import tiny_config, tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.model import Titans, initialize, weight_decay_applies
from titans_pretrain.model.init import draw


def test_a_parameter_depends_on_seed_and_name_only() -> None:
    torch.manual_seed(0)
    first = dict(tiny_model("mag").named_parameters())
    torch.manual_seed(1)
    deeper = dict(tiny_model("mag", num_layers=2, vocab_size=61).named_parameters())
    other = dict(tiny_model("mag", seed=1).named_parameters())
    name = "blocks.1.memory.key.weight"
    assert all(torch.equal(first[n], deeper[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["blocks.0.memory.key.weight"])
    # the same parameter drawn alone, without a model around it
    assert torch.equal(first[name], draw(name, first[name], tiny_config("mag"), 0))


def test_scale_and_biases() -> None:
    parameters = dict(tiny_model("mac", dim=256, hidden_dim=512, num_layers=8).named_parameters())
    std = parameters["blocks.3.attention.key.weight"].std().item()
    assert abs(std * math.sqrt(256) - 1) < 0.05
    std = parameters["blocks.3.attention.output.weight"].std().item()
    assert abs(std * math.sqrt(256) * 4 - 1) < 0.05  # residual writers: 1 / sqrt(2 * 8)
    assert abs(parameters["blocks.0.memory.initial_weights.0"].std().item() - 1) < 0.05  # keys have unit norm
    std = parameters["blocks.0.memory.initial_weights.1"].std().item()
    assert abs(std * math.sqrt(192) - 1) < 0.05  # acts on the right: its inputs are its rows
    assert (parameters["blocks.0.memory.alpha_gate.bias"] == -6.0).all()
    assert (parameters["blocks.0.gate.attention_norm.weight"] == 0.25).all()
    assert (parameters["blocks.0.mixer_norm.weight"] == 1.0).all()


def test_decays_of_gated_deltanet_are_the_public_models() -> None:
    model = tiny_model("gated_deltanet", dim=256, memory_heads=256, num_layers=4)
    parameters = dict(model.named_parameters())
    rates = torch.cat([parameters[f"blocks.{i}.recurrence.log_rate"] for i in range(4)]).exp()
    assert rates.min() < 0.2
    assert 15.8 < rates.max() < 16
    assert abs(rates.mean() - 8) < 0.6
    steps = torch.cat([parameters[f"blocks.{i}.recurrence.decay_gate.bias"] for i in range(4)])
    steps = torch.nn.functional.softplus(steps)
    assert 0.000999 < steps.min() < 0.00103
    assert 0.097 < steps.max() < 0.1001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.15
    undecayed = {n.removeprefix("blocks.0.recurrence.") for n in parameters if not weight_decay_applies(n)}
    assert {"log_rate", "decay_gate.bias", "decay_gate.weight", "write_gate.weight", "key_conv.weight"} <= undecayed


def test_every_parameter_of_every_variant_has_a_rule() -> None:
    for variant in VARIANTS:
        model = Titans(tiny_config(variant))
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)
        initialize(model, 3)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_is_for_matrices_of_linear_layers() -> None:
    decayed = {n for n, _ in tiny_model("mac").named_parameters() if weight_decay_applies(n)}
    assert "embedding.weight" in decayed
    assert "blocks.0.attention.query.weight" in decayed
    assert "blocks.0.feed_forward.gate.weight" in decayed
    assert "blocks.0.memory.read_gate.weight" in decayed
    for part in ("norm", "bias", "persistent", "initial_weights", "conv", "theta_gate", "eta_gate", "alpha_gate"):
        assert not any(part in n for n in decayed), part
