"""Run by tests in a process of its own that has torch and transformers and cannot import titans_pretrain.

    python -I hf_process.py FOLDER...   each an export with logits.safetensors beside it, as a checkpoint has

prints one JSON object: for each folder what was found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Absent:
    """As if the package were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "titans_pretrain":
            raise ModuleNotFoundError(name)


def look(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    stored = load_file(folder.parent / f"{folder.name}.logits")
    tokens = stored["tokens"]
    with torch.no_grad():
        logits = model(tokens).logits
        # With the cache, in two parts.
        first = model(tokens[:, :19], use_cache=True)
        second = model(tokens[:, 19:], past_key_values=first.past_key_values)
        carried = torch.cat([first.logits, second.logits], dim=1)
        labelled = model(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])

    # Greedy continuation: against the whole text read anew for every token, alone, in a padded batch and as beams.
    ids = tokens[:, :21]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(tokens[:, :21], **settings)
    padded = torch.zeros(2, 21, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    padded[0], mask[0] = tokens[0, :21], 1
    padded[1, 4:], mask[1, 4:] = tokens[0, :17], 1
    both = model.generate(padded, attention_mask=mask, **settings)
    short = model.generate(tokens[:, :17], **settings)
    beams = model.generate(tokens[:, :21], **{**settings, "num_beams": 3})
    beams_slow = model.generate(tokens[:, :21], **{**settings, "num_beams": 3, "use_cache": False})
    return {
        "difference": (logits - stored["logits"]).abs().max().item(),
        "spread": stored["logits"].std().item(),
        "carried": (carried - logits).abs().max().item(),
        "loss": (labelled - expected).abs().item(),
        "greedy": bool((alone == ids).all()),
        "padded": bool((both[0] == alone[0]).all() and (both[1, 4:] == short[0]).all()),
        "beams": bool((beams == beams_slow).all()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "package": "titans_pretrain" in sys.modules,
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    print(json.dumps({folder: look(Path(folder)) for folder in sys.argv[1:]}))
