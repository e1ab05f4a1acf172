"""Do imports point one way? The rule of ARCHITECTURE.md, walked over the syntax tree of every file.

Imports inside functions and under TYPE_CHECKING count too: a dependency is a dependency whenever it is loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file may import from its own layer's package and from any lower layer; packages on one level do not know each other.
LEVELS = [
    ["titans_pretrain.errors"],
    ["titans_pretrain.config"],
    ["titans_pretrain.layout"],
    ["titans_pretrain.memory"],
    ["titans_pretrain.model", "titans_pretrain.parallel", "titans_pretrain.data"],
    ["titans_pretrain.evaluation"],  # of a model and a tokenizer, wherever they come from: training measures by it too
    ["titans_pretrain.train", "titans_pretrain.inference", "titans_pretrain.scaling"],
    ["launch", "tools", "tokenizer"],
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}

# Sibling packages that may meet on one level: (who, whom). Everything else on one level is apart.
SIBLINGS = {
    ("titans_pretrain.parallel", "titans_pretrain.model"),  # parallel/ splits a built model
    ("tools", "launch"),  # a study launches its runs
}

# Who may load which heavy dependency.
OWNERS = {
    "deepspeed": ["titans_pretrain.train.engine"],
    "fla": ["titans_pretrain.model.delta_rule", "tools.benchmark_operators"],
    "webdataset": ["titans_pretrain.data", "tools.benchmark_data"],
    "boto3": ["titans_pretrain.data"],
    "botocore": ["titans_pretrain.data"],
    # data.tokenizer: a dataset has its tokenizer beside it, and training, inference and evaluation all ask it for text
    "sentencepiece": ["tokenizer", "titans_pretrain.data.tokenizer", "titans_pretrain.inference.huggingface"],
    "fastapi": ["tools.serve_api"],
    "starlette": ["tools.serve_api"],
    "uvicorn": ["tools.serve"],
    "transformers": ["titans_pretrain.inference.huggingface", "titans_pretrain.inference.verify"],
    "scipy": ["titans_pretrain.scaling"],
    "tensorboard": ["titans_pretrain.train.report"],
    "torch.utils.tensorboard": ["titans_pretrain.train.report"],
}


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of all code but the tests."""
    for top in ("titans_pretrain", "launch", "tools", "tokenizer"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `path` imports; `from a import b` gives a and a.b."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + is_package
                base = ".".join([*parts[:kept], *([base] if base else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, (ast.Attribute, ast.Name))
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> str | None:
    """The package of LEVELS that holds `name`."""
    return next((package for package in LEVEL if within(name, package)), None)


def violations(root: Path) -> list[str]:
    found = set()
    for module, path in source_files(root):
        own = layer_of(module)
        if own is None and module != "titans_pretrain":
            found.add(f"{path.relative_to(root)}: {module} has no place in the layers of tests/test_imports.py")
        for line, name in imports(module, path):
            where = f"{path.relative_to(root)}:{line}"
            other = layer_of(name)
            if other and other != own:
                if own is None:
                    found.add(f"{where}: the package root imports {other}")
                elif LEVEL[other] > LEVEL[own]:
                    found.add(f"{where}: {own} imports the higher {other}")
                elif LEVEL[other] == LEVEL[own] and (own, other) not in SIBLINGS:
                    found.add(f"{where}: {own} imports its sibling {other}")
            if within(name, "tests"):
                found.add(f"{where}: code imports tests")
            for dependency, owners in OWNERS.items():
                if within(name, dependency) and not any(within(module, owner) for owner in owners):
                    found.add(f"{where}: {module} imports {dependency}, which only {', '.join(owners)} may")
    return sorted(found)


def test_imports_point_one_way() -> None:
    assert list(source_files(ROOT)), "found no files to walk"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("titans_pretrain/model/a.py", "from titans_pretrain.parallel.grid import Grid", "sibling titans_pretrain.par"),
        ("titans_pretrain/model/a.py", "def f():\n    import titans_pretrain.parallel", "sibling titans_pretrain.par"),
        ("titans_pretrain/model/a.py", "from ..parallel import grid", "sibling titans_pretrain.parallel"),
        ("titans_pretrain/model/a.py", "from titans_pretrain import parallel", "sibling titans_pretrain.parallel"),
        ("titans_pretrain/model/__init__.py", "from ..train import loop", "higher titans_pretrain.train"),
        ("titans_pretrain/memory/a.py", "from titans_pretrain.model import init", "higher titans_pretrain.model"),
        ("titans_pretrain/config.py", "import titans_pretrain.memory", "higher titans_pretrain.memory"),
        ("titans_pretrain/data/a.py", "import titans_pretrain.model.titans", "sibling titans_pretrain.model"),
        ("titans_pretrain/train/a.py", "from titans_pretrain.inference import x", "sibling titans_pretrain.inference"),
        ("titans_pretrain/inference/a.py", "from tools import generate", "higher tools"),
        ("titans_pretrain/train/loop.py", "import deepspeed.ops", "imports deepspeed"),
        (
            "titans_pretrain/train/loop.py",
            "import importlib\nimportlib.import_module('deepspeed')",
            "imports deepspeed",
        ),
        ("titans_pretrain/train/loop.py", "from torch.utils.tensorboard import SummaryWriter", "tensorboard"),
        ("titans_pretrain/train/loop.py", "from torch.utils import tensorboard", "tensorboard"),
        ("tokenizer/build.py", "import webdataset as wds", "imports webdataset"),
        ("titans_pretrain/data/a.py", "import sentencepiece", "imports sentencepiece"),
        ("tools/a.py", "from tests.model import tiny", "imports tests"),
        ("titans_pretrain/utils.py", "x = 1", "has no place"),
        ("titans_pretrain/__init__.py", "from titans_pretrain.config import Config", "package root imports"),
    ],
)
def test_the_walker_sees_a_forbidden_import(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    found = violations(tmp_path)
    assert found, "not seen"
    assert any(complaint in text for text in found), found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("titans_pretrain/train/engine.py", "import deepspeed"),
        ("titans_pretrain/train/report.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("titans_pretrain/data/shards.py", "import webdataset\nfrom titans_pretrain.errors import UserError"),
        ("titans_pretrain/data/tokenizer.py", "import sentencepiece\nfrom titans_pretrain.layout import Layout"),
        ("titans_pretrain/parallel/tensor.py", "from titans_pretrain.model import titans\nfrom . import grid"),
        ("tokenizer/build.py", "import sentencepiece\nfrom titans_pretrain.data import shards"),
        ("tools/a.py", "import sentencepiece_of_another_name\nfrom titans_pretrain.train import checkpoint"),
    ],
)
def test_the_walker_allows_what_the_rule_allows(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []
