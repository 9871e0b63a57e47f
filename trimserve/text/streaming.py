"""Text out of a stream of token ids: whole characters only, and stop strings that span pieces.

tokenizers' own DecodeStream is not used: it drops the space after a special token, and gives characters of
a byte-fallback run that `decode` of the whole text replaces.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from trimserve.text.cleanup import CleanStream
from trimserve.text.tokenizer import is_byte_token, special_ids, tokenizer_border

_REPLACEMENT = "\ufffd"
# Tokens that are decoded again with new ones, so that these are never the first of their text (many
# decoders drop a leading space). A cut-off character spans at most three byte tokens, far fewer.
_CONTEXT = 12
_LOCAL_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece", "BPEDecoder"})


class StreamDecoder:
    """Decode token ids as they come; the pieces add up to ``decode(all ids, skip_special_tokens=True)``.

    A character whose bytes are not complete is held back, and so is a run of byte-fallback tokens, because
    the library decodes such a run as a whole: one wrong byte at its end replaces every byte of it. Each
    push decodes a bounded number of earlier tokens again, whatever the length of the text. With a decoder
    that can change text given out before (none of a known model does) all text comes with `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, clean: bool = False) -> None:
        """Begin a text.

        Args:
            tokenizer: decodes.
            clean: take out spaces before punctuation (`trimserve.text.cleanup`), and hold back what this may
                still change.
        """
        self._tokenizer = tokenizer
        self._cleaner = CleanStream() if clean else None
        self._special = special_ids(tokenizer)
        types = decoder_types(tokenizer)
        self._local = _is_local(tokenizer)
        self._byte_runs = "ByteFallback" in types
        self._window: list[int] = []
        self._run: list[int] = []  # tokens after the window that are held back
        self._given = 0  # characters of the window's text that were given out

    def push(self, ids: Iterable[int]) -> str:
        """Take more token ids and give the text that no later token can change; may be empty."""
        piece = self._settled(ids)
        return piece if self._cleaner is None else self._cleaner.push(piece)

    def _settled(self, ids: Iterable[int]) -> str:
        visible = [id_ for id_ in map(int, ids) if self._is_visible(id_)]
        held = self._trailing_bytes(visible) if self._local else len(visible)
        self._run += visible
        if held == len(visible):
            return ""
        ready = len(self._run) - held
        self._window += self._run[:ready]
        self._run = self._run[ready:]
        return self._advance()

    def flush(self) -> str:
        """End the stream: give what was held back, and be ready for another text."""
        text = self._decode(self._window + self._run)
        piece = text[self._given :]
        self._window, self._run, self._given = [], [], 0
        return piece if self._cleaner is None else self._cleaner.push(piece) + self._cleaner.flush()

    def _advance(self) -> str:
        text = self._decode(self._window)
        # A cut-off character at the end decodes to one replacement character.
        held = int(text.endswith(_REPLACEMENT))
        piece = text[self._given : len(text) - held]
        self._given = max(self._given, len(text) - held)
        if len(self._window) > 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._given = len(self._decode(self._window)) - held
        return piece

    def _trailing_bytes(self, ids: Sequence[int]) -> int:
        if not self._byte_runs:
            return 0
        tokens = (self._tokenizer.id_to_token(id_) or "" for id_ in reversed(ids))
        return next((n for n, token in enumerate(tokens) if not is_byte_token(token)), len(ids))

    def _is_visible(self, id_: int) -> bool:
        # A padding row has no token: the library's decode leaves it out too.
        return id_ not in self._special and self._tokenizer.id_to_token(id_) is not None

    @tokenizer_border
    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def decoder_types(tokenizer: Tokenizer) -> list[str]:
    """The kinds of the decoders that a tokenizer runs one after the other."""
    return [str(decoder.get("type")) for decoder in _decoders(tokenizer)]


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    # The decoder's state is the JSON of its part of tokenizer.json.
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


@tokenizer_border
def _is_local(tokenizer: Tokenizer) -> bool:
    """Tell whether a token's text depends on nothing after it, cut-off characters and byte runs apart."""
    return all(
        decoder["type"] in _LOCAL_DECODERS
        or (decoder["type"] == "Replace" and len(decoder["pattern"].get("String", "")) == 1)
        or (decoder["type"] == "Strip" and decoder["stop"] == 0)
        for decoder in _decoders(tokenizer)
    )
