"""Does a reader of the stream see whole characters, and nothing of a stop string?"""

from __future__ import annotations

import random

import pytest

from tests.inference.tiny import prose
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.inference.text import TextWriter


def parts(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], TextWriter]:
    bos, *ids = tokenizer.encode(text)
    writer = TextWriter(tokenizer, [bos], stop)
    shown = []
    for token in ids:
        shown.append(writer.push(token))
        if writer.stopped:
            break
    return [*shown, writer.finish()], writer


def test_what_is_shown_is_the_text_up_to_the_first_stop_string(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for text in (*prose(40), "a 😀😀é\n\nb", "aaab aab"):
        for _ in range(8):
            start, other = draw.randrange(len(text)), draw.randrange(len(text))
            stop = [text[start : start + draw.randint(1, 6)], text[other : other + 3] + "\x00", "\x00"]
            expected = text[: text.find(stop[0])]
            shown, writer = parts(tokenizer, text, stop)
            assert "".join(shown) == expected
            assert writer.stopped
            assert writer.push(5) == writer.finish() == ""


def test_nothing_is_shown_that_must_be_taken_back(tokenizer: Tokenizer) -> None:
    """The beginning of a stop string waits; when it goes on otherwise it is shown."""
    text = "bright quick slow window"
    for end in range(1, len("quick slow")):
        shown, writer = parts(tokenizer, text[: text.index("quick") + end], ["quick slow"])
        assert "".join(shown[:-1]).rstrip() == "bright"
        assert "".join(shown) == text[: text.index("quick") + end]
        assert not writer.stopped


def test_half_a_character_is_never_shown(tokenizer: Tokenizer) -> None:
    shown, _ = parts(tokenizer, "x 😀 é y", [])
    assert "".join(shown) == "x 😀 é y"
    assert "\ufffd" not in "".join(shown)
    bos, *ids = tokenizer.encode("😀")
    writer = TextWriter(tokenizer, [bos])
    assert "".join(map(writer.push, ids[:-2])).strip() == ""
    assert "\ufffd" in writer.finish()


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="must not be empty"):
        TextWriter(tokenizer, stop=[""])
