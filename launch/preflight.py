"""Are the machines fit to train together? Run under torchrun or srun, as the training itself, before it.

    torchrun ... launch/preflight.py CONFIG.yaml [section.key=value ...] [--skip clock,matmul] [--min-bandwidth GB/S]

Prints a table, writes RUN/preflight.json, and exits with 1 and a sentence for each check that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.config import load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.layout import choose_layout
from titans_pretrain.train.environment import find_environment, join
from titans_pretrain.train.preflight import preflight, report, table


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="preflight.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--skip", default="", help="checks to leave out, by their names in the table, with commas")
    parser.add_argument("--min-bandwidth", type=float, default=0.0, help="GB/s an all-reduce must reach (default: any)")
    parser.add_argument("--megabytes", type=float, default=16.0, help="size of the all-reduce (default 16)")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    environment = find_environment()
    layout = choose_layout(config, environment.world_size)
    grid = join(environment, config.run.device).lay_out(layout)
    skip = [name.strip() for name in args.skip.split(",") if name.strip()]
    try:
        findings = preflight(config, grid, skip=skip, min_bandwidth=args.min_bandwidth, megabytes=args.megabytes)
    except ValueError as error:
        raise UserError(f"--skip: {error}") from None
    found = report(findings)
    if grid.is_first:
        print(f"preflight of {grid.world_size} ranks\n{table(findings)}")
        if config.run_dir.is_dir():
            (config.run_dir / "preflight.json").write_text(json.dumps(found, indent=1))
        for finding in findings:
            if not finding.ok:
                print(f"error: {finding.check}: {finding.text}", file=sys.stderr)
    grid.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if found["ok"] else 1)  # as environment.leave


if __name__ == "__main__":
    main()
