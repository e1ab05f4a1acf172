"""Is a study read as written, and a mistake in it told in a sentence?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.scaling.points import study
from titans_pretrain.errors import UserError
from titans_pretrain.scaling.study import BatchRule, Dial, RateRule, read_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "scaling").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_here_are_sound(path: Path) -> None:
    found = read_study(path)
    assert found.name == path.stem
    assert len(found.size_words()) >= 4
    assert len(found.budgets) >= 3


def test_dial_rounds_to_whole_heads() -> None:
    dial = Dial((6,), aspect=64, head_dim=48)
    assert dial.words(12) == ("model.num_layers=12", "model.dim=768", "model.num_heads=16")
    assert dial.words(7) == ("model.num_layers=7", "model.dim=432", "model.num_heads=9")
    assert Dial((1,), aspect=8, head_dim=64).words(1) == ("model.num_layers=1", "model.dim=64", "model.num_heads=1")


def test_rules() -> None:
    assert BatchRule(2048, 1e6, 0.5).batch_tokens(4e6, 512) == 4096
    assert BatchRule(2048).batch_tokens(4e6, 768) == 2304
    assert BatchRule(2048, 1e6, 0.5).batch_tokens(1, 512) == 512
    assert RateRule(1e-3, "parameters", 1e6, 0.5).rate(1e-3, 4e6, 64) == pytest.approx(5e-4)
    assert RateRule(1e-3, "dim", 64, 1).rate(1e-3, 4e6, 128) == pytest.approx(5e-4)
    assert RateRule(1e-3).rate(1e-3, 4e6, 128) == 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"varants": {}}, "unknown key varants; did you mean variants?"),
        ({"budgets": {"flop": [1e12]}}, "budgets must have one key of tokens, tokens_per_parameter, flops, not flop"),
        ({"budgets": {"flops": [1e13, 1e12]}}, "budgets.flops must be a list of numbers above 0, smallest first"),
        ({"budgets": {"tokens": ["many"]}}, "budgets.tokens must be a number of 0 or more, not 'many'"),
        ({"variants": {"mag": "model.variant=mag"}}, r"variants.mag must be a list of section.key=value"),
        ({"dial": {"layers": [1], "aspct": 3}}, "unknown key aspct; did you mean aspect?"),
        ({"axes": {"model.window": 64}}, "axes must be a list of values for each key"),
        ({"batch": {"tokens": 2048, "exponent": 0.5}}, "batch.exponent is 0.5, so the study: batch.reference must say"),
        ({"learning_rate": {"by": "dim"}}, "learning_rate must have either base or sweep.values"),
        ({"learning_rate": {"base": 1e-3, "by": "width"}}, "learning_rate.by must be parameters or dim, not 'width'"),
        ({"count": "all"}, "count must be one of non_embedding, total, without_memory_init, not 'all'"),
        ({"collect": {"loss": "test"}}, "collect.loss must be valid or train, not 'test'"),
        ({"name": "a/b"}, "name must be a folder name"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        study(**changes)


def test_both_dial_and_sizes_are_too_much(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: a\nconfig: b\nvariants: {m: [a.b=c]}\nbudgets: {tokens: [1]}\n")
    with pytest.raises(UserError, match=r"must have either dial .* or sizes"):
        read_study(path)
    with pytest.raises(UserError, match="cannot read study"):
        read_study(tmp_path / "none.yaml")
    path.write_text("name: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_study(path)
    path.write_text("- 1")
    with pytest.raises(UserError, match="must hold keys and values"):
        read_study(path)
