"""How do text and token ids turn into each other, whole and as a stream that never prints half a character?"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from titans_pretrain.errors import UserError


class Tokenizer:
    """A SentencePiece model file.

    Raises:
        UserError: the file is missing or is not a SentencePiece model, or it has no beginning-of-sequence id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            serialised = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {self.path}: {error.strerror}") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            # an empty file would load as a model without pieces
            loaded = bool(serialised) and self._model.LoadFromSerializedProto(serialised)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"{self.path} is not a SentencePiece model, or it is damaged")
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0:
            raise UserError(
                f"the tokenizer {self.path} has no beginning-of-sequence id; train it with a bos id of 0 or more"
            )
        self._anchor = next(i for i in range(self.vocab_size) if self._model.decode([i]) and not self._model.is_byte(i))
        self._anchor_length = len(self._model.decode([self._anchor]))

    def encode(self, text: str) -> list[int]:
        """The ids of `text` with the beginning-of-sequence id in front; "" gives that id alone.

        Raises:
            UserError: `text` holds a lone surrogate (what Python makes of command-line bytes that are not UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode: character {error.start} is half of a surrogate pair"
            ) from error
        return [self.bos_id, *self._model.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control ids have none; bytes that are not UTF-8 become U+FFFD, one each."""
        return self._model.decode(list(ids))

    def piece(self, token: int) -> str:
        """The name of an id in the vocabulary, such as "▁the", "<0xE2>" or "<s>"."""
        return self._model.id_to_piece(token)

    def stream(self, context: Sequence[int] = ()) -> StreamingDecoder:
        """A decoder of what follows `context`: the text of context is not repeated."""
        decoder = StreamingDecoder(self)
        for token in context:
            decoder.push(token)
        return decoder


class StreamingDecoder:
    """Text of a growing sequence of ids, each part as soon as it is final: joined, the parts are `decode` of all ids.

    Two things make a piece's text depend on its neighbours, and both are left to SentencePiece by decoding a short window:
    the space that encoding puts before a text is dropped at the start only, and a character outside the vocabulary is a run
    of byte pieces, of which SentencePiece makes U+FFFD while it is incomplete. Of such a run the trailing bytes that may still
    become a character are held back, at most three. Cost per id: one decode of at most five ids once there is any text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._printed = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that becomes final with `token`; "" while a character is incomplete."""
        model = self._tokenizer._model
        if model.is_byte(token):
            self._utf8.decode(bytes([int(model.id_to_piece(token)[1:-1], 16)]))  # the piece reads <0xE2>
        else:
            self._utf8.reset()
        held = len(self._utf8.getstate()[0])
        self._window.append(token)
        text = model.decode(self._window)
        final = text[self._printed : len(text) - held]
        self._printed += len(final)
        if text:
            # Of what is final, only that there was text matters from here on: any piece with text stands for it.
            self._window = [self._tokenizer._anchor, *self._window[len(self._window) - held :]]
            self._printed = self._tokenizer._anchor_length
        return final

    def finish(self) -> str:
        """The bytes still held back, as U+FFFD each: no more ids will complete them."""
        text = self._tokenizer._model.decode(self._window)[self._printed :]
        self._printed += len(text)
        return text
