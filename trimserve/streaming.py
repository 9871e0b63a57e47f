"""Text out of a stream of token ids: whole characters only, and stop strings that span pieces.

tokenizers' own DecodeStream is not used: it drops the space after a special token, and gives characters of
a byte-fallback run that `decode` of the whole text replaces.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from trimserve.errors import UsageError

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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        types = decoder_types(tokenizer)
        self._local = _is_local(tokenizer)
        self._byte_runs = "ByteFallback" in types
        self._window: list[int] = []
        self._run: list[int] = []  # tokens after the window that are held back
        self._given = 0  # characters of the window's text that were given out

    def push(self, ids: Iterable[int]) -> str:
        """Take more token ids and give the text that no later token can change; may be empty."""
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
        return piece

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
        tokens = (self._tokenizer.id_to_token(id_) for id_ in reversed(ids))
        return next((n for n, token in enumerate(tokens) if not is_byte_token(token)), len(ids))

    def _is_visible(self, id_: int) -> bool:
        # A padding row has no token: the library's decode leaves it out too.
        return id_ not in self._special and self._tokenizer.id_to_token(id_) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that ``decode(..., skip_special_tokens=True)`` leaves out."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


def is_byte_token(token: str) -> bool:
    """Tell whether a token stands for one byte, as in ``<0x0A>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def decoder_types(tokenizer: Tokenizer) -> list[str]:
    """The kinds of the decoders that a tokenizer runs one after the other."""
    return [str(decoder.get("type")) for decoder in _decoders(tokenizer)]


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    # The decoder's state is the JSON of its part of tokenizer.json.
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _is_local(tokenizer: Tokenizer) -> bool:
    """Tell whether a token's text depends on nothing after it, cut-off characters and byte runs apart."""
    return all(
        decoder["type"] in _LOCAL_DECODERS
        or (decoder["type"] == "Replace" and len(decoder["pattern"].get("String", "")) == 1)
        or (decoder["type"] == "Strip" and decoder["stop"] == 0)
        for decoder in _decoders(tokenizer)
    )


class StopStrings:
    r"""Cut a stream of text at the stop string that is complete first.

    Text that may still become a stop string is held back. The result does not depend on how the text is
    split into pieces; of stop strings that end together, the longest is taken.

    Attributes:
        stopped: the stop string that was met, or None.

    Example:
        >>> stops = StopStrings(["\n\n"])
        >>> stops.push("one\n"), stops.push("two\n"), stops.push("\nthree"), stops.stopped
        ('one', '\ntwo', '', '\n\n')
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string must not be empty.")
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and give the text that is surely before any stop string; may be empty."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, length, self.stopped = min(found)
            self._held = ""
            return text[: end + length]
        cut = len(text) - self._open_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """End the stream: give what was held back."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)
