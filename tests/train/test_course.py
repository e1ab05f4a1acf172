"""Which data a run goes on with: what a checkpoint must share, what may change, and where a new phase begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import SEQ_LEN, make_dataset, tiny_config
from titans_pretrain.config import (
    Config,
    DataConfig,
    PhaseConfig,
    RampConfig,
    SourceConfig,
    StepPlan,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    source_names,
)
from titans_pretrain.data import stream as stream_module
from titans_pretrain.data.mixture import Sources, paths
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.errors import UserError
from titans_pretrain.train.checkpoint import Progress
from titans_pretrain.train.course import Course, Origin, chart

BATCH = 8 * SEQ_LEN
CHECKPOINT = Path("step_00000005")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: make_dataset(folder / name, seed=seed) for seed, name in enumerate(("web", "code", "books"))}


def config_of(folders: dict[str, Path], names: str = "web code", **overrides: Any) -> Config:
    sources = [{"path": str(folders[n]), "weight": w} for n, w in zip(names.split(), (3, 1, 1), strict=False)]
    return tiny_config(Path(), Path("runs"), **{"data__path": "", "data__sources": sources, **overrides})


def chart_of(config: Config, manifest: dict[str, Any] | None = None) -> Course:
    sources = Sources.of(config.data, [ShardSet.open(path) for path in paths(config.data)])
    return chart(config, sources, CHECKPOINT if manifest else None, manifest)


def manifest_of(config: Config, steps: int = 5, course: Course | None = None) -> dict[str, Any]:
    """What a run by `config` would save after so many steps from the beginning, or of `course`."""
    course = course or chart_of(config)
    progress = course.start
    for _ in range(steps):
        progress = course.next(progress)
    position = {"step": progress.step, "position": progress.position, "tokens": progress.tokens}
    manifest = {**position, "config": config_to_dict(config), "data": course.identity(progress.position)}
    return dict(json.loads(json.dumps(manifest)))


# ----------------------------------------------------------------------------------------------------------- batch ramp


def test_steps_and_tokens_of_a_ramp() -> None:
    ramp = (RampConfig(100, 20), RampConfig(170, 40), RampConfig(175, 80))
    plan = StepPlan(DataConfig(batch_tokens=8, seq_len=1, batch_ramp=ramp), 500)
    tokens = 0
    for step in range(plan.num_steps):
        assert plan.tokens(step) == tokens
        expected = 8 if tokens < 100 else 20 if tokens < 170 else 40 if tokens < 175 else 80
        assert plan.batch_tokens(step) == expected, (step, tokens)
        tokens += expected
    assert tokens >= 500 > tokens - expected
    assert StepPlan(DataConfig(batch_tokens=8, seq_len=1, batch_ramp=ramp), 104).num_steps == 13
    assert StepPlan(DataConfig(batch_tokens=8, seq_len=1, batch_ramp=ramp), 105).num_steps == 14
    later = StepPlan(DataConfig(batch_tokens=8, seq_len=1, batch_ramp=ramp), 500, step=14, tokens=124)
    assert [later.batch_tokens(step) for step in (14, 17, 20)] == [20, 80, 80]
    assert later.num_steps == plan.num_steps
    assert StepPlan(DataConfig(batch_tokens=8, seq_len=1), 500, step=100, tokens=600).num_steps == 100


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"data__batch_ramp": [{"tokens": 999, "batch_tokens": 33}]},
            r"data.batch_ramp\[0\].batch_tokens \(33\) must be a mul",
        ),
        (
            {"data__batch_ramp": [{"tokens": 0, "batch_tokens": BATCH}]},
            r"data.batch_ramp\[0\].tokens \(0\) must be above 0",
        ),
        (
            {"data__phases": [{"tokens": 9, "weights": [1]}]},
            r"phases\[0\].weights has 1 weights for 2 sources \(web, code\)",
        ),
        (
            {"data__phases": [{"tokens": 9, "weight": [1, 2]}]},
            r"unknown key in data.phases\[0\]: data.phases\[0\].weight; did",
        ),
        ({"data__path": "x"}, r"data.path \(x\) and data.sources are both set"),
        ({"data__sources": [{"path": "a/x"}, {"path": "b/x"}]}, r"\[0\] and data.sources\[1\] are both called x"),
        ({"data__sources": [{"path": "a", "weight": 0}]}, "every weight in data.sources is 0"),
        ({"data__sources": []}, r"data.phases|data.path is empty"),
    ],
)
def test_refused_settings(overrides: dict[str, Any], says: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=says):
        paths(config_of(folders, **overrides).data)


def test_lists_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    overrides = [
        "data.sources=[{path: /a/web, weight: 0.7}, {path: /b/my code, max_epochs: 2}]",
        "data.phases=[{tokens: 1e9, weights: [0, 1]}]",
        "data.batch_ramp=[{tokens: 2e9, batch_tokens: 1048576}]",
    ]
    config = load_config(None, overrides)
    assert config.data.sources == (SourceConfig("/a/web", 0.7), SourceConfig("/b/my code", 1.0, 2.0))
    assert config.data.phases == (PhaseConfig(10**9, (0.0, 1.0)),)
    assert source_names(config.data) == ["web", "my-code"]
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.num_steps == 3815 + 12398


# ---------------------------------------------------------------------------------------------------- same run, resumed


def test_the_course_goes_on_where_it_was(folders: dict[str, Path]) -> None:
    ramp = [{"tokens": 3 * BATCH, "batch_tokens": 2 * BATCH}, {"tokens": 9 * BATCH, "batch_tokens": BATCH}]
    phases = [{"tokens": 4 * BATCH + 1, "weights": [0, 1]}]
    config = config_of(folders, data__batch_ramp=ramp, data__phases=phases, run__new_phase=True)
    whole = chart_of(config)
    assert list(whole.sizes()) == [8] * 3 + [16] * 3 + [8] * 11
    assert whole.mixture.blend.starts == [0, 33]
    for steps in (1, 3, 5, 10):
        course = chart_of(config, manifest_of(config, steps))
        assert list(course.sizes()) == list(whole.sizes())[steps:]
        assert course.start.position == sum(list(whole.sizes())[:steps]) == course.start.tokens // SEQ_LEN
        assert (course.origin, course.changes) == (Origin(), ())


def test_what_lies_ahead_may_change(folders: dict[str, Path]) -> None:
    manifest = manifest_of(config_of(folders))
    ahead = {"tokens": 5 * BATCH}
    chart_of(config_of(folders, data__phases=[{**ahead, "weights": [0, 1]}]), manifest)
    course = chart_of(config_of(folders, data__batch_ramp=[{**ahead, "batch_tokens": 2 * BATCH}]), manifest)
    assert next(course.sizes()) == 16


DIFFERENT = [
    (
        {"data__phases": [{"tokens": 4 * BATCH, "weights": [0, 1]}]},
        ["[0.75, 0.25] from sequence 0", "from sequence 32 on"],
    ),
    ({"data__batch_ramp": [{"tokens": 4 * BATCH, "batch_tokens": 2 * BATCH}]}, ["data.batch_ramp=[]", "(1024, 512)"]),
    ({"names": "web books"}, ["on dataset ", "/code)", "data.sources[1].path ", "/books, which"]),
    ({"names": "web code books"}, ["2 datasets (", "3 datasets ("]),
    ({"data__batch_tokens": 2 * BATCH}, ["data.batch_tokens=256", "512"]),
    ({"data__seq_len": 16}, ["data.seq_len=32", "16"]),
    ({"run__seed": 3}, ["run.seed=0", "3"]),
]


@pytest.mark.parametrize(("overrides", "says"), DIFFERENT, ids=[next(iter(o)) for o, _ in DIFFERENT])
def test_another_past_is_refused_or_a_new_phase(
    overrides: dict[str, Any], says: list[str], folders: dict[str, Path]
) -> None:
    manifest = manifest_of(config_of(folders))
    with pytest.raises(UserError) as refusal:
        chart_of(config_of(folders, **overrides), manifest)
    for text in (*says, str(CHECKPOINT), "run.new_phase=true", "from step 5"):
        assert text in str(refusal.value)
    config = config_of(folders, run__new_phase=True, **overrides)
    course = chart_of(config, manifest)
    only_batch = "batch" in next(iter(overrides))
    assert ("from their beginning" in str(refusal.value)) != only_batch
    assert course.start == Progress(5, 40 if only_batch else 0, 5 * BATCH)
    assert len(course.changes) == 1
    # The settings may stay: the next resume finds its own stream and goes on in it.
    again = chart_of(config, manifest_of(config, 2, course))
    assert again.changes == ()
    assert again.origin == course.origin
    assert again.start == course.next(course.next(course.start))
    assert list(again.sizes()) == list(course.sizes())[2:]


def test_weights_and_ramps_of_a_new_phase_count_the_runs_tokens(folders: dict[str, Path]) -> None:
    changes = {
        "data__phases": [{"tokens": 7 * BATCH, "weights": [0, 1, 0]}],
        "data__batch_ramp": [{"tokens": 6 * BATCH, "batch_tokens": 2 * BATCH}],
    }
    config = config_of(folders, "web code books", run__new_phase=True, **changes)
    course = chart_of(config, manifest_of(config_of(folders)))
    assert course.mixture.blend.starts == [0, 2 * 8]
    assert list(course.sizes()) == [8] + [16] * 7
    assert course.steps.num_steps == 13


def test_another_shuffle_window_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(config_of(folders))
    monkeypatch.setattr(stream_module, "WINDOW_SHARDS", 8)
    with pytest.raises(UserError, match=r"windows of 16 shards, but .* windows of 8 shards in this version.*new_phase"):
        chart_of(config_of(folders), manifest)


def test_checkpoints_from_before_mixtures_go_on(folders: dict[str, Path]) -> None:
    config = tiny_config(folders["web"], Path("runs"))
    manifest = manifest_of(config)
    del manifest["data"]
    for key in ("sources", "phases", "batch_ramp"):
        del manifest["config"]["data"][key]
    manifest["dataset_fingerprint"] = ShardSet.open(folders["web"]).fingerprint
    assert chart_of(config, manifest).start == Progress(5, 40, 5 * BATCH)
    with pytest.raises(
        UserError, match=r"on dataset .*/web\), but the config says data.path .*/code, which is dataset"
    ):
        chart_of(tiny_config(folders["code"], Path("runs")), manifest)


def test_too_many_epochs_are_refused_at_the_start(folders: dict[str, Path]) -> None:
    tree = config_to_dict(config_of(folders))
    tree["data"]["sources"][1]["max_epochs"] = 0.1
    with pytest.raises(
        UserError, match=r"takes 40 sequences of source code, which is 0.20 epochs of its 200 .*max_epochs \(0.1\)"
    ):
        chart_of(config_from_dict(tree))
