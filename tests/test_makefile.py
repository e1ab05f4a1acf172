"""Does `make` refuse what it should before it installs anything?"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from titans_pretrain.config import VARIANTS

ROOT = Path(__file__).parent.parent
# A test inside `make test` must not take part in the outer make's jobs.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("variant", ["zzz", "", "mag mac", "*"])
def test_demo_refuses_an_unknown_variant_in_one_sentence(variant: str) -> None:
    result = run("make", "demo", f"VARIANT={variant}")
    assert result.returncode != 0
    first, *rest = result.stderr.splitlines()
    known = "mag, mac, mal, lmm, transformer, sliding_window, gated_deltanet, gated_deltanet_swa, linear_attention"
    known += ", rmt"
    assert first == f"error: VARIANT must be one of {known}, not '{variant}'"
    assert all(line.startswith("make") for line in rest)
    assert result.stdout == ""


@pytest.mark.parametrize("layout", ["tensor", "tensor=0", "pipeline=2", "tensor=2;ls", "sequence=2,tensor=2"])
def test_demo_refuses_a_layout_it_cannot_read(layout: str) -> None:
    result = run("bash", "launch/demo.sh", "--check", "mag", layout)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: LAYOUT must be words like data=2, sequence=2, tensor=2 and memory=hand_off, not '{layout}'"
    ]
    assert run("bash", "launch/demo.sh", "--check", "mag", "sequence=2 tensor=2 memory=hand_off").returncode == 0


def test_demo_knows_every_variant() -> None:
    for variant in VARIANTS:
        assert run("bash", "launch/demo.sh", "--check", variant).returncode == 0


@pytest.mark.parametrize("target", ["demo", "test", "lint", "format", "clean", "docs"])
def test_every_target_is_there(target: str) -> None:
    result = run("make", "--dry-run", target)
    assert result.returncode == 0, result.stderr


def copy_of_the_house(folder: Path) -> Path:
    """What the install rule needs, without a .venv."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "launch", folder / "launch")
    return folder


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_an_old_python_gets_one_sentence(tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    old = script(tmp_path / "python3.8", 'case "$1" in --version) echo Python 3.8.18 ;; *) exit 1 ;; esac\n')
    result = run("make", "install", f"PYTHON={old}", cwd=house)
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == (
        f"error: Python 3.10 or newer is needed, but '{old}' is Python 3.8.18; name another with make PYTHON=python3.11"
    )
    assert not (house / ".venv").exists()


def test_a_missing_python_gets_one_sentence(tmp_path: Path) -> None:
    result = run("make", "install", "PYTHON=no-such-python", cwd=copy_of_the_house(tmp_path))
    assert result.returncode != 0
    assert result.stderr.startswith("error: Python 3.10 or newer is needed, but 'no-such-python' is not there;")


FAKE_PYTHON = """case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip install"*) echo installing "$@" >> calls; [ -e works ] ;;
esac
"""


def test_a_failed_install_leaves_no_stamp_and_is_tried_again(tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    fake = script(tmp_path / "fake-python", FAKE_PYTHON)
    stamp = house / ".venv" / ".installed"
    assert run("make", "install", f"PYTHON={fake}", cwd=house).returncode != 0
    assert not stamp.exists()
    (house / "works").touch()
    assert run("make", "install", f"PYTHON={fake}", cwd=house).returncode == 0
    assert stamp.exists()
    # and a later failed update takes the stamp of the earlier install away
    (house / "works").unlink()
    os.utime(house / "setup.cfg", (2**31, 2**31))
    assert run("make", "install", f"PYTHON={fake}", cwd=house).returncode != 0
    assert not stamp.exists()
    calls = (house / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert all("-c constraints.txt -e .[dev]" in call for call in calls)


def test_a_finished_install_is_not_repeated(tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    (house / ".venv").mkdir()
    (house / ".venv" / ".installed").touch()
    assert "Nothing to be done" in run("make", "install", cwd=house).stdout
    os.utime(house / "constraints.txt", (2**31, 2**31))
    assert "launch/make_venv.sh" in run("make", "--dry-run", "install", cwd=house).stdout
