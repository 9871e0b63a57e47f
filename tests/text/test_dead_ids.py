import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from tests.support.realdata import TOKENIZERS, corpus_slices
from trimserve.model.resolve import resolve_model
from trimserve.text.dead_ids import dead_ids

WORDS = ["".join(word) for size in range(1, 8) for word in itertools.product("ab", repeat=size)]


def emitted(tokenizer):
    """The ids that any text of the letters a and b, up to 7 of them, leads to."""
    return {id_ for encoding in tokenizer.encode_batch_fast(WORDS) for id_ in encoding.ids}


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    st.sets(st.sampled_from(WORDS[:30])),
)
def test_bpe_pieces_are_dead_that_no_text_leads_to(steps, stray):
    pieces, merges = ["a", "b"], []
    for left, right in steps:  # merges in any order, and pieces that no merge makes
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        if len("".join(pair)) <= 4 and "".join(pair) not in pieces:
            merges.append(pair)
            pieces.append("".join(pair))
    pieces += sorted(stray - set(pieces))
    tokenizer = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, merges))
    assert set(dead_ids(tokenizer).tolist()) == set(range(len(pieces))) - emitted(tokenizer)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(WORDS[2:30]), st.integers(1, 40), max_size=8))
def test_unigram_pieces_are_dead_that_no_text_leads_to(scores):
    vocab = [("<unk>", 0.0), ("a", -10.0), ("b", -12.0)]
    vocab += [(piece, -score - 0.01 * place) for place, (piece, score) in enumerate(scores.items())]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    assert set(dead_ids(tokenizer).tolist()) == set(range(1, len(vocab))) - emitted(tokenizer)


def test_bpe_variants_that_are_not_understood_have_none():
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3}
    plain = Tokenizer(models.BPE(vocab, [("a", "b")]))
    assert dead_ids(plain).tolist() == [3]
    for option in ({"dropout": 0.5}, {"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}):
        assert dead_ids(Tokenizer(models.BPE({**vocab, "##b": 4, "a##b": 5}, [], **option))).size == 0
    # A tokenizer that looks words up as a whole first reaches what no merge makes.
    assert dead_ids(Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))).size == 0


def test_added_unknown_and_byte_pieces_are_never_dead():
    vocab = {"<unk>": 0, "a": 1, "<0x0A>": 2, "ab": 3, "word": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_tokens([AddedToken("word")])
    assert dead_ids(tokenizer).tolist() == [3]


def test_wordpieces_that_bert_never_makes():
    pieces = [
        "[UNK]",
        "cat",
        "Cat",
        "##s",
        "##.",
        ".",
        "...",
        "猫",
        "##猫",
        "猫s",
        "é",
        "e",
        "##\u0301",
        "a b",
    ]
    tokenizer = Tokenizer(models.WordPiece({p: id_ for id_, p in enumerate(pieces)}, unk_token="[UNK]"))
    assert dead_ids(tokenizer).size == 0  # nothing parts words
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    dead = {pieces[id_] for id_ in dead_ids(tokenizer)}
    assert dead == {"Cat", "##.", "...", "##猫", "猫s", "é", "##\u0301", "a b"}
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    assert {pieces[id_] for id_ in dead_ids(tokenizer)} == {"##.", "...", "##猫", "猫s", "a b"}
    tokenizer.normalizer = normalizers.Lowercase()
    assert dead_ids(tokenizer).size == 0


def test_other_models_have_none():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "A B": 1}, unk_token="[UNK]"))
    assert dead_ids(tokenizer).dtype == np.int32
    assert dead_ids(tokenizer).size == 0


LARGE = ("xlm-roberta", "mbert-cased", "qwen2")


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in TOKENIZERS]
)
def test_no_real_text_leads_to_a_dead_id(data_dir, name):
    tokenizer = resolve_model(data_dir / "tokenizers" / name, weights=False).tokenizer()
    dead = dead_ids(tokenizer)
    texts = [text for texts in corpus_slices(data_dir, 4_000).values() for text in texts]
    seen = {id_ for encoding in tokenizer.encode_batch_fast(texts) for id_ in encoding.ids}
    assert not seen.intersection(dead.tolist())
    # Nor does a dead piece's own text, alone or inside another word.
    pieces = [tokenizer.decode([id_]) for id_ in dead.tolist()]
    for text in (*pieces, *(f"a{piece}a" for piece in pieces)):
        assert not set(tokenizer.encode(text).ids).intersection(dead.tolist())
    known = {"bert-uncased": 1_331, "mbert-cased": 7_025, "t5-small": 2}
    assert dead.size == known.get(name, dead.size)
    assert json.loads(tokenizer.to_str())["model"]["type"] != "BPE" or dead.size == 0
