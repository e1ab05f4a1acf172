"""Are the files in configs/ what they say: loadable, the paper's shapes and recipe, the parameters their comment states?"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import yaml

from titans_pretrain.config import RECURRENT_VARIANTS, VARIANTS, Config, load_config
from titans_pretrain.layout import choose_layout
from titans_pretrain.model.cost import parameter_counts
from titans_pretrain.model.neural_memory import describe_path

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
MATCHED = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("matched/*.yaml"))

# size: blocks, dim, heads, peak learning rate, tokens (method: the paper's appendix)
PAPER = {
    "170m": (12, 768, 16, 3e-3, 15e9),
    "340m": (24, 1024, 16, 1.5e-3, 15e9),
    "760m": (24, 1536, 16, 1.25e-3, 30e9),
    "1.3b": (18, 2048, 8, 7e-4, 100e9),
}
SIZED = [f"{variant}_{size}.yaml" for variant in VARIANTS for size in PAPER]


def load(name: str) -> Config:
    return load_config(FOLDER / name)


@functools.cache
def parameters(name: str, vocab_size: int) -> dict[str, int]:
    return parameter_counts(dataclasses.replace(load(name).model, vocab_size=vocab_size))


def total_parameters(name: str, vocab_size: int) -> int:
    return parameters(name, vocab_size)["total"]


def test_every_promised_file_is_there() -> None:
    names, sizes = ("ttt_linear", "ttt_mlp", "lmm_h3", "mal_h3"), ("170m", "340m", "760m")
    baselines = {f"{name}_{size}.yaml" for name in names for size in sizes}
    assert set(FILES) == {*SIZED, *baselines, "demo.yaml", "paper_literal.yaml", "mac_340m_chunk16.yaml"}
    variants = ("mac", "mag", "mal", "lmm", "sliding_window")
    assert set(MATCHED) == {f"matched/{variant}_{size}.yaml" for variant in variants for size in sizes}


@pytest.mark.parametrize(
    "name", [*MATCHED, *(name for name in SIZED if name.startswith(tuple(f"{v}_" for v in RECURRENT_VARIANTS)))]
)
def test_the_size_of_the_transformer(name: str) -> None:
    """Comparisons at equal size: of the parameters that compute, the embedding and the head left out."""
    transformer = f"transformer_{name.removesuffix('.yaml').rsplit('_', 1)[1]}.yaml"
    found, wanted = (parameters(n, 32000)["non_embedding"] for n in (name, transformer))
    assert found == pytest.approx(wanted, rel=0.03)
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.endswith(f"{found / 1e6:.1f}M of them non-embedding (Transformer {wanted / 1e6:.1f}M).")


@pytest.mark.parametrize("name", MATCHED)
def test_a_matched_model_is_the_papers_but_for_its_feed_forward(name: str) -> None:
    ours, papers = load(name), load(name.removeprefix("matched/"))
    same = dataclasses.replace(ours.model, hidden_dim=papers.model.hidden_dim)
    assert dataclasses.replace(ours, model=same, run=papers.run) == papers


@pytest.mark.parametrize("name", [*FILES, *MATCHED])
def test_config_loads_and_fits_one_to_eight_gpus(name: str) -> None:
    config = load(name)
    for world_size in (1, 2) if name == "demo.yaml" else (1, 2, 4, 8, 16, 32, 64, 128):
        choose_layout(config, world_size)
    assert config.data.path
    assert config.run.name == name.removesuffix(".yaml").replace("/", "_")


@pytest.mark.parametrize("name", [*FILES, *MATCHED])
def test_comment_states_the_parameters(name: str) -> None:
    first, second = (FOLDER / name).read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert not second.startswith("#")
    stated = re.search(r"([\d.]+)M parameters with a (\d+)K vocabulary", first)
    assert stated, first
    vocab_size = {"4": 4096, "32": 32000}[stated[2]]
    assert total_parameters(name, vocab_size) / 1e6 == pytest.approx(
        float(stated[1]), abs=0.5 if "." not in stated[1] else 0.05
    )


@pytest.mark.parametrize("name", SIZED)
def test_shapes_and_recipe_are_the_papers(name: str) -> None:
    variant, size = name.removesuffix(".yaml").rsplit("_", 1)
    config = load(name)
    model = config.model
    assert (
        model.num_layers,
        model.dim,
        model.num_heads,
        config.optimizer.learning_rate,
        config.schedule.tokens,
    ) == PAPER[size]
    assert model.variant == variant
    assert (model.window, model.segment_len, model.num_persistent, model.memory_chunk) == (2048, 512, 128, 64)
    assert (model.memory_depth, model.memory_expansion) == (2, 4.0)
    assert (config.data.seq_len, config.batch_size) == (4096, 128)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    assert (config.optimizer.weight_decay, config.optimizer.clip) == (0.1, 1.0)
    assert (config.schedule.kind, config.schedule.final_fraction) == ("cosine", 0.1)
    assert config.schedule.warmup_fraction == 0.01


@pytest.mark.parametrize("name", SIZED)
def test_parameters_are_near_the_name(name: str) -> None:
    """The paper's names are of one shape for all models; a hybrid at that shape has up to half as many more."""
    size = name.removesuffix(".yaml").rsplit("_", 1)[1]
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.75 * named < total_parameters(name, 32000) < 1.55 * named


def test_the_two_special_presets_differ_only_where_they_say() -> None:
    plain = load("mac_340m.yaml").model
    assert load("mac_340m_chunk16.yaml").model == dataclasses.replace(plain, memory_chunk=16)
    literal = load("paper_literal.yaml").model
    assert literal == dataclasses.replace(
        plain,
        retrieve_every=2,
        mal_residual=False,
        memory_chunk=16,
        memory_forget_toward="zero",
        memory_theta_max=1.0,
        memory_theta_scaling="none",
    )


@pytest.mark.parametrize("name", [*FILES, *MATCHED])
def test_file_says_nothing_twice(name: str) -> None:
    """A preset lists its shape and recipe, and otherwise only what differs from the defaults."""
    tree = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    shape = {"variant", "num_layers", "dim", "num_heads", "seq_len", "batch_tokens", "learning_rate", "tokens"}
    shape |= {"zero_stage", "memory_chunk", "segment_len", "window", "num_persistent"}
    for section, values in tree.items():
        for key, value in values.items():
            default = getattr(getattr(Config(), section), key)
            assert key in shape or value != default, f"{name}: {section}.{key} repeats the default {default!r}"


def test_presets_say_whether_the_kernels_take_their_memory() -> None:
    """And where they do not, how they would."""
    pytest.importorskip("triton")
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    for size in ("170m", "340m", "760m"):
        assert describe_path(load(f"mag_{size}.yaml").model, gpu, bf16) == "triton"
    large = load("mag_1.3b.yaml").model
    told = describe_path(large, gpu, bf16)
    assert told.endswith("not 256; model.memory_heads=16, heads of 128, would be taken, in a new run")
    assert describe_path(dataclasses.replace(large, memory_heads=16), gpu, bf16) == "triton"
    assert "model.memory_heads" not in describe_path(load("ttt_linear_170m.yaml").model, gpu, bf16)
    assert describe_path(large, torch.device("cpu"), bf16) == "closed_form"
