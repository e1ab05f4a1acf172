"""What does the memory hold worth remembering? One HTML page that colours a text by the memory's surprise and gates.

    python tools/surprise_map.py EXPORT book.txt --output map.html
    python tools/generate.py EXPORT --prompt "Once" | python tools/surprise_map.py EXPORT - --output map.html

The text is read from a file, or from stdin for "-", in pieces of the training length with the state carried along, in fp32.
The page needs no network and no server; docs/surprise-map.md says what it shows. The quantities are the model's own:
Titans.observe.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import Export, load_export, read_info
from titans_pretrain.model import Titans
from titans_pretrain.model.neural_memory import TokenSignals
from tools.generate import choose_device, read_text

PAGE = Path(__file__).parent / "surprise_page"
LOGITS_AT_ONCE = 512
"""Tokens whose logits exist at one time."""


class Observation(NamedTuple):
    """What a model made of a text of t tokens."""

    nll: Tensor
    """[t]: -log p of each token given those before it, nats; NaN for the first."""
    blocks: dict[int, TokenSignals]
    """By block number, the row alone: [t, h] and [t, h, l]."""


@torch.no_grad()
def observe_text(model: Titans, ids: Sequence[int], piece: int) -> Observation:
    """Read `ids` in pieces of `piece` tokens, the state carried."""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    state, before = None, None
    losses: list[Tensor] = [torch.full((1,), float("nan"))]
    parts: list[dict[int, TokenSignals]] = []
    for start in range(0, len(ids), piece):
        read = tokens[:, start : start + piece]
        hidden, state, signals = model.observe(read, state)
        parts.append({i: TokenSignals(*(None if x is None else x[0].cpu() for x in s)) for i, s in signals.items()})  # type: ignore[arg-type]
        # The token at each place is predicted by the one before it, the first of a piece by the last of the piece before.
        predicting, labels = hidden[:, :-1], read[:, 1:]
        if before is not None:
            predicting, labels = torch.cat((before, predicting), dim=1), read
        before = hidden[:, -1:]
        for place in range(0, labels.shape[1], LOGITS_AT_ONCE):
            part = slice(place, place + LOGITS_AT_ONCE)
            logits = model.logits(predicting[:, part])
            losses.append(F.cross_entropy(logits[0], labels[0, part], reduction="none").float().cpu())
    blocks = {
        i: TokenSignals(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*(p[i] for p in parts), strict=True)))  # type: ignore[arg-type]
        for i in parts[0]
    }
    return Observation(torch.cat(losses), blocks)


def page(export: Export, ids: Sequence[int], observed: Observation, source: str, of_tokens: int) -> str:
    """The whole HTML page.

    Args:
        source: what the text is called.
        of_tokens: how many tokens it has, of which `ids` are the first.
    """
    model, tokenizer, info = export
    first = next(iter(observed.blocks.values()))
    heads, matrices = first.gradient_norm.shape[1:]
    config = info.config.model
    shown = f"{len(ids):,} tokens" if of_tokens == len(ids) else f"the first {len(ids):,} of {of_tokens:,} tokens"
    parameters = sum(p.numel() for p in model.parameters())
    step = info.training.get("step")
    facts = [
        f"{source}: {shown}",
        f"{config.variant}, {parameters / 1e6:.1f} M parameters" + (f", step {step:,}" if step is not None else ""),
        f"{len(observed.blocks)} memories of {heads} heads, {matrices} matri{'x' if matrices == 1 else 'ces'} each",
        f"chunks of {config.memory_chunk} tokens",
    ]
    data = {
        "source": source,
        "facts": " · ".join(facts),
        "heads": heads,
        "matrices": matrices,
        "ids": list(ids),
        **_texts(tokenizer, ids),
        "nll": packed(observed.nll[:, None]),
        "blocks": [{"number": i, "planes": _planes(signals)} for i, signals in observed.blocks.items()],
    }
    # No "<" in it: nothing in a text can end the script it stands in.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    for place, part in (
        ("@CSS@", (PAGE / "page.css").read_text(encoding="utf-8")),
        ("@VALUES@", (PAGE / "values.js").read_text(encoding="utf-8")),
        ("@PAGE@", (PAGE / "page.js").read_text(encoding="utf-8")),
        ("@DATA@", text),
    ):
        head, tail = html.split(place)
        html = head + part + tail
    return html


def _planes(signals: TokenSignals) -> dict[str, Any]:
    gates = {"eta": signals.eta, "alpha": signals.alpha}
    return {
        "inner_loss": packed(signals.inner_loss),
        "gradient": packed(signals.gradient_norm),
        "theta": packed(signals.theta),
        **{name: packed(gate) for name, gate in gates.items() if gate is not None},
    }


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, list[str]]:
    """Of each token the text it completes ("" for control tokens and for the first bytes of a character), its piece, and what
    stands for it where it has no text."""
    decoder = tokenizer.stream()
    texts = [decoder.push(token) for token in ids]
    texts[-1] += decoder.finish()
    pieces = [tokenizer.piece(token) for token in ids]
    marks = [
        "" if text else "start" if token == tokenizer.bos_id else "·" for text, token in zip(texts, ids, strict=True)
    ]
    return {"texts": texts, "pieces": pieces, "marks": marks}


def packed(x: Tensor) -> dict[str, Any]:
    """[t, ...] -> channels of t little-endian 16-bit floats, base64, times a scale that makes the largest 1: 0.05 % exact
    down to 1/16,000 of the largest, and absolutely beyond."""
    channels = x.flatten(1).T.double()
    finite = channels[channels.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 1.0
    scale = scale or 1.0
    values = (channels / scale).half().contiguous().numpy().astype("<f2")
    return {"scale": scale, "data": base64.b64encode(values.tobytes()).decode("ascii")}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="surprise_map.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "export", metavar="EXPORT", type=Path, help="folder written by tools/convert_checkpoint.py export"
    )
    parser.add_argument("text", metavar="TEXT", help='UTF-8 file, or "-" for stdin')
    parser.add_argument("--output", type=Path, default=Path("surprise_map.html"), help="default: surprise_map.html")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="read no more of the text (default 20000)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: CUDA where there is one"
    )
    options = parser.parse_args(arguments)
    if options.max_tokens < 2:
        raise UserError(f"--max-tokens must be 2 or more (the beginning of the text is one), not {options.max_tokens}")
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")

    text = read_stdin() if options.text == "-" else read_text(Path(options.text), "TEXT")
    if not text:
        raise UserError(f"TEXT {options.text} is empty; there is nothing to map")
    model = read_info(options.export).config.model
    if not model.has_memory:
        raise UserError(
            f"{options.export} is of variant {model.variant}, which has no neural memory that could be surprised; give an "
            "export of lmm, mag, mal or mac"
        )
    export = load_export(options.export, choose_device(options.device), "fp32")
    ids = export.tokenizer.encode(text)
    read = ids[: options.max_tokens]
    started = time.perf_counter()
    observed = observe_text(export.model, read, export.info.config.data.seq_len)
    seconds = time.perf_counter() - started
    source = "standard input" if options.text == "-" else Path(options.text).name
    html = page(export, read, observed, source, len(ids))
    try:
        with atomic_file(options.output) as file:
            file.write(html.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write --output {options.output}: {error.strerror}") from error
    left = "" if len(read) == len(ids) else f", the first of {len(ids):,} (--max-tokens)"
    print(
        f"{options.output}: {len(read):,} tokens{left}, {len(observed.blocks)} memories, {len(html) / 1e6:.1f} MB; "
        f"read in {seconds:.1f} s, mean loss {observed.nll[1:].mean():.4f} nats"
    )


def read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: byte {error.start} cannot be decoded") from error


if __name__ == "__main__":
    main()
