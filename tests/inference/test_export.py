"""Does an exported folder load as the model that was exported, and is every damaged one refused with a reason?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.inference.tiny import VOCAB, random_ids, tiny_export
from titans_pretrain.config import VARIANTS
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import is_export, load_export


@pytest.mark.parametrize(
    ("variant", "changes"), [*((variant, {}) for variant in VARIANTS), ("lmm", dict(arrangement="h3"))]
)
@torch.no_grad()
def test_loaded_export_is_the_exported_model(
    variant: str, changes: dict[str, Any], tmp_path: Path, tokenizer_file: Path
) -> None:
    model = tiny_export(tmp_path / "export", tokenizer_file, variant, **changes)
    loaded, tokenizer, info = load_export(tmp_path / "export")
    tokens = torch.tensor([random_ids(50)])
    assert torch.equal(loaded.logits(loaded.hidden(tokens)[0]), model.logits(model.hidden(tokens)[0]))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert tokenizer.decode(tokenizer.encode("the memory")) == "the memory"
    assert info.training == {"step": 7, "tokens": 448}
    assert info.config.data.seq_len == 32
    assert is_export(tmp_path / "export")


def test_derived_sizes_are_stored_derived(tmp_path: Path, tokenizer_file: Path) -> None:
    """So that an export keeps its meaning when a default changes."""
    tiny_export(tmp_path / "export", tokenizer_file, "mag", hidden_dim=0)
    model = json.loads((tmp_path / "export" / "titans_export.json").read_text())["config"]["model"]
    assert (model["hidden_dim"], model["memory_heads"], model["memory_theta_max"]) == (128, 2, 1 / 16)


def test_tied_embeddings_are_stored_once(tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "export", tokenizer_file, "lmm", tie_embeddings=True)
    assert "model.head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    model = load_export(tmp_path / "export").model
    assert model.head.weight is model.embedding.weight


@torch.no_grad()
def test_bf16_is_the_rounded_weights_in_half_the_bytes(tmp_path: Path, tokenizer_file: Path) -> None:
    model = tiny_export(tmp_path / "fp32", tokenizer_file, "mag")
    tiny_export(tmp_path / "bf16", tokenizer_file, "mag", dtype="bf16")
    loaded = load_export(tmp_path / "bf16").model
    for (name, exact), rounded in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert rounded.dtype == torch.bfloat16, name
        assert torch.equal(rounded, exact.bfloat16()), name
    assert load_export(tmp_path / "bf16", dtype="fp32").model.embedding.weight.dtype == torch.float32
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("bf16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


# ------------------------------------------------------------------------------------------------------------ damage


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        description = json.loads((folder / "titans_export.json").read_text())
        change(description)
        (folder / "titans_export.json").write_text(json.dumps(description))

    return edit


def flip_a_weight_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """As somebody would who edits an export and mends its checksums."""
    path = folder / "model.safetensors"
    path.write_bytes(tensors) if isinstance(tensors, bytes) else save_file(tensors, path)
    recorded = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_config(lambda d: d["files"].update({"model.safetensors": recorded}))(folder)


def other_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        replace_weights(folder, tensors)

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no exported model at .*convert_checkpoint.py export"),
    "no config": (lambda f: (f / "titans_export.json").unlink(), "holds no titans_export.json"),
    "run folder": (lambda f: [(f / "titans_export.json").unlink(), (f / "checkpoints").mkdir()], "is a run folder"),
    "checkpoint": (lambda f: [(f / "titans_export.json").unlink(), (f / "manifest.json").touch()], "is a checkpoint"),
    "config cut": (lambda f: (f / "titans_export.json").write_text('{"format": "ti'), "damaged"),
    "config not ours": (
        lambda f: (f / "titans_export.json").write_text('{"model_type": "llama"}'),
        "is not of a model exported",
    ),
    "version": (edit_config(lambda d: d.update(format_version=3)), "version 3, this program reads version 2"),
    "no dtype": (edit_config(lambda d: d.pop("dtype")), "dtype is missing"),
    "other dtype": (edit_config(lambda d: d.update(dtype="fp8")), "dtype is 'fp8'"),
    "section": (edit_config(lambda d: d["config"].update(model=3)), "not a mapping"),
    "unknown key": (edit_config(lambda d: d["config"]["model"].update(widow=3)), "widow.*did you mean model.window"),
    "first version": (
        lambda f: [
            (f / "titans_export.json").unlink(),
            (f / "config.json").write_text('{"format": "titans_pretrain export", "format_version": 1}'),
        ],
        "version 1, this program reads version 2",
    ),
    "code edited": (
        lambda f: (f / "titans_memory_scan.py").write_text("pass\n"),
        "titans_memory_scan.py has 5 bytes, titans_export.json records",
    ),
    "config edited": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("titans", "tutans")),
        "config.json is damaged: its sha256",
    ),
    "tokenizer.json gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
        "has 99 bytes, titans_export.json records",
    ),
    "flipped bit": (flip_a_weight_bit, "sha256"),
    "not safetensors": (lambda f: replace_weights(f, b"x" * 999), "not readable safetensors"),
    "parameter gone": (other_weights(lambda t: t.pop("model.norm.weight")), "lacks parameter norm.weight"),
    "parameter more": (other_weights(lambda t: t.update({"model.extra": torch.ones(1)})), "unknown parameter extra"),
    "shape": (
        other_weights(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"norm.weight of shape \[31\].*\[32\]",
    ),
    "vocabulary": (edit_config(lambda d: d["config"]["model"].update(vocab_size=VOCAB - 1)), f"{VOCAB} pieces"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "export", tokenizer_file, "lmm", num_layers=1)
    damage, message = DAMAGE[name]
    damage(tmp_path / "export")
    with pytest.raises(UserError, match=message):
        load_export(tmp_path / "export")
