"""`python -m titans_pretrain.train CONFIG.yaml section.key=value ...`, alone, under torchrun, or one per srun task."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from titans_pretrain.config import load_config, reference_text
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.layout import choose_layout


def parse(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Command line -> config file (None: defaults) and overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_pretrain.train",
        description="Train a model; continues by itself where the run folder holds a checkpoint.",
        epilog="Settings:\n" + reference_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file; may be left out when overrides give all that is needed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one setting; repeatable")
    given = parser.parse_args(arguments)
    if given.config is not None and "=" in given.config and not given.config.endswith((".yaml", ".yml")):
        return None, [given.config, *given.overrides]
    return given.config, given.overrides


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    path, overrides = parse(arguments)
    # Imported late: --help must not wait for torch, nor a misspelt key for DeepSpeed.
    from titans_pretrain.train.environment import find_environment, join, leave

    environment = find_environment()
    shared = True  # whether every rank meets the error, so that one can say it for all
    try:
        config = load_config(path, overrides)
        choose_layout(config, environment.world_size)
        shared = False
        grid = join(environment, config.run.device)
        # After the device is chosen: DeepSpeed settles on its accelerator when it is imported.
        from titans_pretrain.parallel.grid import AgreedError
        from titans_pretrain.train.loop import train

        try:
            train(config, grid)
        except AgreedError:
            shared = True
            raise
        leave()
    except UserError:
        if environment.rank == 0 or not shared:
            raise
        # Rank 0 says it; leave it the time, since a launcher ends all ranks at the first exit.
        time.sleep(1.0)
        sys.exit(1)


if __name__ == "__main__":
    main()
