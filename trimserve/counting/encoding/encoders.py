"""The encoders that turn documents into token ids, fast where that is proven to change no id."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.errors import UsageError, require
from trimserve.foreign import foreign


def limit_threads(workers: int) -> None:
    """Let the tokenizer use this many threads, if nothing was tokenised in this process before."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"


@contextlib.contextmanager
def limited_threads(workers: int | None) -> Iterator[None]:
    """`limit_threads` for a block alone: the environment is the caller's. None changes nothing."""
    if workers is None:
        yield
        return
    before = {name: os.environ.get(name) for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    limit_threads(workers)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


EncoderName = Literal["fastokens", "words", "tokenizers"]


@dataclass(frozen=True, slots=True)
class Flat:
    """Token ids of several texts, one after the other.

    Attributes:
        ids: integers (N,).
        lengths: int64 (n,), ids of each text; they sum to N.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]


class IdEncoder(Protocol):
    """Encodes texts, without the tokens that a post-processor adds.

    Attributes:
        name: which engine it is.
        batch_characters: how much text to pass at a time.
        beside: whether the interpreter is free while it encodes, and it may use more than one core.
    """

    name: EncoderName
    batch_characters: int
    beside: bool

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        ...


class PlainEncoder:
    """The reference: `tokenizers` itself, on all its threads."""

    name: EncoderName = "tokenizers"
    batch_characters = 1 << 18

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.beside = _has_threads()

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        with _fails():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32, int(lengths.sum()))
        return Flat(ids, lengths)


class FastEncoder:
    """`fastokens`, which gives all ids of a batch in one buffer."""

    name: EncoderName = "fastokens"
    batch_characters = 1 << 19

    def __init__(self, tokenizer_json: bytes) -> None:
        """Load the tokenizer.

        Raises:
            MissingExtraError: fastokens is not installed.
            UsageError: it does not know this kind of tokenizer.
        """
        fastokens = require("fastokens", extra="fast", purpose="the engine fastokens")
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json.decode())
        except Exception as error:  # the library names no exception of its own
            raise UsageError(f"fastokens cannot read this tokenizer ({error}).") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.beside = _has_threads()

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        with _fails():
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), add_special_tokens=False)
        return Flat(
            np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64)
        )


def _fails() -> contextlib.AbstractContextManager[None]:
    return foreign(
        "a text of the corpus cannot be tokenised",
        advice="look at what is unusual in it, or at the tokenizer.",
    )


def _has_threads() -> bool:
    return os.environ.get("RAYON_NUM_THREADS") != "1"
