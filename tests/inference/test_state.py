"""Does a saved state go on exactly as if the process had not ended, and is a file that does not fit refused in a sentence?"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import run_distributed
from tests.inference.tiny import random_ids, tiny_export
from tests.model.tiny import tiny_model
from titans_pretrain.config import VARIANTS
from titans_pretrain.errors import UserError
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Decoding, Generation, Reading, Row, read
from titans_pretrain.inference.state import fingerprint, load_reading, save_reading, tokens_read
from titans_pretrain.model import Titans
from titans_pretrain.model.titans import state_bytes


def ids(length: int) -> list[int]:
    """For models of tests/model/tiny.py."""
    return [token % 61 for token in random_ids(length)]


def same(a: object, b: object) -> bool:
    """Bit for bit, and of the same types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def continuation(model: Titans, start: Reading) -> list[int]:
    return list(Generation(model, [5, 9], max_new_tokens=20, seed=3, start=start))


def in_another_process(folder: Path) -> list[list[int]]:
    found = []
    for variant in VARIANTS:
        model = load_export(folder / variant).model
        found.append(continuation(model, load_reading(folder / f"{variant}.state", model)))
    return found


def test_goes_on_identically_in_another_process(tmp_path: Path, tokenizer_file: Path) -> None:
    expected = []
    for variant in VARIANTS:
        tiny_export(tmp_path / variant, tokenizer_file, variant)
        model = load_export(tmp_path / variant).model
        reading = read(model, [random_ids(47)])  # inside a chunk and a segment
        save_reading(tmp_path / f"{variant}.state", reading, model)
        assert tokens_read(tmp_path / f"{variant}.state") == [47]
        expected.append(continuation(model, reading))
    assert run_distributed(in_another_process, 1, tmp_path)[0] == expected


@pytest.mark.parametrize(("variant", "changes"), [("mac", {}), ("rmt", {}), ("lmm", dict(arrangement="h3"))])
def test_rows_at_different_places_and_every_bit(variant: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(variant, **changes).requires_grad_(False)
    reading = read(model, [ids(3), [7] * 30])
    save_reading(tmp_path / "two", reading, model)
    again = load_reading(tmp_path / "two", model)
    assert again.recent == reading.recent
    assert same(again, reading)
    assert state_bytes(again) <= state_bytes(reading)
    assert tokens_read(tmp_path / "two") == [3, 30]
    assert not (tmp_path / "two.tmp").exists()


def test_reading_in_parts_is_reading_at_once() -> None:
    """A conversation: what was written and what came after it, as if it had all been one prompt."""
    model = tiny_model("mal").requires_grad_(False)
    first = Generation(model, ids(9), max_new_tokens=6, seed=2, num_tokens=50)
    written = list(first)
    parts = read(model, [[4, 8]], first.reading())
    whole = read(model, [[*ids(9), *written, 4, 8]])
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert parts.recent == whole.recent
    assert parts.state.position == whole.state.position == 17


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Titans, Path]:
    model = tiny_model("mag").requires_grad_(False)
    path = tmp_path_factory.mktemp("state") / "a.state"
    save_reading(path, read(model, [ids(20)]), model)
    return model, path


def test_any_flipped_byte_and_any_cut_is_refused_or_harmless(saved: tuple[Titans, Path], tmp_path: Path) -> None:
    model, path = saved
    content = path.read_bytes()
    expected = load_reading(path, model)
    draw = random.Random(0)
    places = [*draw.sample(range(len(content)), 60), *draw.sample(range(4000), 60), *range(0, 8)]
    refused = 0
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << draw.randrange(8)
        (tmp_path / "broken").write_bytes(broken)
        try:
            found = load_reading(tmp_path / "broken", model)
        except UserError:
            refused += 1
        else:
            assert same(found, expected), place
    assert refused > 120
    for length in [0, 5, 100, len(content) // 2, len(content) - 1]:
        (tmp_path / "broken").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"damaged|not a state"):
            load_reading(tmp_path / "broken", model)


def test_files_that_do_not_fit_are_refused(saved: tuple[Titans, Path], tmp_path: Path) -> None:
    model, path = saved
    other = tiny_model("mag", seed=1)
    with pytest.raises(UserError, match=r"state of another model \(mag.*read the text again"):
        load_reading(path, other)
    with pytest.raises(UserError, match="another model"):
        load_reading(path, tiny_model("mac"))
    with pytest.raises(UserError, match="there is no state at"):
        load_reading(tmp_path / "none", model)
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="not a state written by"):
        load_reading(tmp_path / "weights", model)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "old", metadata={"format": "titans_pretrain state", "format_version": "0"})
    with pytest.raises(UserError, match="format version 0"):
        load_reading(tmp_path / "old", model)
    with pytest.raises(UserError, match="cannot write the state"):
        save_reading(tmp_path / "no folder" / "a", read(model, [[1]]), model)


def test_fingerprint_sees_weights_dtype_and_config() -> None:
    model = tiny_model("lmm").requires_grad_(False)
    seen = {fingerprint(model)}
    assert re.fullmatch("[0-9a-f]{32}", *seen)
    model.blocks[1].feed_forward.down.weight[3, 3] += 1e-3  # type: ignore[index, union-attr, operator]
    seen.add(fingerprint(model))
    seen.add(fingerprint(model.bfloat16()))
    seen.add(fingerprint(tiny_model("lmm", rope_theta=5e5)))
    assert len(seen) == 4


def test_rows_come_and_go_and_draw_what_they_would_alone() -> None:
    model = tiny_model("mac").requires_grad_(False)
    prompts = [random_ids(n, seed=n) for n in (3, 40, 8)]
    prompts = [[t % 61 for t in p] for p in prompts]
    alone = [list(Generation(model, p, max_new_tokens=25, seed=i)) for i, p in enumerate(prompts)]
    decoding = Decoding(model)
    rows = [Row(25, seed=i) for i in range(3)]
    found: dict[int, list[int]] = {id(row): [] for row in rows}
    for step in range(60):
        if step in (0, 4, 9):
            decoding.add([rows[(0, 4, 9).index(step)]], read(model, [prompts[(0, 4, 9).index(step)]]))
        for row, token in decoding.step():
            assert token is not None
            found[id(row)].append(token)
        if step == 6:  # a row's reading, in the middle of things
            reading = decoding.reading_of(rows[1])
            whole = read(model, [[*prompts[1], *found[id(rows[1])]]])
            torch.testing.assert_close(reading.logits, whole.logits, rtol=1e-4, atol=1e-4)
        decoding.take_out([row for row in decoding.rows if row.ended])
        if not decoding.rows:
            break
    assert list(found.values()) == alone
