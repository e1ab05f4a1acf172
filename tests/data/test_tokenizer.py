"""Does streamed text equal decoded text, and is each part printed as soon as, and only when, it is final?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError

TEXTS = [
    "",
    " ",
    "   leading spaces",
    "trailing  ",
    "the memory learns",
    "12 345 6789",
    "a\n\n b\ttab",
    "😀 emoji 👩‍👩‍👧 family 🇩🇪 flag",
    "naïve café — ‘quotes’ 日本語 \x00 nul",
    "<s> is text here, not a control symbol </s>",
]


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> tuple[list[str], str]:
    decoder = tokenizer.stream(context or [])
    return [decoder.push(i) for i in ids], decoder.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_streaming(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in ids[1:]
    assert tokenizer.decode(ids) == text
    parts, rest = streamed(tokenizer, ids)
    assert "".join(parts) == text
    assert rest == ""


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 60))
def test_any_text_streams_whole_and_after_any_context(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    parts, rest = streamed(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    # A context ends at a character, as a prompt does; bytes of half a character would belong to both sides.
    context, after = ids[:cut], ids[cut:]
    if not tokenizer.decode(context).endswith("\ufffd"):
        parts, rest = streamed(tokenizer, after, context)
        assert tokenizer.decode(context) + "".join(parts) + rest == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A model may write anything: unknown and control ids, stray continuation bytes, characters cut off by words."""
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer._model.is_byte(i)]
    lead = [
        tokenizer._model.piece_to_id(f"<0x{b:02X}>") for b in (0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0x9F, 0xA0, 0x80, 0xBF)
    ]
    space = tokenizer._model.piece_to_id("▁")
    one = st.one_of(
        st.sampled_from(lead),
        st.sampled_from(byte_ids),
        st.sampled_from([0, 1, 2, space]),
        st.integers(0, tokenizer.vocab_size - 1),
    )
    ids = data.draw(st.lists(one, max_size=24))
    decoder = tokenizer.stream()
    printed = ""
    for count, token in enumerate(ids, start=1):
        printed += decoder.push(token)
        so_far = tokenizer.decode(ids[:count])
        assert so_far.startswith(printed)
        held = so_far[len(printed) :]
        assert held == "\ufffd" * len(held)  # nothing but the bytes of an open character waits
        assert len(held) <= 3
    assert printed + decoder.finish() == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    face = [tokenizer._model.piece_to_id(f"<0x{b:02X}>") for b in "😀".encode()]
    assert [decoder.push(i) for i in face] == ["", "", "", "😀"]
    word = tokenizer.encode("the memory")[-1]
    # three bytes of a character, then a word: what waited is final as U+FFFD when the word comes
    parts = [decoder.push(i) for i in [*face[:3], word]]
    assert parts[:3] == ["", "", ""]
    assert parts[3].startswith("\ufffd\ufffd\ufffd")


def test_the_first_word_loses_its_space_and_no_other(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the memory")[1:]
    parts, _ = streamed(tokenizer, ids)
    assert not parts[0].startswith(" ")
    assert "".join(parts) == "the memory"
    parts, _ = streamed(tokenizer, ids, tokenizer.encode("the state"))
    assert "".join(parts) == " the memory"


def test_a_long_run_costs_the_same_for_every_id(tokenizer: Tokenizer) -> None:
    lead = tokenizer._model.piece_to_id("<0xF0>")
    for ids in ([lead] * 500, tokenizer.encode("the memory " * 200), tokenizer.encode(" " * 500)):
        decoder = tokenizer.stream()
        for token in ids:
            decoder.push(token)
            assert len(decoder._window) <= 5


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 2"):
        tokenizer.encode("ab\ud800")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Tokenizer(tmp_path / "none.model")
    for name, content in (("empty", b""), ("text", b"not a model\n" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer(tmp_path / name)
