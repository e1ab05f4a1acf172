"""Which files does an export need so that its model runs without this package? The package's own, side by side.

transformers copies the files it finds by relative imports of one level, so `titans_pretrain/memory/scan.py` becomes
`titans_memory_scan.py` and imports are rewritten to match. Nothing else of the source changes, but for config.py: of it only
the `model` section is taken, by its syntax tree.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import titans_pretrain

ROOT = Path(titans_pretrain.__file__).parent
PACKAGE = "titans_pretrain"
ENTRIES = ("configuration_titans", "modeling_titans")
"""The files that config.json's auto_map names."""
_HEADER = """# {source} of titans_pretrain {version} (Apache-2.0), written into this folder by convert_checkpoint.py export.
"""


@functools.cache
def modelling_files() -> dict[str, str]:
    """File name -> source text, of everything `modeling_titans.py` needs besides torch, transformers and, on a GPU, triton."""
    waiting = [f"{PACKAGE}.inference.huggingface.{entry}" for entry in ENTRIES]
    files: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        name = _flat(module) + ".py"
        if name not in files:
            text, needed = _flatten(module)
            files[name] = text
            waiting.extend(needed)
    return dict(sorted(files.items()))


def _path(module: str) -> Path | None:
    """The file of a module of this package; None: it is a name in one."""
    path = ROOT.joinpath(*module.split(".")[1:])
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def _flat(module: str) -> str:
    """The name of a module in an export."""
    last = module.rpartition(".")[2]
    return last if last in ENTRIES else "titans_" + "_".join(module.split(".")[1:])


def _flatten(module: str) -> tuple[str, list[str]]:
    """The source of a module with its imports rewritten, and the modules of this package that it imports."""
    path = _path(module)
    assert path is not None, module
    source = path.read_text(encoding="utf-8")
    if module == f"{PACKAGE}.config":
        source = _only("ModelConfig", source, path)
    lines = source.splitlines()
    needed: list[str] = []
    for node in ast.walk(ast.parse(source)):
        indent = " " * getattr(node, "col_offset", 0)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            text = _relative(node, needed)
        elif isinstance(node, ast.Import) and node.names[0].name.split(".")[0] == "triton":
            # In a `try`, or transformers would ask for the package on machines that have no use for it.
            text = ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
        elif isinstance(node, ast.Import) and any(a.name.split(".")[0] == PACKAGE for a in node.names):
            raise AssertionError(f"{path}: write `from {PACKAGE}... import ...`, which an export can follow")
        else:
            continue
        assert node.end_lineno is not None
        # As many lines as before, so that those of the other nodes stay where they are.
        spare = node.end_lineno - node.lineno
        lines[node.lineno - 1 : node.end_lineno] = ["\n".join(indent + line for line in text), *[""] * spare]
    header = _HEADER.format(source=path.relative_to(ROOT.parent), version=titans_pretrain.__version__)
    return header + "\n".join(lines) + "\n", needed


def _relative(node: ast.ImportFrom, needed: list[str]) -> list[str]:
    """An import of this package as lines of an export; the modules meant are added to `needed`."""
    assert node.module is not None
    lines, names = [], []
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if _path(module) is None:
            names.append(ast.unparse(alias))
            continue
        # The module itself: `from . import x` is what transformers does not look for.
        needed.append(module)
        bound = alias.asname or alias.name
        lines += [f"from .{_flat(module)} import __name__ as _{bound}_module", "import sys as _sys"]
        lines += [f"{bound} = _sys.modules[_{bound}_module]"]
    if names:
        needed.append(node.module)
        lines.append(f"from .{_flat(node.module)} import {', '.join(names)}")
    return lines


def _only(wanted: str, source: str, path: Path) -> str:
    """The top-level definitions of a source file that `wanted` needs, and no others."""
    tree = ast.parse(source)
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions.update((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            definitions.update(((alias.asname or alias.name).split(".")[0], node) for alias in node.names)
    kept, waiting = set(), [wanted]
    while waiting:
        found = definitions.get(waiting.pop())
        if found is None or found in kept:
            continue
        kept.add(found)
        if not isinstance(found, (ast.Import, ast.ImportFrom)):
            waiting.extend(name.id for name in ast.walk(found) if isinstance(name, ast.Name))
    assert definitions[wanted] in kept, path
    lines = source.splitlines()
    parts = ["from __future__ import annotations", ""]
    for node in tree.body:
        if node in kept:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts += [*lines[start - 1 : node.end_lineno], "", ""]
    return "\n".join(parts)
