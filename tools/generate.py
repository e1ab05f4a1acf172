"""What does an exported model write? Streams a continuation of the prompt to stdout, token by token.

    python tools/generate.py OUT --prompt "Once upon" --max-new-tokens 200 --temperature 0.8 --top-p 0.95
    python tools/generate.py OUT --prompt-file book.txt --max-new-tokens 0 --save-state book.state
    python tools/generate.py OUT --load-state book.state --prompt "The murderer was" --max-new-tokens 20
    python tools/generate.py OUT --prompts questions.txt --stop $'\\n'

The model reads the prompt once and then keeps a recurrent state: memory does not grow with the length (except for the
full-attention baseline, variant transformer). --save-state writes that state to a file, --load-state goes on from it, in
another process, on another day. Rates and the size of the state go to stderr.

--prompts writes one JSON object a line to stdout, as soon as its prompt is done: the prompts are continued together, one
forward a token for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import Export, load_export
from titans_pretrain.inference.generate import Generation, Row, write_batch
from titans_pretrain.inference.sampling import SamplingOptions
from titans_pretrain.inference.state import load_reading, save_reading
from titans_pretrain.inference.text import TextWriter, prompt_ids
from titans_pretrain.model.titans import state_bytes


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Continue a text with an exported model.")
    parser.add_argument("model", metavar="OUT", type=Path, help="folder written by tools/convert_checkpoint.py export")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="", help='text to continue (default "": from the beginning of a document)')
    prompts.add_argument("--prompt-file", type=Path, help="UTF-8 file with the text to continue, taken as it is")
    prompts.add_argument(
        "--prompts", type=Path, help="UTF-8 file with a text to continue in each line; prompt i has seed + i"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="prompts of --prompts that are written together (default 8)"
    )
    parser.add_argument(
        "--load-state", type=Path, help="go on from this state: the prompt comes after what it has read"
    )
    parser.add_argument("--save-state", type=Path, help="write the state after prompt and continuation to this file")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="stop after so many (default 256)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text; may be given several times; \\n is a new line",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens (default 0: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens of this joint probability (default 1: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: CUDA where there is one"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default 0: torch's choice)")
    options = parser.parse_args(arguments)

    sampling = SamplingOptions(options.temperature, options.top_k, options.top_p)
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    text = options.prompt if options.prompt_file is None else read_text(options.prompt_file, "--prompt-file")
    texts = None if options.prompts is None else read_text(options.prompts, "--prompts").splitlines()

    export = load_export(options.model, choose_device(options.device))
    if texts is None:
        write_one(export, text, sampling, options)
    else:
        write_many(export, texts, sampling, options)


def check(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens must be 0 or more, not {options.max_new_tokens}")
    if options.threads < 0:
        raise UserError(f"--threads must be 0 (torch's choice) or more, not {options.threads}")
    if not 0 <= options.seed < 2**62:
        raise UserError(f"--seed must be 0 or more and below 2^62, not {options.seed}")
    if options.batch < 1:
        raise UserError(f"--batch must be 1 or more, not {options.batch}")
    if not all(options.stop):
        raise UserError("--stop must not be empty")
    if options.prompts is not None and (options.load_state is not None or options.save_state is not None):
        raise UserError(
            "--load-state and --save-state are for one text, not for --prompts; give --prompt or --prompt-file"
        )
    if options.save_state is not None and not options.save_state.parent.is_dir():
        raise UserError(f"--save-state {options.save_state}: there is no folder {options.save_state.parent}")


def write_one(export: Export, text: str, sampling: SamplingOptions, options: argparse.Namespace) -> None:
    """Stream the continuation of one text."""
    model, tokenizer, info = export
    start = None if options.load_state is None else load_reading(options.load_state, model)
    if start is not None and len(start.recent) != 1:
        raise UserError(f"--load-state {options.load_state} holds {len(start.recent)} texts; it must hold one")
    prompt = prompt_ids(tokenizer, text, start)
    started = time.perf_counter()
    generation = Generation(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        options=sampling,
        seed=options.seed,
        eos_id=tokenizer.eos_id,
        num_tokens=tokenizer.vocab_size,
        piece=info.config.data.seq_len,
        start=start,
    )
    prefilled = time.perf_counter()
    written, why = 0, "--max-new-tokens"
    try:
        show(text)
        writer = TextWriter(tokenizer, [*(() if start is None else start.recent[0]), *prompt], options.stop)
        for token in generation:
            show(writer.push(token))
            written += 1
            if writer.stopped:
                break
        show(writer.finish() + "\n")
        if writer.stopped:
            why = "--stop"
        elif written < options.max_new_tokens:
            why = "end of text"
    except KeyboardInterrupt:
        show("\n")
        why = "interrupted"
    except BrokenPipeError:  # the reader has seen enough; without this Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        why = "output closed"
    seconds = time.perf_counter() - prefilled
    print(
        f"prompt: {len(prompt)} tokens in {prefilled - started:.2f} s; written: {written} tokens in {seconds:.2f} s, "
        f"{written / max(seconds, 1e-9):.1f} tokens/s ({why}); state: {state_bytes(generation.state):,} bytes",
        file=sys.stderr,
    )
    if options.save_state is not None:
        reading = generation.reading()
        size = save_reading(options.save_state, reading, model)
        print(f"{options.save_state}: the state after {reading.state.position} tokens, {size:,} bytes", file=sys.stderr)


def write_many(export: Export, texts: list[str], sampling: SamplingOptions, options: argparse.Namespace) -> None:
    """Continue many texts together, a JSON object for each when it is done."""
    model, tokenizer, info = export
    if not texts:
        raise UserError(f"--prompts {options.prompts} has no line")
    prompts = [tokenizer.encode(text) for text in texts]
    writers = [TextWriter(tokenizer, prompt, options.stop) for prompt in prompts]
    rows = [
        Row(options.max_new_tokens, sampling, options.seed + i, tokenizer.eos_id, tokenizer.vocab_size)
        for i in range(len(prompts))
    ]
    shown = [""] * len(rows)
    started = time.perf_counter()
    try:
        for i, token in write_batch(model, prompts, rows, batch=options.batch, piece=info.config.data.seq_len):
            if token is not None:
                shown[i] += writers[i].push(token)
                if writers[i].stopped:
                    rows[i].ended = "stop"
                continue
            line = {
                "index": i,
                "prompt": texts[i],
                "text": shown[i] + writers[i].finish(),
                "tokens": rows[i].written,
                "ended": rows[i].ended,
            }
            show(json.dumps(line, ensure_ascii=False) + "\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    seconds = time.perf_counter() - started
    written = sum(row.written for row in rows)
    print(
        f"{len(rows)} prompts of {sum(map(len, prompts))} tokens; written: {written} tokens in {seconds:.2f} s, "
        f"{written / max(seconds, 1e-9):.1f} tokens/s, the prompts' time included",
        file=sys.stderr,
    )


def show(text: str) -> None:
    """Print now. What the terminal's encoding cannot show becomes a question mark, not a crash."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def read_text(path: Path, flag: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {flag} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda but torch sees no CUDA device; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


if __name__ == "__main__":
    main()
