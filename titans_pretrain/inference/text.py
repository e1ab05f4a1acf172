"""How do drawn tokens become the text a reader sees: whole characters, nothing of a stop string or behind it?"""

from __future__ import annotations

from collections.abc import Sequence

from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.inference.generate import Reading


class TextWriter:
    """Text of a growing sequence of ids, each part as soon as it is sure to be shown.

    A character whose bytes come in several tokens is held back until it is whole, and the end of the text as long as it may
    be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        context: ids before the first one pushed; their text is not repeated.
        stop: texts at whose first appearance writing ends; they are not shown.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("a stop string must not be empty")
        self._decoder = tokenizer.stream(context)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing is shown after it."""

    def push(self, token: int) -> str:
        """The text that is sure with `token`."""
        return self._show(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back: no more tokens come. Bytes that never became a character are U+FFFD."""
        text = self._show(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _show(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def prompt_ids(tokenizer: Tokenizer, text: str, start: Reading | None = None) -> list[int]:
    """The ids of a prompt: from the beginning of a text, or behind what was read (`start`), where no beginning-of-sequence
    id comes and the space is dropped that encoding puts before a text. (A letter there begins a new word all the same: its
    piece includes the space.)

    Raises:
        UserError: the text is not valid Unicode.
    """
    if start is None:
        return tokenizer.encode(text)
    if not text:
        return []
    ids = tokenizer.encode(text[1:] if text.startswith(" ") else text)[1:]
    alone = len(ids) > 1 and tokenizer.stream(start.recent[0]).push(ids[0]) == " "
    return ids[1:] if alone and not text.startswith(" ") else ids


def writer_after(tokenizer: Tokenizer, reading: Reading, stop: Sequence[str] = ()) -> TextWriter:
    """A writer of what follows a reading of one row."""
    return TextWriter(tokenizer, reading.recent[0], stop)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
