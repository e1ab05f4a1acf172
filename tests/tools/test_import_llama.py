"""A Hugging Face Llama made into starting weights: the same logits, and a run that begins with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, VOCAB_SIZE, make_dataset, read_metrics, tiny_tree
from titans_pretrain.config import config_from_dict, load_config
from titans_pretrain.model import Titans, initialize
from titans_pretrain.train.checkpoint import full_fp32_weights, read_manifest
from tools.convert_checkpoint import main

TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64, vocab_size=VOCAB_SIZE)
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "as many key heads as query heads": (LlamaConfig, LlamaForCausalLM, dict(rms_norm_eps=1e-5)),
    "grouped heads, another rotary base": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, rope_theta=5e5)),
    "one key head, tied": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "a window": (MistralConfig, MistralForCausalLM, dict(num_key_value_heads=3, sliding_window=24)),
}


def make_llama(folder: Path, kind: str, **overrides: Any) -> Any:
    """A random Llama in a Hugging Face folder, in several files; its norms' weights are random too."""
    config_class, model_class, settings = KINDS[kind]
    if "rope_theta" in settings:
        settings = {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_theta"]}}
    torch.manual_seed(0)
    model = model_class(config_class(**{**TINY, **settings, **overrides}, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def loaded(folder: Path) -> Titans:
    model = Titans(config_from_dict(read_manifest(folder)["config"]).model)
    model.load_state_dict(full_fp32_weights(folder))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_the_llama(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make_llama(tmp_path / "llama", kind)
    main(["import-llama", str(tmp_path / "llama"), str(tmp_path / "out")])
    assert ("written out as 6" in capsys.readouterr().out) == ("key_value" in str(KINDS[kind][2]))
    ours = loaded(tmp_path / "out")
    assert ours.config.variant == ("sliding_window" if kind == "a window" else "transformer")
    tokens = torch.randint(VOCAB_SIZE, (2, 160))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(ours.hidden(tokens)[0])
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5
    # The section to train with is that of the weights.
    assert load_config(tmp_path / "out" / "model.yaml").model == ours.config


def test_mal_begins_as_the_llama_and_mag_has_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make_llama(tmp_path / "llama", "grouped heads, another rotary base")
    small = ["model.memory_chunk=16", "model.window=64", "model.memory_expansion=2"]
    tokens = torch.randint(VOCAB_SIZE, (2, 60))
    for variant in ("mal", "mag"):
        main(["import-llama", str(tmp_path / "llama"), str(tmp_path / variant), "--variant", variant, "--set", *small])
        assert "memory.initial_weights.0" in capsys.readouterr().out
    ours = loaded(tmp_path / "mal")
    with torch.no_grad():
        assert (ours.logits(ours.hidden(tokens)[0]) - theirs(tokens).logits).abs().max() < 1e-5
    weights = full_fp32_weights(tmp_path / "mag")
    fresh = Titans(config_from_dict(read_manifest(tmp_path / "mag")["config"]).model)
    initialize(fresh, 0)
    own = dict(fresh.named_parameters())
    llama = theirs.state_dict()
    assert torch.equal(weights["blocks.1.attention.query.weight"], llama["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(weights["blocks.1.feed_forward.down.weight"], llama["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(weights["blocks.0.mixer_norm.weight"], llama["model.layers.0.input_layernorm.weight"])
    untouched = [name for name in own if ".memory." in name or (".gate." in name and "feed_forward" not in name)]
    assert len(untouched) > 20
    assert all(torch.equal(weights[name], own[name]) for name in untouched)


def test_a_run_begins_with_the_weights(tmp_path: Path) -> None:
    make_llama(tmp_path / "llama", "grouped heads, another rotary base")
    data = make_dataset(tmp_path / "data")
    main(["import-llama", str(tmp_path / "llama"), str(tmp_path / "out")])
    model = vars(load_config(tmp_path / "out" / "model.yaml").model)

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        settings = {f"model__{key}": value for key, value in model.items()}
        settings |= {"schedule__tokens": 4 * 8 * SEQ_LEN, "run__name": name, "run__init_from": str(tmp_path / "out")}
        return tiny_tree(data, tmp_path / "runs", **{**settings, **overrides})

    still = dict(optimizer__learning_rate=1e-9, run__stop_after=1)
    trees = [
        tree("still", **still, parallel__tensor=2),
        tree("still 3", **still, engine__zero_stage=3),
        tree("pieces", run__stop_after=2),
        tree("pieces", engine__zero_stage=3),  # goes on from its own checkpoint, not from the Llama
        tree("whole", parallel__tensor=2),
    ]
    assert run_distributed(train_job, 2, *trees) == [None, None]
    before = full_fp32_weights(tmp_path / "out")
    for name in ("still", "still 3"):
        after = full_fp32_weights(tmp_path / "runs" / name / "checkpoints" / "step_00000001")
        for parameter, weight in before.items():
            torch.testing.assert_close(after[parameter], weight, rtol=0, atol=1e-7, msg=parameter)
    pieces, whole = (
        [row["loss"] for row in read_metrics(tmp_path / "runs" / name) if "loss" in row] for name in ("pieces", "whole")
    )
    assert len(pieces) == len(whole) == 4
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_another_model_or_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path / "llama", "as many key heads as query heads")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"another tokenizer")
    folder = tmp_path / "out"
    main(["import-llama", str(tmp_path / "llama"), str(folder)])
    data = make_dataset(tmp_path / "data")
    model = load_config(folder / "model.yaml").model
    same = {f"model__{k}": v for k, v in vars(model).items()}
    for overrides, says in [
        ({**same, "model__norm_eps": 1e-6}, "model.norm_eps=1e-05, but the config says 1e-06"),
        (same, "was trained with tokenizer"),
        ({**same, "run__init_from": str(tmp_path / "none")}, "there is no such folder"),
        ({**same, "run__resume": str(folder), "run__init_from": ""}, "set run.init_from="),
    ]:
        tree = tiny_tree(data, tmp_path / "runs", **{"run__init_from": str(folder), **overrides})
        (sentence,) = run_distributed(train_job, 1, tree)
        assert sentence is not None
        assert says in sentence

    def refused(says: str, *arguments: str, **changes: Any) -> None:
        config = json.loads((tmp_path / "llama" / "config.json").read_text())
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        for file in (tmp_path / "llama").glob("*.safetensors"):
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "config.json").write_text(json.dumps({**config, **changes}))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["import-llama", str(broken), str(tmp_path / "no"), *arguments])
        assert says in capsys.readouterr().err
        assert not (tmp_path / "no").exists()

    refused("model_type gpt2", model_type="gpt2")
    refused("attention_bias=True", attention_bias=True)
    refused("type llama3", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    refused("heads of head_dim 16", head_dim=16)
    refused("no tensor model.layers.2", num_hidden_layers=3)
    refused("tensors that a Llama has not", num_hidden_layers=1)
    refused("by config.json it is [96, 48]", intermediate_size=96)
    refused("model.dim cannot be chosen", "--set", "model.dim=64")
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    safetensors.torch.save_file(extra, tmp_path / "llama" / "more.safetensors")
    refused("1 tensors that a Llama has not, such as model.layers.0.self_attn.q_norm.weight")
    (tmp_path / "llama" / "more.safetensors").write_bytes(b"not tensors")
    refused("damaged *.safetensors")
