"""Words of mapped tokenizers: the pieces of a word's tokens are enough, wherever it comes again."""

import hashlib
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.tiny_tokenizers import KINDS
from trimserve.files.held import HeldFile
from trimserve.text.mapped.building import build_tables
from trimserve.text.mapped.tables import Tables
from trimserve.text.mapped.tokenizer import MappedTokenizer

LETTERS = "abcd"


def mapped(tokenizer, path):
    content = tokenizer.to_str().encode()
    build_tables(content, hashlib.sha256(content).hexdigest()).write(path)
    return MappedTokenizer(Tables.read(HeldFile(path)), lambda: None)


def words_of(rng, count, letters=LETTERS, longest=9):
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)]


def unigram(rng):
    """Every score is one of four, so that many paths are equal, and each letter's is far below the others."""
    pieces = {word: -rng.choice((1.0, 1.5, 2.0, 2.5)) for word in words_of(rng, 90, longest=4)}
    pieces |= dict.fromkeys(LETTERS[:-1], -25.0) | {LETTERS[-1]: -31.0, "\u2581": -1.0}
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces.items()], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return tokenizer


def merges_of(rng, symbols, count):
    known, merges = list(symbols), []
    while len(merges) < count:
        pair = rng.choice(known), rng.choice(known)
        if pair not in merges and len("".join(pair)) < 7:
            merges.append(pair)
            known.append("".join(pair))
    vocab = {piece: place for place, piece in enumerate(dict.fromkeys(known))}
    return vocab, merges


def bpe(rng, **options):
    vocab, merges = merges_of(rng, LETTERS, 90)
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def whole_text_bpe(rng, *, crossing):
    """As Llama's: no pre-tokenizer, spaces are symbols, bytes for what is unknown and no unknown token."""
    vocab, merges = merges_of(rng, LETTERS, 60)
    vocab |= {"\u2581": len(vocab)} | {f"<0x{byte:02X}>": len(vocab) + 1 + byte for byte in range(256)}
    for one, other in [("\u2581", "a"), ("\u2581", "\u2581"), *[("b", "\u2581")] * crossing]:
        merges.insert(rng.randrange(len(merges)), (one, other))
        vocab[one + other] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def wordpiece(rng):
    """Pieces that lead into dead ends: a long one that fits, behind which nothing does."""
    pieces = {"[UNK]", *words_of(rng, 40, longest=4), *("##" + word for word in words_of(rng, 25, longest=3))}
    vocab = {piece: place for place, piece in enumerate(sorted(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


MADE = {
    "unigram": unigram,
    "bpe": bpe,
    "bpe, direct": lambda rng: bpe(rng, ignore_merges=True),
    "bpe, whole text": lambda rng: whole_text_bpe(rng, crossing=False),
    "bpe, across words": lambda rng: whole_text_bpe(rng, crossing=True),
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("seed", range(3))
def test_words_come_again_among_others_with_the_same_tokens(kind, seed, tmp_path):
    """Each word is segmented by itself, and stands in models with the pieces of any others."""
    rng = random.Random(seed)
    library = MADE[kind](rng)
    tokenizer = mapped(library, tmp_path / "t.safetensors")
    words = words_of(rng, 150) + words_of(rng, 30, LETTERS + "\u00e9x")
    for _ in range(500):
        text = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        found, expected = (one.encode(text) for one in (tokenizer, library))
        assert (found.ids, found.offsets) == (expected.ids, expected.offsets), text


def test_an_unknown_character_scores_below_the_lowest_piece_of_the_whole_vocab(tmp_path):
    """Else a letter that has a piece, but not in the model at hand, would be cheaper than it is."""
    long = "b" + "ab" * 7
    pieces = [("<unk>", 0.0), ("\u2581", -1.0), ("a", -25.0), ("b", -25.0), ("ab", -2.5), (long, -1.0)]
    library = Tokenizer(models.Unigram(pieces, 0, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = mapped(library, tmp_path / "t.safetensors")
    tokenizer._pieces._count = 1000  # so that a text gets a model of its own
    for text in (long, "ab" * 8, f"{long} {'ab' * 8}"):
        assert tokenizer.encode(text).tokens == library.encode(text).tokens


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_a_clean_word_needs_fewer_pieces_than_stand_in_it(kind, tmp_path):
    rng = random.Random(5)
    tokenizer = mapped(MADE[kind](rng), tmp_path / "t.safetensors")
    pieces = tokenizer._pieces._words
    prefix = "\u2581" if kind == "unigram" else ""
    clean = [prefix + word for word in words_of(rng, 40, longest=8)]
    fewer = sum(len(pieces.pieces(word)) < len(tokenizer._pieces._find([word])) for word in clean)
    assert fewer > (20 if kind != "bpe" else 0)  # all of a BPE piece's parts are kept
    unknown = set(pieces.pieces(prefix + "ab\u00e9").tolist())
    assert unknown >= set(tokenizer._pieces._find([prefix + "ab\u00e9"]).tolist())


def test_words_are_the_librarys_own(tmp_path):
    library = KINDS["byte_level_bpe"]()
    tokenizer = mapped(library, tmp_path / "t.safetensors")
    text = "  the cat's 12\u00bd \u4e16\u754c "
    expected = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]
    assert tokenizer._pieces._words.of(text) == expected
    assert tokenizer._pieces._words.of("x" * 65) is None  # hardly comes again
    literal = next(iter(library.get_added_tokens_decoder().values())).content
    assert tokenizer._pieces._words.of(f"a {literal} b") is None
