"""Does the benchmark measure what it says, beside a Transformer++ that is really of the same size?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.inference.tiny import tiny_export
from titans_pretrain.config import load_config
from titans_pretrain.model.cost import parameter_counts
from tools.benchmark_inference import Case, config_of, main, measure_here, transformer_like

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_a_table_and_its_figures(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_export(tmp_path / "tiny", tokenizer_file, "mac")
    file = tmp_path / "found.json"
    flags = [
        "--contexts",
        "40",
        "--new-tokens",
        "3",
        "--piece",
        "16",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--batch",
        "2",
    ]
    main([str(tmp_path / "tiny"), *flags, "--json", str(file)])
    found = json.loads(file.read_text())
    titans, transformer = found["results"]
    assert (titans["variant"], transformer["variant"]) == ("mac", "transformer")
    per_token = 2 * 32 * 4 * 2  # keys and values of 32 fp32 channels in 2 layers
    assert transformer["state_bytes"] == per_token * 43
    for line in (titans, transformer):
        assert line["first_token_seconds"] > 80 / line["prefill_tokens_per_second"] > 0
        assert line["decode_tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert "CPU, 1 threads, fp32, 2 x context, pieces of 16, 3 new tokens" in out
    assert "transformer like tiny" in out


def test_state_of_titans_does_not_grow_with_the_context() -> None:
    config = load_config(CONFIGS / "demo.yaml").model
    small = config_of(CONFIGS / "demo.yaml", 100)
    assert small.vocab_size == 100
    assert config.vocab_size == 0
    sizes = [measure_here(Case("", None, small, n, 2, 1, 128, "cpu", "fp32", 0))["state_bytes"] for n in (192, 512)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["mag_170m", "mac_340m", "lmm_760m", "sliding_window_340m"])
def test_the_transformer_beside_a_model_has_its_size(name: str) -> None:
    config = config_of(CONFIGS / f"{name}.yaml", 32000)
    like = transformer_like(config)
    sizes = [parameter_counts(c)["total"] for c in (config, like)]
    assert sizes[1] == pytest.approx(sizes[0], rel=2e-3)
    assert (like.variant, like.dim, like.num_layers) == ("transformer", config.dim, config.num_layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "cannot read config"),
        ([str(CONFIGS / "demo.yaml"), "--contexts", "0"], "--contexts must be"),
        ([str(CONFIGS / "demo.yaml"), "--batch", "0"], "--batch must be"),
        ([str(CONFIGS / "demo.yaml"), "--timeout", "0"], "--timeout"),
        ([str(CONFIGS / "demo.yaml"), "--json", "none/a.json"], "there is no folder"),
        ([str(CONFIGS)], "titans_export.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
