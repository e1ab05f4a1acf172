"""Do exports of models trained on several ranks compute under transformers what the trainer computed?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed
from tests.inference.tiny import tiny_export
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, make_dataset, tiny_tree
from titans_pretrain.config import VARIANTS, config_from_dict
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.inference.export import load_export, write_export
from titans_pretrain.inference.huggingface.files import tokenizer_files
from titans_pretrain.inference.huggingface.flatten import modelling_files
from titans_pretrain.train.checkpoint import find_checkpoints, read_manifest
from titans_pretrain.train.saved_state import StoredWeights

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("huggingface")

STAGES = {
    **{"mac": 1, "mag": 2, "mal": 3, "lmm": 1, "transformer": 0, "sliding_window": 3},
    **{"gated_deltanet": 2, "gated_deltanet_swa": 1, "linear_attention": 3, "rmt": 2},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> list[Path]:
    """One export per variant, of runs on tensor 2 x sequence 2 ranks."""
    folder = tmp_path_factory.mktemp("exports")
    size = Tokenizer(tokenizer_file).vocab_size
    data = make_dataset(folder / "data", tokenizer=tokenizer_file.read_bytes())
    trees = [
        tiny_tree(
            data,
            folder / "runs",
            model__variant=variant,
            model__vocab_size=size,
            model__num_layers=2 if variant == "mac" else 1,
            model__num_heads=4,
            model__memory_heads=4,
            model__tie_embeddings=variant == "lmm",
            data__batch_tokens=2 * SEQ_LEN,
            schedule__tokens=3 * 2 * SEQ_LEN,
            eval__tokens=SEQ_LEN,
            parallel__tensor=2,
            parallel__sequence=1 if variant == "rmt" else 2,
            engine__zero_stage=STAGES[variant],
            run__name=variant,
        )
        for variant in VARIANTS
    ]
    assert run_distributed(train_job, 4, *trees) == [None] * 4
    found = []
    for variant in VARIANTS:
        (checkpoint,) = find_checkpoints(folder / "runs" / variant)
        manifest = read_manifest(checkpoint)
        out = folder / variant
        # One weights file, or several small ones.
        limit = 20_000 if variant in ("mag", "lmm") else 10**9
        config, weights = config_from_dict(manifest["config"]), StoredWeights(checkpoint, manifest)
        write_export(out, config, weights, checkpoint / "tokenizer.model", {"step": 3}, max_shard_bytes=limit)
        shutil.copyfile(checkpoint / "logits.safetensors", folder / f"{variant}.logits")
        found.append(out)
    return found


def in_a_bare_process(arguments: list[str], cache: Path) -> Any:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("hf_process.py")
    result = subprocess.run(
        [sys.executable, "-I", str(script), *arguments], capture_output=True, text=True, env=environment, cwd=cache
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_transformers_computes_what_the_trainer_computed(exports: list[Path], tmp_path: Path) -> None:
    found = in_a_bare_process([str(path) for path in exports], tmp_path)
    for path in exports:
        facts = found[str(path)]
        print(path.name, facts)
        assert facts["difference"] <= 1e-5, path.name
        assert facts["spread"] > 0.1, path.name
        assert facts["carried"] < 1e-4, path.name
        assert facts["loss"] < 1e-5, path.name
        assert facts["greedy"], path.name
        assert facts["padded"], path.name
        assert facts["beams"], path.name
        assert not facts["package"], path.name
        assert facts["tied"] == (path.name == "lmm")
        model = load_export(path).model
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_large_weights_are_in_several_files(exports: list[Path]) -> None:
    (sharded,) = (path for path in exports if path.name == "mag")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for f in files for t in load_file(f).values())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= 20_000


def test_the_modelling_code_is_complete_and_names_nothing_outside(tmp_path: Path) -> None:
    files = modelling_files()
    assert {"modeling_titans.py", "configuration_titans.py", "titans_memory_scan.py", "titans_config.py"} < set(files)
    for name, text in files.items():
        compile(text, name, "exec")
        lines = [line.split() for line in text.splitlines()]
        imported = {w[1] for w in lines if len(w) > 1 and w[0] in ("from", "import")}
        assert {m.removeprefix(".") + ".py" for m in imported if m.startswith(".")} <= set(files), name
        assert not any(m.split(".")[0] == "titans_pretrain" for m in imported), name


def test_a_model_from_a_config_begins_as_a_run_does(tmp_path: Path, tokenizer_file: Path) -> None:
    from titans_pretrain.inference.huggingface.configuration_titans import TitansConfig
    from titans_pretrain.inference.huggingface.modeling_titans import TitansForCausalLM

    exported = tiny_export(tmp_path / "export", tokenizer_file, "mag")
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    torch.manual_seed(1)
    model = TitansForCausalLM(TitansConfig(**{k: v for k, v in settings.items() if k != "auto_map"}))
    assert [p.shape for p in model.parameters()] == [p.shape for p in exported.parameters()]
    for (name, fresh), trained in zip(model.model.named_parameters(), exported.parameters(), strict=True):
        assert torch.isfinite(fresh).all(), name
        assert fresh.std() <= 2 * trained.std() + 1, name
    with pytest.raises(ValueError, match="pad on the left"):
        model(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        model(inputs_embeds=torch.ones(1, 3, 32))


NASTY = [
    *(
        "",
        "a",
        " a",
        "  two  spaces ",
        "12345 6.78",
        "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \n\t x",
        "a\u2581b",
        "\x00z",
    ),
    *("<s> hi </s> <unk> <0x41>", "\u00e9 e\u0301 \ufb01", "\n\n\n", "    ", "x" * 50, "\r\n\u2028\u200b\ufeff"),
]


def test_the_tokenizer_agrees_with_sentencepiece(tmp_path: Path, tokenizer_file: Path) -> None:
    import random

    from transformers import AutoTokenizer

    for name, text in tokenizer_files(tokenizer_file).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tokenizer_file)
    words = [
        word for path in sorted(Path(__file__).parent.parent.rglob("*.py")) for word in path.read_text().split(" ")
    ]
    chance = random.Random(3)
    parts: list[str] = []
    length = 0
    while length < 1_000_000:
        odd = chance.random() < 0.02
        parts.append((chance.choice(NASTY) if odd else chance.choice(words)) + " " * chance.choice([0, 1, 1, 1, 2, 3]))
        length += len(parts[-1])
    for text in ["".join(parts), *NASTY]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), repr(text[:50])
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text[:50])
    batch = theirs(["a long line of words", "short"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0, "padding is on the left"
