"""Texts to flat arrays of token ids: by tokenizers, by fastokens, or by distinct words.

Every encoder gives id for id what `tokenizers` gives. The faster two are used only where that is proven
(`trimserve.counting.joints`) or tried on a sample of the very corpus (`choose_encoder`).
"""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import BPE

from trimserve.errors import UsageError, require

log = logging.getLogger(__name__)

Engine = Literal["fastokens", "words", "tokenizers"]
ENGINES: tuple[Engine, ...] = ("fastokens", "words", "tokenizers")
_WORTH_LOADING = 1 << 20
# What tokenizers differ in: white space, contractions, numbers, scripts, marks, emoji, control characters.
_AWKWARD = (
    "",
    " ",
    "  leading and trailing  ",
    "it's we'LL\tI'd 'S x'\u0131\u017f",
    "a  b   c\n\n d\r\n\r\ne \n f\u00a0g\u2003h\u3000i\u2028j\u0085k",
    "12345 1,000.50 3² ½ ١٢٣ 一二三",
    "日本語のテキスト、中文\uff08全角\uff09。한국어 ไทย हिन्दी العربية עברית",
    "café café ﬁ Ⅻ İi ẞß ΑΣ σς",
    "👩\u200d👩\u200d👧 🇩🇪 \u0000\u0007\ufeff\u200b\ufffd",
    "<s> </s><|endoftext|>x<mask> [MASK] <unk><pad>",
    "x" * 300,
    "!" * 40 + "=" * 40 + "\n" * 9,
)


@dataclass(frozen=True, slots=True)
class Flat:
    """Token ids of several texts, one after the other.

    Attributes:
        ids: integers (N,).
        lengths: int64 (n,), ids of each text; they sum to N.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]


class Encoder(Protocol):
    """Encodes texts, without the tokens that a post-processor adds.

    Attributes:
        name: which engine it is.
        batch_characters: how much text to pass at a time.
        beside: whether the interpreter is free while it encodes, and it may use more than one core.
    """

    name: Engine
    batch_characters: int
    beside: bool

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        ...


class PlainEncoder:
    """The reference: `tokenizers` itself, on all its threads."""

    name: Engine = "tokenizers"
    batch_characters = 1 << 18

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.beside = _has_threads()

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32, int(lengths.sum()))
        return Flat(ids, lengths)


class FastEncoder:
    """`fastokens`, which gives all ids of a batch in one buffer."""

    name: Engine = "fastokens"
    batch_characters = 1 << 19

    def __init__(self, tokenizer_json: str) -> None:
        """Load the tokenizer.

        Raises:
            MissingExtraError: fastokens is not installed.
            UsageError: it does not know this kind of tokenizer.
        """
        fastokens = require("fastokens", extra="fast", purpose="the engine fastokens")
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        except Exception as error:  # the library names no exception of its own
            raise UsageError(
                f"fastokens cannot read this tokenizer ({error}): take another engine."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.beside = _has_threads()

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts), add_special_tokens=False)
        return Flat(
            np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64)
        )


def _has_threads() -> bool:
    return os.environ.get("RAYON_NUM_THREADS") != "1"


def make_encoder(engine: Engine, tokenizer: Tokenizer, tokenizer_json: str) -> Encoder:
    """Make an encoder of a given engine.

    Raises:
        MissingExtraError: its package is not installed.
        UsageError: it is not proven for this tokenizer.
    """
    from trimserve.counting.words import WordEncoder

    if engine == "fastokens":
        return FastEncoder(tokenizer_json)
    return WordEncoder(tokenizer) if engine == "words" else PlainEncoder(tokenizer)


def choose_encoder(tokenizer: Tokenizer, tokenizer_json: str, sample: Sequence[str], size: int) -> Encoder:
    """The fastest encoder that gives id for id what `tokenizers` gives on the sample and on awkward texts.

    Args:
        tokenizer: with padding and truncation off.
        tokenizer_json: the content of its file.
        sample: texts of the corpus.
        size: bytes of the corpus; a small one is counted sooner than fastokens has loaded a vocab.
    """
    from trimserve.counting.words import WordEncoder

    plain = PlainEncoder(tokenizer)
    texts = [*_AWKWARD, *sample]
    engine: Engine
    expected = plain.encode(texts)
    # fastokens knows BPE alone; trying others would cost the parsing of their vocab.
    fast = size >= _WORTH_LOADING and isinstance(tokenizer.model, BPE)
    for engine in ("fastokens", "words") if fast else ("words",):
        try:
            encoder = make_encoder(engine, tokenizer, tokenizer_json)
            found = encoder.encode(texts)
        except (ImportError, UsageError) as error:
            log.info("engine %s: %s", engine, error)
            continue
        if not (np.array_equal(found.ids, expected.ids) and np.array_equal(found.lengths, expected.lengths)):
            log.info("engine %s differs from tokenizers on the sample, so it is not used", engine)
        elif isinstance(encoder, WordEncoder) and sample and not encoder.parts_most_of(sample):
            log.info("engine words: the sample has hardly any spaces")
        else:
            return encoder
    return plain
