"""What can a model do? Perplexity behind the training length, needles in haystacks, scattered facts, lm-eval's tasks.

    python tools/evaluate.py EXPORT perplexity --json mag.json
    python tools/evaluate.py RUN perplexity needle babilong --json mag.json --png mag.png
    python tools/evaluate.py EXPORT niah_single_1 --lengths 512 1024 2048 --depths 0 50 100 --samples 20 --json mag.json
    python tools/evaluate.py EXPORT lm_eval/arc_easy lm_eval/TASK --include-path TASKS --json mag.json
    python tools/evaluate.py compare mag.json lmm.json [--markdown]

TASK is perplexity, needle (all of niah_single_1 to 3, niah_multikey_1 and 2, or one by its name), babilong (babilong_qa1 to
qa3, or one), or lm_eval/NAME. docs/evaluation.md says what each is and what its scores mean. The JSON has no times in it: the
same model, options and machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import titans_pretrain
from titans_pretrain.config import config_to_dict
from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.evaluation import babilong, needle
from titans_pretrain.evaluation.haystack import Haystack, Words, split_sentences
from titans_pretrain.evaluation.perplexity import perplexity_by_position
from titans_pretrain.evaluation.scoring import Scoring
from titans_pretrain.inference.export import DTYPES
from titans_pretrain.model.titans import state_bytes
from tools import evaluate_compare
from tools.evaluate_heat_map import write_heat_map
from tools.evaluate_lm_eval import run_lm_eval
from tools.evaluate_text import held_out_rows, read_prose, sha256_of_files
from tools.generate import choose_device
from tools.load_model import Loaded, fingerprint, load_model

FORMAT, FORMAT_VERSION = "titans_pretrain evaluation", 1
GROUPS = {"perplexity": ["perplexity"], "needle": list(needle.TASKS), "babilong": list(babilong.TASKS)}
GENERATED = (*needle.TASKS, *babilong.TASKS)
USED_BY = {
    "data": ("perplexity",),
    "multiple": ("perplexity",),
    "tokens": ("perplexity",),
    "text": (*GENERATED, "perplexity"),
    "lengths": GENERATED,
    "samples": GENERATED,
    "samples_file": GENERATED,
    "seed": GENERATED,
    "depths": tuple(needle.TASKS),
    "png": tuple(needle.TASKS),
    "include_path": ("lm_eval",),
    "limit": ("lm_eval",),
}
"""Which tasks an option is for: given without any of them it is refused."""
DEFAULTS: dict[str, Any] = {"multiple": 16, "tokens": 262_144, "samples": 10, "seed": 0}


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        evaluate_compare.main(arguments[1:])
        return
    options = parse(arguments)
    tasks = expand(options.tasks)
    check(options, tasks)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    loaded = load_model(options.model, options.checkpoint, device, options.dtype)
    options.piece = options.piece or loaded.config.data.seq_len
    record: list[dict[str, Any]] | None = [] if options.samples_file else None
    results = run(loaded, tasks, options, device, record)
    if record is not None:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in record)
        write(options.samples_file, lines, "--samples-file")
    report = describe(loaded, tasks, options, device) | {"tasks": results}
    write(options.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "--json")
    if options.png:
        write_heat_map(options.png, results, f"{options.model.name}: {loaded.config.model.variant}")
    print(evaluate_compare.table([options.model.name], [report], markdown=False))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="RUN_OR_EXPORT", type=Path, help="exported model, run folder or checkpoint folder")
    add("tasks", metavar="TASK", nargs="+", help="perplexity, needle, babilong, one of their tasks, or lm_eval/NAME")
    add("--json", metavar="OUT", type=Path, required=True, help="file to write: config, fingerprint, versions, scores")
    add("--png", metavar="OUT", type=Path, help="heat map of the needle grid (extra scaling: matplotlib)")
    add("--samples-file", metavar="OUT", type=Path, help="every prompt, answer and continuation, an object a line")
    add("--checkpoint", default="", metavar="step_N", help="which checkpoint of the run folder")
    add("--seed", type=int, help="of needles and stories (default 0)")
    add("--lengths", type=int, nargs="+", metavar="N", help="tokens (default: 1, 2 and 4 training lengths)")
    add("--depths", type=float, nargs="+", metavar="P", help="of the needle, percent (default 0 25 50 75 100)")
    add("--samples", type=int, metavar="N", help="in each cell (default 10)")
    add(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="prose to hide things in (default: make demo's); or to measure",
    )
    add("--data", metavar="DATASET", help="whose validation split to measure (default: the run's)")
    add("--multiple", type=int, metavar="N", help="measure to so many training lengths (default 16)")
    add("--tokens", type=int, metavar="N", help="to measure, at most; at least one sequence (default 262144)")
    add("--batch", type=int, default=8, metavar="N", help="sequences that run together (default 8)")
    add(
        "--piece",
        type=int,
        default=0,
        metavar="N",
        help="tokens of one that run at once (default: the training length)",
    )
    add("--include-path", type=Path, metavar="DIR", help="of lm-eval task files")
    add("--limit", type=int, metavar="N", help="documents of each lm-eval task (default: all)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: CUDA where there is one")
    add("--dtype", choices=list(DTYPES), default="", help="what the model computes in (default: as stored)")
    add("--threads", type=int, default=0, help="CPU threads (default 0: torch's choice)")
    return parser.parse_args(arguments)


def expand(names: Sequence[str]) -> list[str]:
    """Tasks by name, each once, in the order asked."""
    tasks: list[str] = []
    for name in names:
        if name in GROUPS:
            tasks += GROUPS[name]
        elif name in GENERATED or (name.startswith("lm_eval/") and name != "lm_eval/"):
            tasks.append(name)
        else:
            known = ", ".join([*GROUPS, *GENERATED, "lm_eval/NAME"])
            raise UserError(f"there is no task {name!r}; the tasks are {known}")
    return list(dict.fromkeys(tasks))


def check(options: argparse.Namespace, tasks: list[str]) -> None:
    kinds = {task.split("/")[0] for task in tasks}
    for name, users in USED_BY.items():
        flag = "--" + name.replace("_", "-")
        if getattr(options, name) is not None and not kinds.intersection(users):
            raise UserError(f"{flag} is for {', '.join(users)}, and none of these is asked for; drop {flag}")
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("multiple", "tokens", "samples", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(options, name)}")
    for name in ("piece", "threads", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be 0 or more, not {getattr(options, name)}")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {options.limit}")
    if any(not 0 <= depth <= 100 for depth in options.depths or ()):
        raise UserError(f"--depths are percentages from 0 to 100, not {options.depths}")
    if options.data is not None and options.text is not None and not kinds.intersection(GENERATED):
        raise UserError("--data and --text are both given to measure; drop one of the two")
    for name in ("json", "png", "samples_file"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{name.replace('_', '-')} {path}: there is no folder {path.parent}")
    if options.json.suffix == ".png" or (options.png is not None and options.png.suffix != ".png"):
        raise UserError(f"--json {options.json} and --png {options.png}: only and always the latter ends with .png")


def run(
    loaded: Loaded, tasks: list[str], options: argparse.Namespace, device: str, record: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The results of each task by name."""
    train_length = loaded.config.data.seq_len
    options.lengths = options.lengths or [train_length, 2 * train_length, 4 * train_length]
    options.depths = options.depths or [100 * depth for depth in needle.DEPTHS]
    words = Words(loaded.tokenizer)
    prose: Haystack | None = None
    if any(
        task in babilong.TASKS or (task in needle.TASKS and needle.TASKS[task].haystack == "prose") for task in tasks
    ):
        options.text = options.text or []
        text, options.text_files = read_prose(options.text)
        prose = Haystack(words, split_sentences(text), "the text")
    scoring = Scoring(options.piece, options.batch, device)
    depths = [depth / 100 for depth in options.depths]
    needles = {
        task: needle.Needles(needle.TASKS[task], words, prose, options.seed) for task in tasks if task in needle.TASKS
    }
    stories = {
        task: babilong.Scattered(task, words, prose, options.seed) for task in tasks if task in babilong.TASKS and prose
    }
    for index in range(options.samples):  # what does not fit is said before anything is measured
        for asked in needles.values():
            asked.sample(min(options.lengths), depths[0], index)
        for told in stories.values():
            told.sample(min(options.lengths), index)
    results: dict[str, Any] = {}
    harness = [task.removeprefix("lm_eval/") for task in tasks if task.startswith("lm_eval/")]
    for task in tasks:
        started = time.perf_counter()
        if task == "perplexity":
            length = options.multiple * train_length
            rows, options.measured = held_out_rows(loaded, length, max(1, options.tokens // length), options)
            results[task] = perplexity_by_position(
                loaded.model,
                rows,
                train_length=train_length,
                multiple=options.multiple,
                piece=options.piece,
                batch=options.batch,
                device=device,
                state_bytes=state_bytes,
            )
        elif task in needle.TASKS:
            results[task] = needle.run_needles(
                loaded.model, needles[task], options.lengths, depths, options.samples, scoring, record
            )
        elif task in babilong.TASKS:
            results[task] = babilong.run_scattered(
                loaded.model, stories[task], options.lengths, options.samples, scoring, record
            )
        elif task.removeprefix("lm_eval/") == harness[0]:  # all of them together: the harness loads the model once
            results |= run_lm_eval(loaded.export, harness, options.include_path, options.limit, options.batch, device)
        else:
            continue
        print(f"{task}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return results


def describe(loaded: Loaded, tasks: list[str], options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What was measured, by what, on what."""
    generated = [task for task in tasks if task in GENERATED]
    asked: dict[str, Any] = {"batch": options.batch, "piece": options.piece}
    if generated:
        asked |= {"lengths": options.lengths, "samples": options.samples}
    if any(task in needle.TASKS for task in tasks):
        asked["depths"] = options.depths
    if hasattr(options, "text_files"):
        asked["text_sha256"] = sha256_of_files(options.text_files)
    if "perplexity" in tasks:
        asked |= {"multiple": options.multiple, "tokens": options.tokens, "measured": options.measured}
    if options.limit is not None:
        asked["limit"] = options.limit
    packages = ["torch", "numpy", "sentencepiece"]
    if any(task.startswith("lm_eval/") for task in tasks):
        packages += ["lm_eval", "transformers"]
    model = loaded.config.model
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "name": options.model.name,
            "variant": model.variant,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "train_length": loaded.config.data.seq_len,
            "training": loaded.training,
            "fingerprint": fingerprint(loaded.model),
            "tokenizer_sha256": sha256_of_files([loaded.tokenizer.path]),
        },
        "seed": options.seed,
        "options": asked,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch."),
        "versions": {
            "titans_pretrain": titans_pretrain.__version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "config": config_to_dict(loaded.config),
    }


def write(path: Path, text: str, flag: str) -> None:
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
