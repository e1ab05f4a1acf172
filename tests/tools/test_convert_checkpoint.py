"""Does `export` give back what the trainer trained, and refuse, leaving nothing, whatever it cannot vouch for?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import run_distributed
from tests.inference.tiny import VOCAB, prose
from tests.train.tiny import tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.data.manifest import Manifest, SplitEntry, dtype_for, write_manifest
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.data.writer import ShardWriter, unigram_entropy
from titans_pretrain.inference.export import EXPORT_NAMES, load_export
from titans_pretrain.inference.generate import Generation
from titans_pretrain.inference.huggingface.flatten import modelling_files
from titans_pretrain.inference.verify import compare, verify_export
from tools.convert_checkpoint import main

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("convert_checkpoint")

STEPS = 6
# One run per way in which DeepSpeed keeps the weights: name -> (processes, overrides).
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "mag": (2, dict(model__variant="mag", engine__zero_stage=1, checkpoint__interval=3)),
    "mac": (1, dict(model__variant="mac", engine__zero_stage=3, model__tie_embeddings=True)),
    "lmm": (2, dict(model__variant="lmm", engine__zero_stage=0, parallel__tensor=2)),
    "mal": (1, dict(model__variant="mal", engine__zero_stage=2, engine__precision="bf16")),
}


def make_dataset(folder: Path, tokenizer_file: Path) -> Path:
    """Shards of generated prose in the tokens of a real SentencePiece model."""
    folder.mkdir()
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_file)
    writers = {}
    for split, lines in (("train", 400), ("valid", 60)):
        documents = [[*tokenizer.encode(line), tokenizer.eos_id] for line in prose(lines, seed=lines)]
        tokens = np.concatenate(documents).astype(np.uint16)
        with ShardWriter(folder, split, VOCAB, shard_tokens=1 << 20, block_tokens=1 << 11) as writer:
            writer.write(tokens, np.array([len(d) for d in documents]))
        writers[split] = writer
    manifest = Manifest(
        dtype=dtype_for(VOCAB),
        vocab_size=VOCAB,
        tokenizer_sha256=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        unigram_entropy=unigram_entropy(writers["train"].token_counts),
        options={},
        splits={s: SplitEntry(w.num_tokens, 1, 4 * w.num_tokens, tuple(w.shards)) for s, w in writers.items()},
    )
    write_manifest(folder, manifest)
    return folder


def train_on_this_rank(tree: dict[str, dict[str, Any]]) -> None:
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.loop import train

    train(config_from_dict(tree), join(find_environment(), "cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Callable[[str], Path]:
    """name -> its run folder, trained by the real trainer when first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_dataset(folder / "data", tokenizer_file)

    def run(name: str) -> Path:
        if not (folder / name).exists():
            processes, overrides = RUNS[name]
            tokens = STEPS * 8 * 32
            tree = tiny_tree(data, folder, run__name=name, schedule__tokens=tokens, **overrides)
            run_distributed(train_on_this_rank, processes, tree)
        return folder / name

    return run


@pytest.fixture
def run_copy(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A run to damage, its newest checkpoint being step 6."""
    return Path(shutil.copytree(runs("mag"), tmp_path / "run"))


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, expect exit 1 and one line on stderr, return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def mend_manifest(checkpoint: Path) -> None:
    """Make a changed checkpoint's sizes and checksums agree again, as damage from before the save would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["mac"])  # test_huggingface.py exports every variant
def test_export_of_a_real_run(
    name: str, runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = runs(name), tmp_path / "deep" / "out"
    main(["export", str(run), str(out)])
    computed_in = "bf16" if name == "mal" else "fp32"
    printed = capsys.readouterr().out
    assert (
        f"fp32 weights verified against the trainer's model: logits of 32 tokens, computed in {computed_in}" in printed
    )
    assert sorted(p.name for p in out.iterdir()) == sorted(
        {*EXPORT_NAMES, *modelling_files()} - {"model.safetensors.index.json"}
    )
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    model, tokenizer, info = load_export(out)
    assert info.training["step"] == STEPS
    assert info.training["tokens"] == STEPS * 8 * 32
    assert info.config.model.vocab_size == VOCAB
    if computed_in == "fp32":  # compared once more, here, without the tool
        stored = load_file(last_checkpoint(run) / "logits.safetensors")
        with torch.no_grad():
            logits = model.logits(model.hidden(stored["tokens"])[0])
        assert (logits - stored["logits"]).abs().max() <= 1e-5
        assert stored["logits"].std() > 0.1
    text = tokenizer.decode(list(Generation(model, tokenizer.encode("The"), max_new_tokens=20)))
    assert isinstance(text, str)


def test_bf16_export_is_verified_unrounded_and_rounded(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(runs("mag")), str(tmp_path / "out"), "--dtype", "bf16"])
    printed = capsys.readouterr().out
    verified = "weights verified against the trainer's model: logits of 32 tokens, computed in"
    assert f"fp32 {verified} fp32 by what transformers loads: largest" in printed
    assert f"bf16 {verified} bf16 by what transformers loads: relative RMS" in printed
    assert load_export(tmp_path / "out").model.embedding.weight.dtype == torch.bfloat16
    comparison = verify_export(tmp_path / "out", last_checkpoint(runs("mag")) / "logits.safetensors", "fp32")
    assert 0 < comparison.relative_rms < comparison.tolerance


def test_a_run_or_checkpoint_that_is_not_there(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("mag")
    message = fails(capsys, "export", run, tmp_path / "out", "--checkpoint", "step_4")
    assert "no such checkpoint; it has step_00000003, step_00000006" in message
    message = fails(capsys, "export", last_checkpoint(run), tmp_path / "out", "--checkpoint", "step_3")
    assert "drop one of the two" in message
    assert "does not exist" in fails(capsys, "export", run / "none", tmp_path / "out")
    assert "neither a run folder" in fails(capsys, "export", tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what it cannot vouch for


def change_a_logit(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "logits.safetensors")
    tensors["logits"][0, 5, 7] += 1e-3
    save_file(tensors, checkpoint / "logits.safetensors")


def change_a_weight(checkpoint: Path) -> None:
    """One fp32 master weight of the first rank's share, by a hundredth."""
    path = next(checkpoint.glob("deepspeed/*zero_pp_rank_0_*optim_states.pt"))
    state = torch.load(path, weights_only=False)
    flat = state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()
    flat[flat.numel() // 2] += 0.01
    torch.save(state, path)


def test_an_export_that_computes_something_else_is_refused(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_a_weight(last_checkpoint(run_copy))
    mend_manifest(last_checkpoint(run_copy))
    message = fails(capsys, "export", run_copy, tmp_path / "out")
    assert "does not compute what the trainer computed (fp32 weights" in message
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_nothing_of_the_user_is_lost(run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, third = tmp_path / "out", run_copy / "checkpoints" / "step_00000003"
    out.mkdir()
    (out / "letters.txt").write_text("mine")
    assert "pass --overwrite" in fails(capsys, "export", run_copy, out)
    assert "replaces exported models only" in fails(capsys, "export", run_copy, out, "--overwrite")
    out.rename(tmp_path / "out.tmp")
    assert "is in the way" in fails(capsys, "export", run_copy, out)
    assert (tmp_path / "out.tmp" / "letters.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out.tmp")

    # A damaged checkpoint is skipped for an older one, and refused by name.
    change_a_logit(last_checkpoint(run_copy))
    assert "is damaged: the contents of logits" in fails(capsys, "export", last_checkpoint(run_copy), out)
    assert not out.exists()
    (tmp_path / "out.tmp").mkdir()  # what a killed export leaves
    (tmp_path / "out.tmp" / "model.safetensors").write_bytes(b"half")
    main(["export", str(run_copy), str(out)])
    assert "skipping" in capsys.readouterr().err
    assert load_export(out).info.training["step"] == 3

    # Logits that were wrong when the checkpoint was made: the replacement fails and costs nothing.
    before = (out / "config.json").read_bytes()
    mend_manifest(last_checkpoint(run_copy))
    message = fails(capsys, "export", run_copy, out, "--checkpoint", "step_6", "--overwrite")
    assert "does not compute what the trainer computed" in message
    assert (out / "config.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]

    (out / "config.json").write_bytes(before + b"\n\n")
    main(["export", str(third), str(out), "--overwrite"])
    assert (out / "config.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_comparison_refuses_nan_and_measures_what_it_says() -> None:
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0))
    assert compare(logits, logits, "fp32", 1).agree
    assert compare(logits, logits + 3.0, "bf16", 1).relative_rms == pytest.approx(
        0.0, abs=1e-6
    )  # no probability changes
    for scale in (0.01, 1.0):  # the largest logit is 3.4: 1e-5 of it, and never below 1e-5
        limit = 1e-5 * max(1.0, (scale * logits).abs().max().item())
        one_off = torch.zeros_like(logits)
        one_off[0, 2, 7] = limit
        assert compare(scale * logits, scale * logits + 0.9 * one_off, "fp32", 1).agree
        assert not compare(scale * logits, scale * logits + 1.2 * one_off, "fp32", 1).agree
    assert compare(logits, 1.01 * logits, "bf16", 1).relative_rms == pytest.approx(0.01, rel=1e-3)
    assert not compare(logits, 1.04 * logits, "bf16", 1).agree
    assert compare(logits, 1.04 * logits, "bf16", 4).agree
    for computed_in in ("fp32", "bf16"):
        assert not compare(logits, torch.full_like(logits, torch.nan), computed_in, 1).agree
        assert not compare(torch.full_like(logits, torch.nan), logits, computed_in, 1).agree
