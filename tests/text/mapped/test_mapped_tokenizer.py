"""Mapped tokenizers give what `tokenizers` gives: ids, offsets, types, words, cut texts, decoded text."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tests.support.odd_texts import odd_texts
from tests.support.realdata import TOKENIZERS
from tests.support.tiny_tokenizers import KINDS
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.held import HeldFile
from trimserve.text.mapped import working_set
from trimserve.text.mapped.building import build_tables
from trimserve.text.mapped.tables import Tables
from trimserve.text.mapped.tokenizer import MappedTokenizer
from trimserve.text.mapped.trie import build_trie
from trimserve.text.tokenizer import parse_tokenizer


def mapped(content, path):
    """A tokenizer of tables that were written and mapped, and the library's."""
    build_tables(content, hashlib.sha256(content).hexdigest()).write(path)
    return MappedTokenizer(Tables.read(HeldFile(path)), lambda: parse_tokenizer(content)), parse_tokenizer(
        content
    )


def described(encoding):
    """All that is read of an encoding."""
    return (
        list(encoding.ids), encoding.type_ids, encoding.tokens, encoding.offsets, encoding.word_ids,
        encoding.sequence_ids, encoding.special_tokens_mask, [part.ids for part in encoding.overflowing],
    )  # fmt: skip


def assert_same(tokenizer, library, texts, **options):
    found = tokenizer.encode_batch(texts, **options)
    for text, one, other in zip(texts, found, library.encode_batch(texts, **options), strict=True):
        assert described(one) == described(other), text


def bare(tokenizer):
    """What a folder's tokenizer.json holds."""
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request, tmp_path_factory):
    return mapped(bare(KINDS[request.param]()), tmp_path_factory.mktemp("mapped") / "t.safetensors")


def vocab_of(library):
    return sorted(library.get_vocab()), [
        token.content for token in library.get_added_tokens_decoder().values()
    ]


def test_odd_texts_are_encoded_alike(pair):
    tokenizer, library = pair
    texts = list(odd_texts(random.Random(1), *vocab_of(library), 600))
    for start in range(0, 300, 3):
        assert_same(tokenizer, library, texts[start : start + 3])
    assert_same(tokenizer, library, texts)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_any_texts_are_encoded_alike(pair, texts):
    assert_same(*pair, texts, add_special_tokens=False)


def test_pairs_and_truncation(pair):
    tokenizer, library = pair
    texts = list(odd_texts(random.Random(2), *vocab_of(library), 120))
    # The library gives what it cut off of one with all that it cut off of the other.
    pairs = list(zip([text[:12] for text in texts[:60]], [text[:18] for text in texts[60:]], strict=True))
    assert tokenizer.num_special_tokens_to_add(True) == library.num_special_tokens_to_add(True)
    for length, direction, stride in ((5, "right", 0), (9, "left", 0), (12, "right", 2)):
        for one in (tokenizer, library):
            one.enable_truncation(length, direction=direction, stride=stride)
        assert_same(tokenizer, library, texts[:40])
        assert_same(tokenizer, library, pairs)
    for one in (tokenizer, library):
        one.no_truncation()
    assert_same(tokenizer, library, pairs)


def test_special_tokens_as_text(pair):
    tokenizer, library = pair
    texts = list(odd_texts(random.Random(3), *vocab_of(library), 100))
    for one in (tokenizer, library):
        one.encode_special_tokens = True
    assert_same(tokenizer, library, texts)
    for one in (tokenizer, library):
        one.encode_special_tokens = False


def test_tokens_and_text_of_ids(pair):
    tokenizer, library = pair
    size = library.get_vocab_size()
    for id_ in (*range(size + 3),):
        assert tokenizer.id_to_token(id_) == library.id_to_token(id_)
    for token in (*library.get_vocab(), "no such token", ""):
        assert tokenizer.token_to_id(token) == library.token_to_id(token)
    rng = random.Random(4)
    for skip in (True, False):
        ids = [rng.randrange(size + 3) for _ in range(40)]
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(
            ids, skip_special_tokens=skip
        )
    assert tokenizer.to_str() == library.to_str()
    expected = library.get_added_tokens_decoder()
    assert {id_: str(token) for id_, token in tokenizer.get_added_tokens_decoder().items()} == {
        id_: str(token) for id_, token in expected.items()
    }


def test_a_small_working_set_is_replaced_and_batches_are_parted(pair, monkeypatch):
    tokenizer, library = pair
    monkeypatch.setattr(working_set, "_MOST_OTHERWISE", 40)
    monkeypatch.setitem(working_set._MOST_PIECES, "Unigram", 40)
    small = MappedTokenizer(tokenizer._tables, lambda: library)
    texts = list(odd_texts(random.Random(5), *vocab_of(library), 300))
    assert_same(small, library, texts)
    for text in texts:
        assert_same(small, library, [text])


def test_equal_scores_and_pieces_of_several_words_are_decided_alike(tmp_path):
    """Ties by the thousand: all pieces of a and b have the same score a character."""
    pieces = ["<unk>", *sorted({f"{n:0{size}b}".replace("0", "a").replace("1", "b") for size in (1, 2, 3, 4)
                                for n in range(2**size)}), "▁", "▁a", "a▁b", "b▁", "▁▁"]  # fmt: skip
    model = models.Unigram([(piece, -0.1 * len(piece)) for piece in pieces], 0, False)
    for split in (True, False):
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
        tokenizer, library = mapped(bare(made), tmp_path / f"{split}.safetensors")
        rng = random.Random(6)
        texts = ["".join(rng.choices("ab c▁", (5, 5, 2, 1, 1), k=rng.randint(1, 30))) for _ in range(400)]
        for text in texts:
            assert_same(tokenizer, library, [text])


NORMALIZERS = {
    "strip": normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()]),
    "whole": normalizers.Replace(" a", "b"),
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "lower": normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
}


@pytest.mark.parametrize("name", sorted(NORMALIZERS))
def test_normalizers_that_change_what_is_beside_a_space(name, tmp_path):
    made = KINDS["sentencepiece_bpe"]()
    made.normalizer = NORMALIZERS[name]
    made.add_tokens(["cat", " the "])  # these are looked for in the normalized text
    tokenizer, library = mapped(bare(made), tmp_path / "t.safetensors")
    for text in odd_texts(random.Random(7), *vocab_of(library), 200):
        assert_same(tokenizer, library, [text, f"the {text} the cat "])


def test_a_long_word_takes_time_in_proportion(pair):
    tokenizer, library = pair
    for text in ("x" * 100_000, "ab" * 30_000 + "中" * 20_000):
        assert tokenizer.encode(text).ids == library.encode(text).ids


def test_what_is_not_proven_is_refused():
    dropped = KINDS["byte_level_bpe"]()
    dropped.model = models.BPE({"a": 0}, [], dropout=0.1)
    with pytest.raises(UnsupportedModelError, match="dropout"):
        build_tables(bare(dropped), "")
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        build_tables(bare(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), "")
    twice = json.loads(bare(KINDS["unigram"]()))
    twice["model"]["vocab"].append(twice["model"]["vocab"][-1])
    with pytest.raises(UnsupportedModelError, match="twice"):
        build_tables(json.dumps(twice).encode(), "")


def test_tables_that_do_not_fit_are_refused(tmp_path):
    content = bare(KINDS["wordpiece"]())
    tables = build_tables(content, "")
    for changed in (
        {"edges": tables.edges[:-1]},
        {"ends": tables.ends[:-1]},
        {"ids": tables.ids.astype(np.int64)},
    ):
        replace(tables, **changed).write(tmp_path / "t.safetensors")
        with pytest.raises(MismatchError, match="export the folder again"):
            Tables.read(HeldFile(tmp_path / "t.safetensors"))


def test_both_walks_of_the_trie_find_the_same():
    rng = random.Random(8)
    pieces = list(dict.fromkeys("".join(rng.choices("abcé😀", k=rng.randint(1, 6))) for _ in range(2000)))
    trie = build_trie(pieces)
    assert [trie.find(piece) for piece in pieces] == list(range(len(pieces)))
    text = "".join(rng.choices("abcé😀z", k=3000))
    expected = {place for place, piece in enumerate(pieces) if piece in text}
    symbols = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    assert set(trie.within(symbols, [trie.root]).tolist()) == expected
    assert trie._within_few(symbols.tolist(), [trie.root]) == expected


@pytest.mark.realdata
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers(name, data_dir, tmp_path):
    content = (data_dir / "tokenizers" / name / "tokenizer.json").read_bytes()
    tokenizer, library = mapped(content, tmp_path / "t.safetensors")
    texts = list(odd_texts(random.Random(9), *vocab_of(library), 300))
    for file in sorted((data_dir / "corpora").glob("*/text.txt")):
        lines = file.read_text("utf-8")[:40_000].splitlines()
        texts += random.Random(10).sample(lines, min(8, len(lines)))
    assert_same(tokenizer, library, texts)
    for start in range(0, len(texts), 4):
        assert_same(tokenizer, library, texts[start : start + 4])
