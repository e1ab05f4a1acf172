"""What does an exported model write? Streams a continuation of the prompt to stdout, token by token.

    python tools/generate.py OUT --prompt "Once upon" --max-new-tokens 200 --temperature 0.8 --top-p 0.95

The model reads the prompt once and then keeps a recurrent state: memory does not grow with the length (except for the
full-attention baseline, variant transformer). Rates and the size of the state go to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Generation, state_bytes
from titans_pretrain.inference.sampling import SamplingOptions


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Continue a text with an exported model.")
    parser.add_argument("model", metavar="OUT", type=Path, help="folder written by tools/convert_checkpoint.py export")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="", help='text to continue (default "": from the beginning of a document)')
    prompts.add_argument("--prompt-file", type=Path, help="UTF-8 file with the text to continue, taken as it is")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="stop after so many (default 256)")
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
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens must be 0 or more, not {options.max_new_tokens}")
    if options.threads < 0:
        raise UserError(f"--threads must be 0 (torch's choice) or more, not {options.threads}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be 0 or more and below 2^63, not {options.seed}")
    if options.threads:
        torch.set_num_threads(options.threads)
    text = options.prompt if options.prompt_file is None else read_prompt(options.prompt_file)

    model, tokenizer, info = load_export(options.model, choose_device(options.device))
    prompt = tokenizer.encode(text)
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
    )
    prefilled = time.perf_counter()
    written, why = 0, "--max-new-tokens"
    try:
        show(text)
        decoder = tokenizer.stream(prompt)
        for token in generation:
            show(decoder.push(token))
            written += 1
        show(decoder.finish() + "\n")
        if written < options.max_new_tokens:
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


def show(text: str) -> None:
    """Print now. What the terminal's encoding cannot show becomes a question mark, not a crash."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def read_prompt(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read --prompt-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda but torch sees no CUDA device; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


if __name__ == "__main__":
    main()
