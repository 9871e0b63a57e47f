"""Stop strings as transformers matches them: on the strings of tokens, special ones included.

A sequence ends with the token in which a stop string ends, wherever in the token that is; the string may
begin in the prompt. With transformers 5 matching is on bytes, so that a character whose bytes are in
several tokens counts when it is complete.
"""

import re
from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer

from trimserve.errors import UsageError
from trimserve.text.streaming import decoder_types

# Decoders treat the first token of a text apart: this stands before the token that is asked for.
_BEFORE = "abcdef"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StopMatcher:
    """Watches the tokens of one sequence.

    Example:
        >>> matcher = StopMatcher(tokenizer, ["<|im_end|>"], prompt_ids)  # doctest: +SKIP
        >>> matcher.ends_with(token_id)  # doctest: +SKIP
        False
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str], prompt: Iterable[int], *, by_bytes: bool = True
    ) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: the model's.
            stops: the stop strings.
            prompt: token ids before the first one.
            by_bytes: match characters whose bytes are in several tokens, as transformers 5 does.

        Raises:
            UsageError: a stop string is empty.
        """
        self._stops = [stop.encode() for stop in stops]
        if not all(self._stops):
            raise UsageError("a stop string must not be empty.")
        self._tokens = TokenBytes(tokenizer, by_bytes=by_bytes)
        self._longest = max(map(len, self._stops))
        # Each token of text has a byte at least: more of them cannot matter.
        tail = [int(token) for token in prompt][-self._longest :]
        self._tail = b"".join(map(self._tokens.of, tail))[-self._longest :]

    def ends_with(self, token_id: int) -> bool:
        """Take the next token; tell whether a stop string ends in it."""
        token = self._tokens.of(token_id)
        # So much of what was there cannot hold a whole stop string by itself.
        found = any(stop in self._tail[len(self._tail) - len(stop) + 1 :] + token for stop in self._stops)
        self._tail = (self._tail + token)[-self._longest :]
        return found


class TokenBytes:
    """The bytes that a token adds to a text."""

    def __init__(self, tokenizer: Tokenizer, *, by_bytes: bool) -> None:
        self._tokenizer = tokenizer
        types = decoder_types(tokenizer) if by_bytes else []
        self._falls_back = "ByteFallback" in types
        self._bytes = _byte_of_character() if "ByteLevel" in types and not self._falls_back else {}
        self._before = tokenizer.encode(_BEFORE, add_special_tokens=False).ids
        self.of = cache(self._of)

    def _of(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # a padding row
        if self._falls_back and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self._bytes and all(character in self._bytes for character in token):
            return bytes(self._bytes[character] for character in token)
        text: str = self._tokenizer.decode([*self._before, token_id], skip_special_tokens=False)
        _, found, after = text.partition(_BEFORE)
        if not found:
            after = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return after.encode("utf-8", "replace")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
