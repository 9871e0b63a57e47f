import dataclasses
import io
import re
import sys
import unicodedata
from collections import Counter
from itertools import product
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.realdata import TOKENIZERS, corpus_slices
from tests.support.tiny_tokenizers import KINDS
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Document, Reading
from trimserve.counting.documents import DocumentCounter, _Presence, encode_parts
from trimserve.counting.encoding import choosing
from trimserve.counting.encoding.choosing import choose_encoder, make_encoder
from trimserve.counting.encoding.encoders import Flat, PlainEncoder
from trimserve.counting.encoding.joints import components, find_joint
from trimserve.counting.encoding.words import WordEncoder
from trimserve.counting.workers import wire
from trimserve.counting.workers.job import Job
from trimserve.errors import UsageError
from trimserve.text.chat import ChatTemplate
from trimserve.text.tokenizer import load_tokenizer

TINY = {kind: make() for kind, make in KINDS.items()}
for tokenizer in TINY.values():
    tokenizer.no_padding()
    tokenizer.no_truncation()


def word_encoder(tokenizer):
    return WordEncoder(tokenizer)


def assert_equal(found, expected):
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.lengths, expected.lengths)


ALPHABET = "ab c  \n\r\t.,'-é日本1_ß\u00a0\u200b\u0301\u037a\u0600▁<|"
TEXTS = st.lists(st.text(ALPHABET, max_size=40) | st.sampled_from(["a <|end|> b", "x<think> y", "[MASK] 日"]))


@settings(max_examples=60)
@given(texts=TEXTS, kind=st.sampled_from(sorted(KINDS)))
def test_distinct_words_encode_like_texts(texts, kind):
    encoder = word_encoder(TINY[kind])
    assert_equal(encoder.encode(texts), PlainEncoder(TINY[kind]).encode(texts))
    assert_equal(encoder.encode(texts[::-1]), PlainEncoder(TINY[kind]).encode(texts[::-1]))  # by its memory


@settings(max_examples=60)
@given(texts=TEXTS, kind=st.sampled_from(sorted(KINDS)), size=st.integers(1, 9))
def test_long_texts_are_parted_piece_by_piece(texts, kind, size):
    sizes = {"_SEGMENT_CHARACTERS": size, "_MOST_PIECES": 3}
    with mock.patch.multiple("trimserve.counting.encoding.words", **sizes):
        assert_equal(word_encoder(TINY[kind]).encode(texts), PlainEncoder(TINY[kind]).encode(texts))


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr("trimserve.counting.encoding.words._MAX_WORDS", 5)
    encoder, plain = word_encoder(TINY["unigram"]), PlainEncoder(TINY["unigram"])
    for number in range(20):
        texts = [f"the cat {number} sat on {'xyz'[number % 3]}", ""]
        assert_equal(encoder.encode(texts), plain.encode(texts))
        assert len(encoder._words.index) < 20


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        (
            "wordpiece",
            {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}},
            "Replace",
        ),
        (
            "wordpiece",
            {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "x"}},
            "CharDelimiterSplit",
        ),
        ("unigram", {"pre_tokenizer": None}, "pre-tokenizer"),
        (
            "unigram",
            {"pre_tokenizer": {"type": "Metaspace", "split": False, "replacement": "▁"}},
            "Metaspace",
        ),
        ("byte_level_bpe", {"added_tokens": [{"content": "two words"}]}, "added tokens"),
        (
            "byte_level_bpe",
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[^x]+"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        {"type": "ByteLevel", "use_regex": False},
                    ],
                }
            },
            "Split",
        ),
        ("sentencepiece_bpe", {}, "vocab"),
        ("byte_level_bpe", {"model": {"type": "BPE", "dropout": 0.1}}, "dropout"),
    ],
)
def test_tokenizers_that_are_not_proven_local_are_refused(kind, change, what):
    parts = components(TINY[kind])
    assert find_joint(parts, TINY[kind].get_vocab) in ("lead", "drop", "any")
    with pytest.raises(UsageError, match=what):
        find_joint(parts | change, lambda: ["▁▁", "▁a", "▁a▁b"])


class Wrong:
    """An engine that is nearly right."""

    name = "fastokens"
    batch_characters = 100

    def __init__(self, tokenizer):
        self._plain = PlainEncoder(tokenizer)

    def encode(self, texts):
        flat = self._plain.encode([text.replace("zebra", "horse") for text in texts])
        return Flat(flat.ids.astype(np.uint32), flat.lengths)


def test_an_engine_that_differs_on_the_sample_is_not_used(monkeypatch):
    tokenizer = TINY["byte_level_bpe"]
    plain = make_encoder
    monkeypatch.setattr(
        choosing,
        "make_encoder",
        lambda *given: Wrong(tokenizer) if given[0] == "fastokens" else plain(*given),
    )
    content = tokenizer.to_str().encode()
    assert choose_encoder(tokenizer, content, ["a horse"], 1 << 30).name == "fastokens"
    assert choose_encoder(tokenizer, content, ["a zebra"], 1 << 30).name == "words"
    assert choose_encoder(tokenizer, content, ["a horse"], 1 << 19).name == "words"  # not worth loading


def test_tokenizers_itself_is_used_where_nothing_else_is_proven(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = KINDS["wordpiece"]()
    tokenizer.normalizer = None
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("x")
    assert choose_encoder(tokenizer, tokenizer.to_str().encode(), ["a"], 1 << 30).name == "tokenizers"


def test_a_sample_without_spaces_is_not_encoded_to_choose(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setattr(PlainEncoder, "encode", lambda *_: pytest.fail("encoded"))
    tokenizer = KINDS["byte_level_bpe"]()
    chosen = choose_encoder(tokenizer, tokenizer.to_str().encode(), ["日本語のテキスト" * 9], 1 << 19)
    assert chosen.name == "tokenizers"


@pytest.mark.parametrize("kind", ["byte_level_bpe", "sentencepiece_bpe"])
def test_fastokens_gives_the_same_ids(kind):
    pytest.importorskip("fastokens")
    texts = ["The cat sat.\nOn the mat", "", "日本 a  b", "<|turn|>user\n"]
    fast = make_encoder("fastokens", TINY[kind], TINY[kind].to_str().encode())
    assert_equal(fast.encode(texts), PlainEncoder(TINY[kind]).encode(texts))


@settings(max_examples=50)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=3), max_size=12
    ),
    size=st.integers(1, 5),
)
def test_documents_with_an_id_are_counted_across_batches(documents, size):
    parts = [(number > 0, ids) for document in documents for number, ids in enumerate(document)]
    presence = _Presence(10)
    for start in range(0, len(parts), size):
        batch = parts[start : start + size]
        ids = np.array([id_ for _, part in batch for id_ in part], np.int32)
        lengths = np.array([len(part) for _, part in batch])
        presence.add(Flat(ids, lengths), np.array([not continues for continues, _ in batch]))
    expected = Counter(id_ for document in documents for id_ in set().union(*document))
    assert presence.finish().tolist() == [expected[id_] for id_ in range(10)]


@pytest.mark.parametrize(("rows", "documents"), [(37, 9000), (1 << 20, 300)])
def test_documents_with_an_id_are_counted_where_slots_of_the_hash_table_collide(rows, documents):
    random = np.random.default_rng(0)
    lengths = random.integers(0, 60 if rows == 37 else 3000, documents)
    # More ids than slots; multiples of a power of two meet often.
    ids = random.integers(0, rows, lengths.sum()) // 16 * 16
    presence = _Presence(rows)
    presence.add(Flat(ids.astype(np.uint32), lengths), np.ones(documents, np.bool_))
    pairs = np.unique(np.stack([np.repeat(np.arange(documents), lengths), ids]), axis=1)
    assert np.array_equal(presence.finish(), np.bincount(pairs[1], minlength=rows))


def test_a_part_is_encoded_behind_its_context():
    encoder = PlainEncoder(TINY["sentencepiece_bpe"])
    text = "The cat<|end|>\nsat on the mat"
    (whole,) = [encoder.encode([text]).ids]
    parts = [Document("The cat<|end|>\n"), Document("sat on the mat", 1, "The cat<|end|>\n")]
    assert encode_parts(encoder, parts).ids.tolist() == whole.tolist()
    assert encoder.encode([part.text for part in parts]).ids.tolist() != whole.tolist()


def test_a_token_across_context_and_part_is_not_counted():
    # Behind "th" the model's answer "e" is its own token, though "the" would be one.
    encoder = PlainEncoder(TINY["byte_level_bpe"])
    torn = encode_parts(encoder, [Document("th"), Document("e cat", 1, "th"), Document("a")])
    expected = [*encoder.encode(["th"]).ids, *encoder.encode(["e cat"]).ids, *encoder.encode(["a"]).ids]
    assert torn.ids.tolist() == expected
    assert torn.lengths.sum() == len(expected)


def test_counts_do_not_depend_on_batches():
    tokenizer = TINY["wordpiece"]
    documents = [Document(f"the cat {number % 3} sat") for number in range(9)]
    documents[4] = documents[4]._replace(part=1, output=True)
    blocks = []
    for characters, beside in product((1, 30, 10_000), (False, True)):
        encoder = PlainEncoder(tokenizer)
        encoder.batch_characters, encoder.beside = characters, beside
        counter, called = DocumentCounter(encoder, 37), []
        counter.add_all(documents, lambda called=called: called.append(None))
        assert len(called) == {1: 9, 30: 3, 10_000: 1}[characters]
        blocks.append(counter.finish())
    for block in blocks[1:]:
        for name in ("counts", "document_counts", "output_counts", "texts", "characters"):
            assert np.array_equal(getattr(block, name), getattr(blocks[0], name)), name
    assert blocks[0].texts == 8
    assert blocks[0].output_counts.sum() == len(
        tokenizer.encode(documents[4].text, add_special_tokens=False).ids
    )


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_engines_give_the_ids_of_tokenizers_on_real_corpora(data_dir, name):
    tokenizer = load_tokenizer(data_dir / "tokenizers" / name / "tokenizer.json")
    plain, words = PlainEncoder(tokenizer), word_encoder(tokenizer)
    for texts in corpus_slices(data_dir, 15_000).values():
        lines = [line for text in texts for line in text.splitlines()[:50]]
        for batch in (texts, lines):
            assert_equal(words.encode(batch), plain.encode(batch))


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "xlm-roberta", "t5-small", "phi3"])
def test_every_character_beside_a_space_is_judged_rightly(data_dir, name):
    """What a character does beside a space is tried with few probes: try all of Unicode with others."""
    tokenizer = load_tokenizer(data_dir / "tokenizers" / name / "tokenizer.json")
    characters = [
        chr(code) for code in range(0x20, 0x30000) if unicodedata.category(chr(code))[0] in "LNPSMZ"
    ]
    texts = [f"w{left} {right}é" for left, right in zip(characters, reversed(characters), strict=True)]
    texts = [text for text in texts[::41] if not re.search("[<>|]", text)]
    assert_equal(word_encoder(tokenizer).encode(texts), PlainEncoder(tokenizer).encode(texts))


def test_words_are_not_looked_for_where_there_are_none():
    tokenizer, chinese = TINY["byte_level_bpe"], "日本語のテキスト、中文全角。" * 20
    chosen = [
        choose_encoder(tokenizer, b"", sample, 1).name for sample in (["the cat sat"] * 9, [chinese], [])
    ]
    assert chosen == ["words", "tokenizers", "words"]
    assert choose_encoder(TINY["wordpiece"], b"", [chinese], 1).name == "words"  # a character is a word


def test_an_error_while_reading_ahead_comes_through():
    def reading():
        yield Document("the cat")
        yield Document("sat")
        raise UsageError("a bad row")

    encoder = PlainEncoder(TINY["wordpiece"])
    encoder.batch_characters, encoder.beside = 1, True
    counter = DocumentCounter(encoder, 37)
    with pytest.raises(UsageError, match="a bad row"):
        counter.add_all(reading())
    assert counter.finish().texts == 1  # whole batches alone


def test_messages_between_processes_lose_nothing(tmp_path):
    """Jobs, slices, blocks and errors, through pipes, as JSON and safetensors."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"t": "a b"}\n{"t": ""}\n', "utf-8")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    reading = Reading("t", template=ChatTemplate("{{ 'é' }}", {"bos_token": "<s>"}), skip_bad=True)
    job = Job(tokenizer.to_str().encode(), "tokenizers", 5, reading)
    assert wire.read_job(through_pipe(wire.job_message(job))) == job
    plain = dataclasses.replace(job, reading=Reading("t", skip_bad=True))
    assert wire.read_job(wire.job_message(plain)) == plain
    (piece,) = Corpus([str(path)], "t").slices()
    assert wire.read_slice(through_pipe(wire.slice_message(piece))) == piece
    for shared in (False, True):
        piece = dataclasses.replace(piece, shared=shared)
        expected = plain.count(piece, plain.make_encoder())
        found = wire.read_block(through_pipe(wire.answer(plain, piece, plain.make_encoder())))
        assert found.open_ids is None or found.open_ids.dtype == np.bool_
        assert expected.skipped
        for field in dataclasses.fields(expected):
            assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name
    strict = dataclasses.replace(job, reading=Reading("t"))
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 2"):
        wire.read_block(wire.answer(strict, piece, strict.make_encoder()))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        wire.read_block(wire.answer(plain, piece, plain.make_encoder()))
    assert caught.value.filename == str(path)
    with pytest.raises(EOFError):
        wire.receive(io.BytesIO(b"torn"))


def through_pipe(message):
    stream = io.BytesIO()
    wire.send(stream, message)
    stream.seek(0)
    return wire.receive(stream)
