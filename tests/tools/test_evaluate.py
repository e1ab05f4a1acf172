"""Does the command measure exports, runs and checkpoints alike, write the same bytes twice, and refuse what it cannot do?"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.inference.tiny import VOCAB, prose, tiny_export
from tests.model.tiny import tiny_config
from tests.tools.test_convert_checkpoint import make_dataset
from tests.train.jobs import train_job
from tests.train.tiny import tiny_tree
from titans_pretrain.config import Config, DataConfig
from titans_pretrain.inference.export import load_export, write_export
from titans_pretrain.model import Titans, initialize
from tools.convert_checkpoint import main as convert
from tools.evaluate import expand, main
from tools.load_model import load_model

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("evaluate")

SEQ_LEN = 32


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "mag"
    tiny_export(folder, tokenizer_file, "mag")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(prose(120, seed=5)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Two checkpoints of a run on real tokens."""
    folder = tmp_path_factory.mktemp("run")
    data = make_dataset(folder / "data", tokenizer_file)
    tree = tiny_tree(
        data,
        folder,
        run__name="lmm",
        model__variant="lmm",
        schedule__tokens=4 * 8 * SEQ_LEN,
        checkpoint__interval=2,
        eval__tokens=SEQ_LEN,
    )
    assert run_distributed(train_job, 1, tree) == [None]
    return folder / "lmm"


def evaluated(tmp_path: Path, *arguments: object, name: str = "out.json") -> dict[str, Any]:
    main([*map(str, arguments), "--json", str(tmp_path / name)])
    return json.loads((tmp_path / name).read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence on stderr, which is one line and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_same_command_writes_the_same_bytes(export: Path, text: Path, tmp_path: Path) -> None:
    command = [export, "niah_single_2", "niah_multikey_2", "babilong_qa2", "perplexity", "--text", text]
    command += ["--lengths", 600, "--depths", 0, 50, "--samples", 2, "--multiple", 4, "--tokens", 300, "--seed", 3]

    def extra(name: str) -> list[object]:
        return ["--png", tmp_path / f"{name}.png", "--samples-file", tmp_path / f"{name}.jsonl"]

    report = evaluated(tmp_path, *command, *extra("one"), name="one.json")
    evaluated(tmp_path, *command, *extra("two"), name="two.json")
    for suffix in ("json", "png", "jsonl"):
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two, suffix
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 2 * 2 * 2 + 2
    assert list(report["tasks"]) == ["niah_single_2", "niah_multikey_2", "babilong_qa2", "perplexity"]
    assert [cell["depth"] for cell in report["tasks"]["niah_single_2"]["cells"]] == [0.0, 0.5]
    assert report["seed"] == 3
    assert report["tasks"]["perplexity"]["sequences"] == 2
    assert report["model"]["variant"] == "mag"
    assert report["versions"]["torch"] == torch.__version__
    short = [export, "niah_single_2", "--text", text, "--lengths", 600, "--depths", 0, 50, "--samples", 2, "--seed"]
    same, other = (evaluated(tmp_path, *short, seed)["tasks"]["niah_single_2"] for seed in (3, 4))
    assert same == report["tasks"]["niah_single_2"] != other


def test_names_of_groups() -> None:
    assert expand(["babilong_qa2", "needle", "babilong", "lm_eval/x", "perplexity"]) == [
        *("babilong_qa2", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"),
        *("babilong_qa1", "babilong_qa3", "lm_eval/x", "perplexity"),
    ]


def test_a_run_its_checkpoint_and_its_export_are_the_same_model(run: Path, tmp_path: Path) -> None:
    """And its validation split is measured, up to the text's end."""
    convert(["export", str(run), str(tmp_path / "exported")])
    newest = run / "checkpoints" / "step_00000004"
    reports = [
        evaluated(tmp_path, source, "perplexity", "--multiple", 4)
        for source in (run, newest, tmp_path / "exported", run / "checkpoints" / "step_00000002")
    ]
    prints = [report["model"]["fingerprint"] for report in reports]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    assert reports[0]["tasks"] == reports[1]["tasks"] == reports[2]["tasks"] != reports[3]["tasks"]
    assert reports[0]["model"]["training"] == {"step": 4, "tokens": 4 * 8 * SEQ_LEN}
    assert (
        evaluated(tmp_path, run, "perplexity", "--multiple", 4, "--checkpoint", "step_2")["tasks"]
        == reports[3]["tasks"]
    )
    assert reports[0]["tasks"]["perplexity"]["finite"]
    assert reports[0]["options"]["measured"]["split"] == "valid"
    loaded, exported = load_model(run), load_export(tmp_path / "exported")
    for name, parameter in loaded.model.named_parameters():
        torch.testing.assert_close(parameter, exported.model.get_parameter(name), rtol=0, atol=0)


def test_comparing(export: Path, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["babilong_qa1", "--text", text, "--lengths", 600, "--samples", 3]
    one = evaluated(tmp_path, export, "perplexity", *task, "--multiple", 2, "--tokens", 64, name="one.json")
    evaluated(tmp_path, run, *task, "--seed", 9, name="two.json")
    capsys.readouterr()
    main(["compare", str(tmp_path / "one.json"), str(tmp_path / "two.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one", "two"]
    table = {line.split("  ")[0]: line.split()[-2:] for line in lines[1:]}
    assert table["variant"] == ["mag", "lmm"]
    cell = one["tasks"]["babilong_qa1"]["cells"][0]
    (choice,) = [cells for name, cells in table.items() if name.startswith("babilong_qa1 at 600: choice")]
    assert float(choice[0]) == pytest.approx(cell["choice"], rel=1e-3)
    (beyond,) = [cells for name, cells in table.items() if name.startswith("perplexity at 1-2 ")]
    assert float(beyond[0]) == pytest.approx(one["tasks"]["perplexity"]["buckets"][-1]["perplexity"], rel=1e-3)
    assert beyond[1] == "-"
    assert "note: one.json and two.json differ in seed: 0 and 9" in lines
    main(["compare", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["|  | one | two |", "|---|---:|---:|"]
    assert "| variant | mag | lmm |" in lines


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path, tokenizer_file: Path, text: Path) -> None:
    config = Config(model=tiny_config("mag", vocab_size=VOCAB), data=DataConfig(path="d", seq_len=32, batch_tokens=64))
    model = Titans(config.model)
    initialize(model, seed=0)
    weights = {name: p.detach() * (math.inf if name == "norm.weight" else 1.0) for name, p in model.named_parameters()}
    write_export(tmp_path / "broken", config, weights, tokenizer_file, {})
    report = evaluated(tmp_path, tmp_path / "broken", "niah_single_1", "--lengths", 400, "--samples", 1)
    assert {cell["nll"] for cell in report["tasks"]["niah_single_1"]["cells"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["needles"], "there is no task 'needles'; the tasks are perplexity, needle, babilong, niah_single_1"),
        (["lm_eval/"], "there is no task 'lm_eval/'"),
        (["perplexity", "--depths", "50"], "--depths is for niah_single_1, .* drop --depths"),
        (["perplexity", "--png", "a.png"], "--png is for niah_single_1"),
        (["niah_single_1", "--multiple", "4"], "--multiple is for perplexity"),
        (["niah_single_1", "--limit", "4"], "--limit is for lm_eval"),
        (["niah_single_1", "--depths", "120"], "percentages from 0 to 100"),
        (["niah_single_1", "--lengths", "90"], "niah_single_1 does not fit in 90 tokens"),
        (["niah_single_1", "--samples", "0"], "--samples must be 1 or more, not 0"),
        (["niah_single_1", "--lengths", "900", "--checkpoint", "step_1"], "--checkpoint step_1 .* is an export"),
        (["niah_single_2", "--lengths", "900", "--text", "no/such.txt"], "cannot read --text no/such.txt"),
        (["perplexity"], "the run's data cannot be measured: no dataset directory at d.*--text"),
        (["perplexity", "--data", "nowhere"], "no dataset directory at nowhere"),
        (["lm_eval/arc", "--include-path", "nowhere"], "--include-path nowhere is not a folder"),
    ],
)
def test_refusals(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    line = refused(capsys, export, *arguments, "--json", tmp_path / "out.json")
    assert re.match(f"error: .*{sentence}", line), line
    assert not (tmp_path / "out.json").exists()


def test_refusals_about_files(
    export: Path, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--json", tmp_path / "out.json"]
    assert "neither a run folder" in refused(capsys, tmp_path, "perplexity", *out)
    assert "there is no folder" in refused(capsys, export, "niah_single_1", "--json", tmp_path / "a" / "b.json")
    assert "lower --multiple" in refused(capsys, run, "perplexity", "--multiple", 4000, *out)
    assert "lower --multiple" in refused(capsys, export, "perplexity", "--text", text, "--multiple", 4000, *out)
    assert "need an exported model" in refused(capsys, run, "lm_eval/x", *out)
    data = shutil.copytree(run.parent / "data", tmp_path / "data")
    assert "drop one of the two" in refused(capsys, run, "perplexity", "--data", data, "--text", text, *out)
    (tmp_path / "no.json").write_text("{}")
    assert "is not an evaluation" in refused(capsys, "compare", tmp_path / "no.json")
    assert "cannot read" in refused(capsys, "compare", tmp_path / "none.json")


def test_lm_eval_through_the_exported_folder(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of our own, whose accuracy follows from the model's logits."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = [
        {"question": question, "choices": ["river", "stone", "wave", "momentum"], "answer": answer}
        for answer, question in enumerate(["The memory", "surprise forgets", "a neural", "bright quick"])
    ]
    (tasks / "cloze.json").write_text("\n".join(map(json.dumps, documents)))
    (tasks / "cloze.yaml").write_text(f"""
task: cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / "cloze.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    report = evaluated(tmp_path, export, "lm_eval/cloze", "--include-path", tasks)
    model, tokenizer, _ = load_export(export)
    right = 0
    for document in documents:
        prompt = tokenizer.encode(document["question"])
        losses = []
        for choice in document["choices"]:
            ids = torch.tensor([[*prompt, *tokenizer.encode(choice)[1:]]])
            logits = model.logits(model.hidden(ids[:, :-1])[0])[0, len(prompt) - 1 :]
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")))
        right += losses.index(min(losses)) == document["answer"]
    assert report["tasks"]["lm_eval/cloze"] == {"scores": {"acc,none": right / 4}, "documents": 4}
    assert "lm_eval" in report["versions"]
    message = refused(capsys, export, "lm_eval/none_such", "--include-path", tasks, "--json", tmp_path / "x.json")
    assert "lm-eval knows no task 'none_such'" in message


def test_the_fingerprint_is_of_the_parameters(export: Path, tmp_path: Path) -> None:
    report = evaluated(tmp_path, export, "niah_single_1", "--lengths", 400, "--samples", 1, "--depths", 50)
    digest = hashlib.sha256()
    for name, parameter in sorted(load_export(export).model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}\n".encode() + parameter.numpy().tobytes())
    assert report["model"]["fingerprint"] == digest.hexdigest()
