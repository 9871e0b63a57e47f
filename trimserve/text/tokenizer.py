"""A `tokenizers.Tokenizer` and what can be asked of it: its special, byte and newline ids."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from trimserve.errors import MismatchError
from trimserve.files.content import check_content
from trimserve.files.model_json import MOST_ROWS
from trimserve.foreign import foreign, rust_faults

# A number that an id beyond `MOST_ROWS` would have; scores have a point before their many digits.
_LARGE = re.compile(rb"[\s:,\[][0-9]{8,}(?=[\s,}\]])")

# Around functions that ask a tokenizer of a stranger to work.
tokenizer_border = rust_faults(
    "the tokenizers library fails with the model's tokenizer", advice="fetch the model again."
)


def end_of_ids(tokenizer: Tokenizer) -> int:
    """The least number above all ids of a tokenizer; 0 where it has none."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values(), default=-1) + 1


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, with padding and truncation off.

    Raises:
        MismatchError: the file is not a tokenizer that the tokenizers library can read.
    """
    check_content(path)
    return parse_tokenizer(path.read_bytes(), str(path))


def parse_tokenizer(content: bytes, origin: str = "the tokenizer", *, as_stored: bool = False) -> Tokenizer:
    """Load the content of a tokenizer.json, with padding and truncation off.

    Args:
        content: UTF-8 JSON.
        origin: the file, as the subject of the message.
        as_stored: leave padding and truncation as they are.

    Raises:
        MismatchError: the tokenizers library cannot read it, it has no tokens,
            or an id is too large.
    """
    with foreign(f"{origin} cannot be read as a tokenizer", advice="fetch it again."):
        tokenizer = Tokenizer.from_buffer(content)
        # all-MiniLM's file cuts every text to 128 tokens and pads the rest.
        if not as_stored:
            tokenizer.no_padding()
            tokenizer.no_truncation()
        size = tokenizer.get_vocab_size(with_added_tokens=True)
    # The library itself counts up to the largest id when it writes a tokenizer.
    end = end_of_ids(tokenizer) if _LARGE.search(content) else size
    if size == 0 or end > MOST_ROWS:
        found = "no tokens" if size == 0 else f"the id {end - 1:,}, and {MOST_ROWS - 1:,} is the largest"
        raise MismatchError(f"{origin} has {found}: fetch it again.")
    return tokenizer


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
    token: str = tokenizer.id_to_token(id_) or ""
    # Decoders strip at the ends, so a lone newline may decode to nothing: look at the piece as well.
    return token.replace("Ċ", "\n").replace("<0x0A>", "\n")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that ``decode(..., skip_special_tokens=True)`` leaves out."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


def is_byte_token(token: str) -> bool:
    """Tell whether a token stands for one byte, as in ``<0x0A>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
