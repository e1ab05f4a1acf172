"""What do the JSON files of an export say to transformers: the model's config, generation defaults, the tokenizer?"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from titans_pretrain.config import Config
from titans_pretrain.data.tokenizer import Tokenizer

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
SPACE = "\u2581"
"""How SentencePiece writes a space in a piece."""


def transformers_config(config: Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json: `TitansConfig` with the resolved `model` section, and where its classes are."""
    model = dataclasses.asdict(config.model)
    return {
        "architectures": ["TitansForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_titans.TitansConfig",
            "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
        },
        "model_type": "titans",
        "dtype": TORCH_NAMES[dtype],
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.dim,
        "intermediate_size": config.model.resolved_hidden_dim,
        "num_hidden_layers": config.model.num_layers,
        "num_attention_heads": config.model.num_heads,
        "max_position_embeddings": config.data.seq_len,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id if tokenizer.eos_id >= 0 else None,
        "tie_word_embeddings": config.model.tie_embeddings,
        "use_cache": True,
        "titans": model,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json. Rows that have ended are filled with the end-of-sequence id."""
    eos = tokenizer.eos_id if tokenizer.eos_id >= 0 else None
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.bos_id if eos is None else eos,
    }


def tokenizer_files(path: Path) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, as texts, of a SentencePiece model; {} where its algorithm (word, char) has no
    counterpart in `tokenizers`.

    Ids and decoded text are SentencePiece's. Control pieces such as <s> are text when they come in a text, as there: only
    the beginning-of-sequence id is put in front.
    """
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    model = _algorithm(proto)
    if model is None:
        return {}
    pieces = proto.pieces
    control = [i for i, piece in enumerate(pieces) if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    given = [i for i, piece in enumerate(pieces) if piece.type == piece.USER_DEFINED]
    added = [_added(i, pieces[i].piece, special=True) for i in control]
    added += [_added(i, pieces[i].piece.replace(SPACE, " "), special=False) for i in given]
    bos, eos, unknown = (i for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.unk_id))
    prefix = proto.normalizer_spec.add_dummy_prefix
    front = {"SpecialToken": {"id": pieces[bos].piece, "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                pieces[bos].piece: {"id": pieces[bos].piece, "ids": [bos], "tokens": [pieces[bos].piece]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[bos].piece,
        "eos_token": pieces[eos].piece if eos >= 0 else None,
        "unk_token": pieces[unknown].piece,
        "pad_token": pieces[eos if eos >= 0 else bos].piece,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {"tokenizer.json": _text(tokenizer), "tokenizer_config.json": _text(settings)}


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def _normalizers(proto: Any) -> list[dict[str, Any]]:
    spec = proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _algorithm(proto: Any) -> dict[str, Any] | None:
    """The `model` of a tokenizer.json."""
    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.model_type == spec.UNIGRAM:
        vocabulary = [[piece.piece, piece.score] for piece in pieces]
        return {"type": "Unigram", "unk_id": spec.unk_id, "vocab": vocabulary, "byte_fallback": spec.byte_fallback}
    if spec.model_type != spec.BPE:
        return None
    places = {piece.piece: i for i, piece in enumerate(pieces)}
    # SentencePiece joins the neighbours whose joint piece has the highest score; `tokenizers` asks for the pairs in that order.
    merges: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        if piece.type != piece.NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in places and right in places:
                merges.append((-piece.score, places[left], places[right], left, right))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": spec.byte_fallback,
        "ignore_merges": False,
        "vocab": places,
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }
