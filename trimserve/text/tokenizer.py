"""A `tokenizers.Tokenizer` and what can be asked of it: its special, byte and newline ids."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from trimserve.errors import MismatchError
from trimserve.files.content import check_content


def end_of_ids(tokenizer: Tokenizer) -> int:
    """The least number above all ids of a tokenizer."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, with padding and truncation off.

    Raises:
        MismatchError: the file is not a tokenizer that the tokenizers library can read.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise unreadable(path, error) from error
    # all-MiniLM's file cuts every text to 128 tokens and pads the rest.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def unreadable(path: Path, error: Exception) -> MismatchError:
    """The error of a file that the tokenizers library cannot read."""
    if path.is_file():
        check_content(path)
    return MismatchError(f"{path} cannot be read as a tokenizer ({error}): fetch it again.")


_NEWLINES = ("\n", "\n\n", "\r\n")


def tokenizer_ids(tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the ids that tokenizer.json itself depends on: alphabet, bytes, unk, post-processor."""
    model = json.loads(tokenizer.to_str())
    yield from byte_ids(tokenizer)
    if isinstance(unk := model["model"].get("unk_id"), int):
        yield unk
    yield from ids_of_tokens(tokenizer, [model["model"].get("unk_token")])
    yield from _processor_ids(model["post_processor"] or {})


def byte_ids(tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the ids of the 256 byte-level letters, or of the `<0x00>`.. byte-fallback pieces."""
    parts = str(tokenizer.pre_tokenizer) + str(tokenizer.decoder) + str(tokenizer.normalizer)
    if "ByteLevel(" in parts:
        yield from ids_of_tokens(tokenizer, ByteLevel.alphabet())
    yield from ids_of_tokens(tokenizer, (f"<0x{byte:02X}>" for byte in range(256)))


def ids_of_tokens(tokenizer: Tokenizer, tokens: Iterable[str | None]) -> Iterator[int]:
    """Ids of those of the tokens that the tokenizer has."""
    for token in tokens:
        if token is not None and (id_ := tokenizer.token_to_id(token)) is not None:
            yield id_


def _processor_ids(processor: dict[str, Any]) -> Iterator[int]:
    for nested in processor.get("processors", ()):
        yield from _processor_ids(nested)
    special = processor.get("special_tokens", {})  # TemplateProcessing
    yield from chain.from_iterable(entry["ids"] for entry in special.values())
    for key in ("cls", "sep"):  # BertProcessing, RobertaProcessing: [token, id]
        if key in processor:
            yield processor[key][1]


def newline_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer gives for line breaks; empty where it takes them for plain spaces."""
    encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in _NEWLINES)
    ids = sorted(set(chain.from_iterable(encoded)))
    return [id_ for id_ in ids if "\n" in _spelling(tokenizer, id_)]


def _spelling(tokenizer: Tokenizer, id_: int) -> str:
    token: str = tokenizer.id_to_token(id_)
    # Decoders strip at the ends, so a lone newline may decode to nothing: look at the piece as well.
    return token.replace("Ċ", "\n").replace("<0x0A>", "\n")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that ``decode(..., skip_special_tokens=True)`` leaves out."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


def is_byte_token(token: str) -> bool:
    """Tell whether a token stands for one byte, as in ``<0x0A>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def parse_tokenizer(content: bytes) -> Tokenizer:
    """A tokenizer with padding and truncation off, as `trimserve.text.tokenizer.load_tokenizer` gives it."""
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
