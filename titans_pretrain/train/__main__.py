"""`python -m titans_pretrain.train CONFIG.yaml section.key=value ...`, alone, under torchrun, or one per srun task."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from titans_pretrain.config import load_config, reference_text
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.layout import choose_layout
from titans_pretrain.train.garbage import no_collections
from titans_pretrain.train.heartbeat import LostRank
from titans_pretrain.train.lifecycle import Interruption, die_with_parent, finished


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
    with no_collections():
        from titans_pretrain.train.environment import find_environment, join, leave

    interruption = Interruption().listen()
    environment = find_environment()
    if environment.found != "one process":
        die_with_parent()
    shared = True  # whether every rank meets the error, so that one can say it for all
    try:
        config = load_config(path, overrides)
        choose_layout(config, environment.world_size)
        nothing_left = finished(config.run_dir, config.schedule.tokens)
        if nothing_left and config.run.resume == "auto":
            if environment.rank == 0:
                print(nothing_left)
            return
        shared = False
        grid = join(environment, config.run.device)
        # After the device is chosen: DeepSpeed settles on its accelerator when it is imported.
        with no_collections():
            from titans_pretrain.parallel.grid import AgreedError
            from titans_pretrain.train.loop import train

        try:
            train(config, grid, interruption)
        except AgreedError:
            shared = True
            raise
        except LostRank as error:
            shared = not error.speaks
            raise
        leave()
    except UserError as error:
        if not shared or (environment.rank == 0 and not isinstance(error, LostRank)):
            raise
        # Rank 0 says it; leave it the time, since a launcher ends all ranks at the first exit.
        time.sleep(1.0)
        sys.exit(1)


if __name__ == "__main__":
    main()
