"""Does every setting mean what it says: strict reading, conversions, each cross-field rule, the generated reference?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.config import (
    Config,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    iterate_reference,
    load_config,
    reference_markdown,
    reference_text,
    section_names,
)
from titans_pretrain.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parent.parent


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- strict keys


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("modle.dim=8", ["modle", "did you mean model?"]),
        ("optimizer.learning_rat=1", ["optimizer.learning_rat", "did you mean optimizer.learning_rate?"]),
        ("model.memory_chunks=16", ["did you mean model.memory_chunk?"]),
        ("model.zzzzzz=1", ["model.zzzzzz", "known:", "variant"]),
        ("dim=8", ["'dim=8'", "section.key=value"]),
        ("model.dim", ["'model.dim'", "section.key=value"]),
        ("model.=8", ["section.key=value"]),
        ("model.dim=[1", ["'model.dim=[1'", "not valid YAML"]),
    ],
)
def test_unknown_or_malformed_override_is_refused_with_the_nearest_name(override: str, parts: list[str]) -> None:
    text = refusal(override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("yaml_text", "parts"),
    [
        ("modle:\n  dim: 8\n", ["config.yaml", "modle", "did you mean model?"]),
        ("model:\n  dims: 8\n", ["model.dims", "did you mean model.dim?"]),
        ("model:\n  dim: 64\n  dim: 128\n", ["'dim' appears twice", "line 3"]),
        ("model:\n  dim: 64\nmodel:\n  num_heads: 4\n", ["'model' appears twice", "line 3"]),
        ("engine:\n  deepspeed:\n    a: 1\n    a: 2\n", ["'a' appears twice", "line 4"]),
        ("model:\n  ? [dim]\n  : 64\n", ["not valid YAML"]),
        ("model: 3\n", ["section model must hold keys, not a number"]),
        ("- model\n", ["must hold sections", "not a list"]),
        ("model: [\n", ["not valid YAML"]),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, yaml_text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, yaml_text))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_unreadable_config_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read config .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read config .*directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_empty_file_and_empty_section_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == Config()
    assert load_config(written(tmp_path, "model:\n")) == Config()


# ----------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("model.dim=wide", "a whole number"),
        ("model.dim=64.5", "a whole number"),
        ("model.dim=true", "a whole number"),
        ("model.dim=", "a whole number"),
        (f"model.dim=1{'0' * 400}", "a whole number"),
        ("optimizer.learning_rate=fast", "a finite number"),
        ("optimizer.learning_rate=.nan", "a finite number"),
        ("optimizer.learning_rate=.inf", "a finite number"),
        ("optimizer.learning_rate=[1]", "a finite number"),
        ("model.tie_embeddings=1", "true or false"),
        ("eval.length_multiples=8", "a list"),
        ("eval.length_multiples=[1.5]", "a whole number"),
        ("engine.deepspeed=3", "a mapping"),
    ],
)
def test_wrong_type_names_the_key_and_the_type(override: str, wanted: str) -> None:
    text = refusal(override)
    assert override.split("=")[0] in text
    assert f"must be {wanted}, not" in text


def test_wrong_type_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.name must be a string, not 7"):
        load_config(written(tmp_path, "run:\n  name: 7\n"))


def test_numbers_as_people_write_them() -> None:
    config = load_config(None, ["optimizer.learning_rate=1e-3", "schedule.tokens=15e9", "data.batch_tokens=8_192"])
    assert config.optimizer.learning_rate == 1e-3
    assert config.schedule.tokens == 15_000_000_000
    assert isinstance(config.schedule.tokens, int)
    assert config.data.batch_tokens == 8192
    assert load_config(None, ["eval.length_multiples=[1, 8]"]).eval.length_multiples == (1, 8)


def test_a_string_override_is_taken_as_written() -> None:
    assert load_config(None, ["run.name=007"]).run.name == "007"
    assert load_config(None, ["data.path=a=b"]).data.path == "a=b"


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    path = written(tmp_path, "model:\n  dim: 128\n  num_heads: 4\n")
    config = load_config(path, ["model.dim=256", "model.dim=512"])
    assert (config.model.dim, config.model.num_heads) == (512, 4)


# ------------------------------------------------------------------------------------------------------ cross-field rules

RULES = [
    (["model.dim=100", "model.num_heads=16"], ["model.dim (100)", "model.num_heads (16)"]),
    (["model.dim=64", "model.memory_heads=5"], ["model.dim (64)", "model.memory_heads (5)"]),
    (["model.dim=48", "model.num_heads=16"], ["model.dim (48)", "model.num_heads (16)", "even head_dim"]),
    (["model.memory_depth=5"], ["model.memory_depth", "1 to 4", "5"]),
    (
        ["model.dim=64", "model.num_heads=32", "model.memory_expansion=0.2"],
        ["model.memory_expansion (0.2)", "head_dim (2)"],
    ),
    (["model.retrieve_every=9", "model.segment_len=8"], ["model.retrieve_every (9)", "model.segment_len (8)"]),
    (
        ["data.seq_len=512", "data.batch_tokens=1000"],
        ["data.batch_tokens (1000)", "data.seq_len (512)", "try 512 or 1024"],
    ),
    (
        ["data.seq_len=512", "data.batch_tokens=100"],
        ["data.batch_tokens (100)", "data.seq_len (512)", "try 512 or 1024"],
    ),
    (
        ["data.seq_len=512", "data.batch_tokens=4096", "data.micro_batch=3"],
        ["8 sequences", "data.batch_tokens", "data.micro_batch (3)"],
    ),
    (
        ["schedule.kind=wsd", "schedule.warmup_fraction=0.5", "schedule.decay_fraction=0.6"],
        ["schedule.warmup_fraction (0.5)", "schedule.decay_fraction (0.6)"],
    ),
    (
        ["engine.zero_stage=0", "engine.precision=bf16"],
        ["engine.zero_stage=0", "engine.precision=bf16", "engine.zero_stage=1"],
    ),
    (["engine.zero_stage=4"], ["engine.zero_stage", "0, 1, 2 or 3", "4"]),
    (
        ["model.variant=rnn"],
        ["model.variant", "mac, mag, mal, lmm, transformer, sliding_window, gated_deltanet", "rmt", "'rnn'"],
    ),
    (["model.num_layers=0"], ["model.num_layers", "above 0"]),
    (["model.arrangement=h3"], ["model.arrangement=h3", "lmm or mal", "mag", "model.arrangement=llama"]),
    (["model.num_memory_tokens=0"], ["model.num_memory_tokens", "above 0"]),
    (
        ["model.variant=rmt", "model.segment_len=4096"],
        ["model.segment_len (4096)", "data.seq_len (4096)", "lower model.segment_len"],
    ),
    (["model.num_persistent=-1"], ["model.num_persistent", "0 or more"]),
    (["schedule.final_fraction=1.5"], ["schedule.final_fraction", "between 0 and 1"]),
    (["optimizer.beta2=1"], ["optimizer.beta2", "below 1"]),
    (["eval.length_multiples=[]"], ["eval.length_multiples"]),
    (["eval.length_multiples=[0]"], ["eval.length_multiples", "[0]"]),
    (
        ["eval.length_multiples=[1,4]", "data.reset_at_documents=true"],
        ["eval.length_multiples ([1, 4])", "data.reset_at_documents=true", "eval.length_multiples=[1]"],
    ),
    (["run.name=a/b"], ["run.name", "'a/b'", "run.dir"]),
    (["run.name="], ["run.name", "''"]),
]


@pytest.mark.parametrize(("overrides", "parts"), RULES, ids=lambda value: value[0] if isinstance(value[0], str) else "")
def test_contradictions_name_the_keys_and_values(overrides: list[str], parts: list[str]) -> None:
    text = refusal(*overrides)
    assert all(part in text for part in parts), text


def test_values_next_to_a_contradiction_pass() -> None:
    load_config(None, ["schedule.kind=wsd", "schedule.warmup_fraction=0.5", "schedule.decay_fraction=0.5"])
    load_config(None, ["schedule.kind=cosine", "schedule.warmup_fraction=0.5", "schedule.decay_fraction=0.6"])
    load_config(None, ["engine.zero_stage=0", "engine.precision=fp32"])
    load_config(None, ["model.variant=lmm", "model.dim=48", "model.num_heads=16"])  # no rotary positions
    load_config(None, ["model.retrieve_every=8", "model.segment_len=8"])
    load_config(None, ["model.memory_depth=4"])


# ------------------------------------------------------------------------------------------------------------ derivations


def test_derived_sizes() -> None:
    model = load_config(None, ["model.dim=256", "model.num_heads=4", "model.memory_heads=2"]).model
    assert model.resolved_hidden_dim == 704  # 8/3 * 256 = 682.7, up to a multiple of 64
    assert (model.head_dim, model.memory_head_dim) == (64, 128)
    assert model.memory_hidden_dim == 512
    assert model.resolved_theta_max == 1 / 128
    config = load_config(None, ["data.seq_len=512", "data.batch_tokens=4096", "schedule.tokens=10_000"])
    assert (config.batch_size, config.num_steps) == (8, 3)


# -------------------------------------------------------------------------------------------------------------- round trip


@given(
    dim=st.integers(1, 64),
    learning_rate=st.floats(1e-8, 10),
    name=st.text(st.characters(exclude_characters="/", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
    multiples=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    tie=st.booleans(),
)
def test_dict_and_yaml_round_trip(dim: int, learning_rate: float, name: str, multiples: list[int], tie: bool) -> None:
    if name in (".", ".."):
        name = "run"
    tree = {
        "model": {"dim": 16 * 2 * dim, "tie_embeddings": tie},
        "optimizer": {"learning_rate": learning_rate},
        "eval": {"length_multiples": multiples},
        "run": {"name": name},
        "engine": {"deepspeed": {"comms_logger": {"enabled": True}}},
    }
    config = config_from_dict(tree)
    assert config.model.dim == 32 * dim
    assert config.optimizer.learning_rate == learning_rate
    assert config_from_dict(config_to_dict(config)) == config


def test_saved_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None, ["run.name=yes", "optimizer.eps=1e-9", "eval.length_multiples=[1,8]", "run.resume=never"]
    )
    assert load_config(written(tmp_path, config_to_yaml(config))) == config


def test_config_is_immutable() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.dim = 1  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------------- reference


def test_every_field_has_a_docstring_and_a_place_in_the_help() -> None:
    reference = {f.name: f for _, _, fields in iterate_reference() for f in fields}
    assert list(reference) == [
        f"{section}.{f.name}" for section in section_names() for f in dataclasses.fields(getattr(Config(), section))
    ]
    help_text = reference_text()
    for name, field in reference.items():
        assert len(field.text) > 20, f"{name} has no docstring"
        assert name in help_text


def test_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference_markdown(), "docs/config.md is stale: run make docs"


# ------------------------------------------------------------------------------------------------------------------ errors


def test_user_errors_end_a_command_with_one_line_and_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TITANS_TRACEBACK", raising=False)

    @exit_on_user_error
    def main() -> None:
        load_config(None, ["modle.dim=8"])

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["error: unknown section: modle; did you mean model?"]


def test_other_errors_keep_their_traceback() -> None:
    @exit_on_user_error
    def main() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        main()
