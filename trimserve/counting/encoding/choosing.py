"""Choose the encoder of a corpus: the fastest that gives id for id what `tokenizers` gives.

A faster one is used only where that is proven (`joints`) or tried on a sample of the very
corpus (`choose_encoder`).
"""

import logging
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from trimserve.counting.encoding.encoders import EncoderName, FastEncoder, Flat, IdEncoder, PlainEncoder
from trimserve.counting.encoding.words import WordEncoder
from trimserve.errors import UsageError

log = logging.getLogger(__name__)

# Bytes of text from which fastokens is tried. It reads a vocab of 150,000 in some 1.5 s, which it saves on
# 10 MB of German or Chinese and on 27 MB of English (bench/profile/run.py).
_WORTH_LOADING = 8_000_000
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


def make_encoder(engine: EncoderName, tokenizer: Tokenizer, tokenizer_json: bytes) -> IdEncoder:
    """Make an encoder of a given engine.

    Raises:
        MissingExtraError: its package is not installed.
        UsageError: it is not proven for this tokenizer.
    """
    if engine == "fastokens":
        return FastEncoder(tokenizer_json)
    return WordEncoder(tokenizer) if engine == "words" else PlainEncoder(tokenizer)


def choose_encoder(
    tokenizer: Tokenizer, tokenizer_json: bytes, sample: Sequence[str], size: int
) -> IdEncoder:
    """The fastest encoder that gives id for id what `tokenizers` gives on the sample and on awkward texts.

    Args:
        tokenizer: with padding and truncation off.
        tokenizer_json: the content of its file.
        sample: texts of the corpus.
        size: bytes of the corpus; a small one is counted sooner than fastokens has loaded a vocab.
    """
    plain = PlainEncoder(tokenizer)
    texts = [*_AWKWARD, *sample]
    expected: Flat | None = None
    engine: EncoderName
    # fastokens knows BPE alone; trying others would cost the parsing of their vocab.
    fast = size >= _WORTH_LOADING and isinstance(tokenizer.model, BPE)
    for engine in ("fastokens", "words") if fast else ("words",):
        try:
            encoder = make_encoder(engine, tokenizer, tokenizer_json)
            if isinstance(encoder, WordEncoder) and sample and not encoder.parts_most_of(sample):
                log.info("engine words: the sample has hardly any spaces")
                continue
            found = encoder.encode(texts)
        except (ImportError, UsageError) as error:
            log.info("engine %s: %s", engine, error)
            continue
        expected = expected or plain.encode(texts)
        if np.array_equal(found.ids, expected.ids) and np.array_equal(found.lengths, expected.lengths):
            return encoder
        log.info("engine %s differs from tokenizers on the sample, so it is not used", engine)
    return plain
