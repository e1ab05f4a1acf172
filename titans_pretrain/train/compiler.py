"""Can torch.compile make code on this machine? Asked at start-up: without it the first step would fail in a long traceback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from titans_pretrain.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Refuse `model.compile` where a part of the compiler is missing.

    Raises:
        UserError: what is missing, and the way out.
    """
    missing = _missing(device.type)
    if missing is not None:
        raise UserError(
            f"model.compile=true needs {missing}, which is not there; install it or set model.compile=false"
        )


def _missing(device_type: str) -> str | None:
    """Torch makes C++ for the CPU and Triton kernels for CUDA; Triton compiles a launcher in C for each kernel."""
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        if not _found("CC", "gcc", "clang"):
            return "a C compiler (gcc, clang or what CC names)"
    elif not _found("CXX", "g++"):
        return "a C++ compiler (g++ or what CXX names)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C header Python.h (often the package python3-dev)"
    return None


def _found(variable: str, *defaults: str) -> bool:
    named = os.environ.get(variable)
    return any(shutil.which(name) for name in ((named.split()[0],) if named and named.split() else defaults))
