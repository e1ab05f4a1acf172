"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_pretrain.data.atomic import atomic_directory, atomic_file, sha256_of
from titans_pretrain.errors import UserError


def test_file_keeps_its_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_directory(tmp_path / "d") as directory:
            (directory / content).touch()
            assert not (tmp_path / "d" / content).exists()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["d", "d/two"]


def test_directory_stays_when_writing_fails_and_leftovers_of_a_kill_go(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "d") as directory:
        (directory / "old").touch()

    def fail() -> None:
        with atomic_directory(tmp_path / "d") as directory:
            (directory / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["d", "d/old"]

    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "left over").touch()
    with atomic_directory(tmp_path / "d") as directory:
        (directory / "new").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["d", "d/new"]


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    with (
        atomic_directory(tmp_path / "d"),
        pytest.raises(UserError, match="another process is writing"),
        atomic_directory(tmp_path / "d"),
    ):
        pass
    assert (tmp_path / "d").is_dir()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
