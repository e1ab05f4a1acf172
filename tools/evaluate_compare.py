"""How do evaluations compare? Reads what tools/evaluate.py wrote: a line for each score, a column for each file.

python tools/evaluate.py compare A.json B.json ... [--markdown]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="written by tools/evaluate.py")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(arguments)
    reports = [read_report(file) for file in options.files]
    print(table([file.stem for file in options.files], reports, options.markdown))
    for note in differences(options.files, reports):
        print(note)


def read_report(path: Path) -> dict[str, Any]:
    """Raises UserError: it is not what tools/evaluate.py writes."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(report, dict) or report.get("format") != "titans_pretrain evaluation":
        raise UserError(f"{path} is not an evaluation; tools/evaluate.py RUN_OR_EXPORT TASK --json {path} makes one")
    if report.get("format_version") != 1:
        raise UserError(
            f"{path} has format version {report.get('format_version')}, this program reads 1; evaluate again"
        )
    return report


def scores(report: Mapping[str, Any]) -> dict[str, str]:
    """What a report says, by line of the table. A cell's scores are means over depths."""
    found: dict[str, str] = {}
    for task, result in report["tasks"].items():
        if task == "perplexity":
            for bucket in result["buckets"]:
                found[f"perplexity at {bucket['from']:g}-{bucket['to']:g} training lengths"] = number(
                    bucket["perplexity"]
                )
            for size in result["state_bytes"][1:2] + result["state_bytes"][-1:]:
                found[f"state after {size['at']:g} training lengths, bytes"] = f"{size['bytes']:,}"
        elif "cells" in result:
            for length in dict.fromkeys(cell["length"] for cell in result["cells"]):
                cells = [cell for cell in result["cells"] if cell["length"] == length]
                for key, unit in (("score", "%"), ("choice", "%"), ("token_accuracy", "%"), ("nll", "nats per token")):
                    values = [cell[key] for cell in cells if key in cell]
                    if values:
                        mean = None if None in values else sum(values) / len(values)
                        found[f"{task} at {length:,}: {key.replace('_', ' ')}, {unit}"] = number(mean)
        else:
            for name, value in result["scores"].items():
                found[f"{task}: {name}"] = number(value)
    return found


def number(value: float | None) -> str:
    """At four digits or so; what is not finite is None in the file."""
    if value is None:
        return "not finite"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(names: Sequence[str], reports: Sequence[Mapping[str, Any]], markdown: bool) -> str:
    """A line for each score that any report has; "-" where one has it not."""
    columns = [scores(report) for report in reports]
    about = [
        ("variant", [r["model"]["variant"] for r in reports]),
        ("parameters", [f"{r['model']['parameters'] / 1e6:.2f} M" for r in reports]),
        ("training tokens", [f"{r['model']['training'].get('tokens', 0):,}" for r in reports]),
        ("training length", [f"{r['model']['train_length']:,}" for r in reports]),
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [["", *names], *([name, *cells] for name, cells in about)]
    rows += [[key, *(column.get(key, "-") for column in columns)] for key in keys]
    if markdown:
        header, *body = ("| " + " | ".join(row) + " |" for row in rows)
        return "\n".join([header, "|" + "---|" + "---:|" * len(names), *body])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def differences(files: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why scores may not be comparable: a sentence each."""
    notes = []
    first = reports[0]
    for file, report in zip(files[1:], reports[1:], strict=True):
        for what, ours, theirs in (
            ("seed", first["seed"], report["seed"]),
            ("tokenizer", first["model"]["tokenizer_sha256"][:12], report["model"]["tokenizer_sha256"][:12]),
            *(
                (key, first["options"][key], report["options"].get(key, first["options"][key]))
                for key in first["options"]
            ),
        ):
            if ours != theirs and what not in ("batch", "piece"):
                notes.append(f"note: {files[0].name} and {file.name} differ in {what}: {ours} and {theirs}")
    return notes
