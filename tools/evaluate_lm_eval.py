"""What does the lm-eval harness measure of an exported model? Through transformers, as anyone would load the folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError


def run_lm_eval(
    export: Path | None, tasks: Sequence[str], include_path: Path | None, limit: int | None, batch: int, device: str
) -> dict[str, Any]:
    """Run the harness's tasks, its own or those of the YAML files in `include_path`.

    Args:
        export: an exported folder.
        limit: documents of each task; None: all.

    Returns:
        {"lm_eval/NAME": {"scores": {"METRIC,FILTER": number}, "documents": count}}.

    Raises:
        UserError: the model is not exported, lm-eval is not installed, or a task is unknown.
    """
    if export is None:
        raise UserError("lm_eval tasks need an exported model: python tools/convert_checkpoint.py export RUN OUT first")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is not a folder")
    with tempfile.TemporaryDirectory() as cache:  # transformers copies the modelling code before it loads it
        os.environ.setdefault("HF_MODULES_CACHE", cache)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"lm_eval tasks need lm-eval: pip install 'titans_pretrain[hf]' ({error})") from None
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise UserError(f"lm-eval knows no task {unknown[0]!r}; --include-path names a folder of task files")
        # a document begins with the beginning-of-sequence id in training
        model = HFLM(
            pretrained=str(export), trust_remote_code=True, device=device, batch_size=batch, add_bos_token=True
        )
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    results: dict[str, Any] = {}
    for task in tasks:
        values = found["results"][task]
        numbers = {key: value for key, value in values.items() if isinstance(value, float) and "_stderr" not in key}
        documents = found["n-samples"].get(task, {}).get("effective", 0)
        results[f"lm_eval/{task}"] = {"scores": numbers, "documents": documents}
    return results
