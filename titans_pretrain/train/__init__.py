"""The training run: loop, engine, schedule, checkpoints, evaluation, reporting."""
