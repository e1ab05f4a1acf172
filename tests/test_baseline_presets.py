"""Are the presets of TTT, RMT and the H3 arrangement the Transformer's size, and what their names say?"""

from __future__ import annotations

import dataclasses

import pytest

from tests.test_presets import FOLDER, PAPER, load
from titans_pretrain.config import ModelConfig
from titans_pretrain.model.cost import parameter_counts

SIZES = ("170m", "340m", "760m")
NAMES = [f"{model}_{size}.yaml" for model in ("ttt_linear", "ttt_mlp", "rmt", "lmm_h3", "mal_h3") for size in SIZES]


def non_embedding(model: ModelConfig) -> int:
    return parameter_counts(dataclasses.replace(model, vocab_size=32000))["non_embedding"]


@pytest.mark.parametrize("name", NAMES)
def test_the_size_and_recipe_of_the_transformer(name: str) -> None:
    """Comparisons at equal size: of the parameters that compute, the embedding and the head left out."""
    size = name.removesuffix(".yaml").rsplit("_", 1)[1]
    ours, transformer = load(name), load(f"transformer_{size}.yaml")
    found, wanted = non_embedding(ours.model), non_embedding(transformer.model)
    assert found == pytest.approx(wanted, rel=0.03)
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.endswith(f"{found / 1e6:.1f}M of them non-embedding (Transformer {wanted / 1e6:.1f}M).")
    assert (ours.model.num_layers, ours.model.dim, ours.model.num_heads) == PAPER[size][:3]
    assert dataclasses.replace(ours, model=transformer.model, run=transformer.run) == transformer


@pytest.mark.parametrize("size", SIZES)
def test_ttt_is_the_memory_without_what_titans_adds(size: str) -> None:
    for name, depth, base_rate in (("ttt_linear", 1, 1.0), ("ttt_mlp", 2, 0.1)):
        model = load(f"{name}_{size}.yaml").model
        assert model == dataclasses.replace(
            load(f"lmm_{size}.yaml").model,
            hidden_dim=model.hidden_dim,
            num_persistent=0,
            memory_depth=depth,
            memory_chunk=16,
            memory_momentum=False,
            memory_forgetting=False,
            memory_per_layer_gates=False,
            memory_theta_max=model.memory_theta_max,
        )
        assert model.resolved_theta_max == pytest.approx(base_rate / model.head_dim, rel=1e-3)
        assert model.memory_residual_norm


@pytest.mark.parametrize("variant", ["lmm", "mal"])
@pytest.mark.parametrize("size", SIZES)
def test_h3_differs_in_the_arrangement_alone(variant: str, size: str) -> None:
    model = load(f"{variant}_h3_{size}.yaml").model
    plain = load(f"{variant}_{size}.yaml").model
    assert model == dataclasses.replace(plain, arrangement="h3", hidden_dim=model.hidden_dim)
