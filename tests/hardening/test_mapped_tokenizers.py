"""The real tokenizers, mapped, against `tokenizers`: a million odd texts each, and the corpora."""

import hashlib
import itertools
import os
import random

import pytest

from tests.support.odd_texts import odd_texts
from tests.support.realdata import TOKENIZERS
from trimserve.files.held import HeldFile
from trimserve.text.mapped.building import build_tables
from trimserve.text.mapped.tables import Tables
from trimserve.text.mapped.tokenizer import MappedTokenizer
from trimserve.text.tokenizer import parse_tokenizer

_TEXTS = int(os.environ.get("TRIMSERVE_FUZZ_TEXTS", "1000000"))
_SIZES = (1, 2, 7, 64, 1024)

pytestmark = [pytest.mark.fuzz, pytest.mark.realdata]


@pytest.fixture(params=TOKENIZERS)
def pair(request, data_dir, tmp_path):
    content = (data_dir / "tokenizers" / request.param / "tokenizer.json").read_bytes()
    path = tmp_path / "tables.safetensors"
    build_tables(content, hashlib.sha256(content).hexdigest()).write(path)
    return MappedTokenizer(Tables.read(HeldFile(path)), lambda: None), parse_tokenizer(content)


def assert_same(pair, texts):
    """In batches of many sizes, so that the working set grows in many ways."""
    for size in itertools.cycle(_SIZES):
        batch = list(itertools.islice(texts, size))
        if not batch:
            return
        found, expected = (one.encode_batch(batch) for one in pair)
        for text, one, other in zip(batch, found, expected, strict=True):
            assert (one.ids, one.offsets) == (other.ids, other.offsets), text


def test_odd_texts(pair):
    library = pair[1]
    literals = [token.content for token in library.get_added_tokens_decoder().values()]
    assert_same(pair, odd_texts(random.Random(0), sorted(library.get_vocab()), literals, _TEXTS))


def test_corpora(pair, data_dir):
    for file in sorted((data_dir / "corpora").glob("*/text.txt")):
        with file.open(encoding="utf-8") as lines:
            assert_same(pair, lines)
