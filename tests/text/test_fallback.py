import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.folders import make_vocab
from tests.support.tiny_tokenizers import KINDS
from trimserve.errors import UnknownIdError
from trimserve.model.source import ModelSource
from trimserve.model.structural import structural_ids
from trimserve.text.fallback import Fallback
from trimserve.text.tokenizer import is_byte_token, load_tokenizer, special_ids

REAL = ("bert-uncased", "gpt2", "mbert-cased", "phi3", "qwen2", "t5-small", "xlm-roberta")


def fallback(tokenizer: Tokenizer, dropped: list[str]) -> Fallback:
    size = max(tokenizer.get_vocab().values()) + 1
    cold = {tokenizer.token_to_id(token) for token in dropped}
    assert None not in cold
    return Fallback(tokenizer, make_vocab([id_ for id_ in range(size) if id_ not in cold], size))


def pieces(tokenizer: Tokenizer, dropped: list[str], token: str) -> list[str]:
    ids = fallback(tokenizer, dropped).pieces(tokenizer.token_to_id(token))
    return [tokenizer.id_to_token(id_) for id_ in ids.tolist()]


def bpe(merges: list[tuple[str, str]], letters: str, **options) -> Tokenizer:
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocab = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(models.BPE(vocab, merges, **options))


def test_bpe_undoes_the_merge_of_the_lowest_rank():
    tokenizer = bpe([("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")], "abc")
    assert pieces(tokenizer, ["abc"], "abc") == ["a", "bc"]
    assert pieces(tokenizer, ["abc", "bc"], "abc") == ["a", "b", "c"]


def test_bpe_gives_what_the_tokenizer_would_give_without_the_token():
    tokenizer = KINDS["byte_level_bpe"]()
    state = json.loads(tokenizer.to_str())
    learned = [first + second for first, second in state["model"]["merges"]]
    for token in learned:
        if any(token in (first, second) for first, second in state["model"]["merges"]):
            continue  # taking a merge out changes others
        smaller = json.loads(tokenizer.to_str())
        smaller["model"]["merges"] = [m for m in smaller["model"]["merges"] if m[0] + m[1] != token]
        text = tokenizer.decode([tokenizer.token_to_id(token)])
        if "\ufffd" not in text:
            expected = Tokenizer.from_str(json.dumps(smaller)).encode(text).tokens
            assert pieces(tokenizer, [token], token) == expected


def test_sentencepiece_bpe_falls_back_to_bytes():
    tokenizer = KINDS["sentencepiece_bpe"]()
    letter = next(token for token in tokenizer.get_vocab() if token == "ß")
    assert pieces(tokenizer, [letter], letter) == ["<0xC3>", "<0x9F>"]
    assert pieces(tokenizer, ["▁"], "▁") == ["<0x20>"]


def test_bpe_without_bytes_refuses_a_lost_character():
    tokenizer = bpe([("a", "b")], "ab")
    with pytest.raises(UnknownIdError, match=r"token 'ab' \(id 2\)"):
        pieces(tokenizer, ["a", "ab"], "ab")


def test_a_token_that_no_merge_makes_is_spelled_by_characters():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ba": 2}, []))
    assert pieces(tokenizer, ["ba"], "ba") == ["b", "a"]


def test_unigram_takes_the_best_scored_pieces():
    vocab = [("<unk>", 0.0), ("abc", -1.0), ("a", -5.0), ("bc", -2.0), ("ab", -1.5), ("c", -4.0), ("b", -9.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    assert pieces(tokenizer, ["abc"], "abc") == ["ab", "c"]  # -5.5 against -7.0 and -18.0
    assert pieces(tokenizer, ["abc", "ab"], "abc") == ["a", "bc"]


def test_unigram_takes_bytes_only_where_no_piece_fits():
    tokenizer = KINDS["unigram_bytes"]()
    assert pieces(tokenizer, ["▁total", "o"], "▁total") == ["▁", "t", "<0x6F>", "t", "a", "l"]


def test_unigram_without_bytes_refuses_a_lost_character():
    tokenizer = KINDS["unigram"]()
    with pytest.raises(UnknownIdError, match="'▁total'"):
        pieces(tokenizer, ["▁total", "o"], "▁total")


def test_wordpiece_matches_longest_first_and_respects_the_prefix():
    vocab = {"[UNK]": 0, "##ing": 1, "##i": 2, "##ng": 3, "s": 4, "sing": 5, "ing": 6, "##sing": 7, "##s": 8}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    assert pieces(tokenizer, ["sing"], "sing") == ["s", "##ing"]
    assert pieces(tokenizer, ["sing", "##ing"], "sing") == ["s", "##i", "##ng"]
    assert pieces(tokenizer, ["##sing"], "##sing") == ["##s", "##ing"]


def test_wordpiece_takes_a_shorter_piece_where_the_longest_is_a_dead_end():
    vocab = {"[UNK]": 0, "ab": 1, "a": 2, "##bc": 3, "abc": 4, "##c": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    assert pieces(tokenizer, ["abc", "##c"], "abc") == ["a", "##bc"]


def test_wordpiece_refuses_what_cannot_be_spelled():
    tokenizer = KINDS["wordpiece"]()
    with pytest.raises(UnknownIdError, match="'dog'"):
        pieces(tokenizer, ["dog", "##og"], "dog")


def test_a_word_level_token_has_no_parts():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "aa": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnknownIdError, match="'aa'"):
        pieces(tokenizer, ["aa"], "aa")


def test_a_padding_row_cannot_be_spelled():
    tokenizer = KINDS["byte_level_bpe"]()
    size = tokenizer.get_vocab_size() + 3
    with pytest.raises(UnknownIdError, match="None"):
        Fallback(tokenizer, make_vocab(range(size - 1), size)).pieces(size - 1)


def test_a_special_token_is_no_piece_of_a_word():
    tokenizer = KINDS["wordpiece"]()
    tokenizer.add_special_tokens(["c"])
    with pytest.raises(UnknownIdError):
        pieces(tokenizer, ["cat"], "cat")


def test_split_replaces_cold_tokens_and_counts_their_pieces():
    tokenizer = KINDS["wordpiece"]()
    split = fallback(tokenizer, ["cat", "sat"])
    ids = np.array(tokenizer.encode("the cat sat").ids[:5], np.int32)
    cold = np.isin(ids, [tokenizer.token_to_id("cat"), tokenizer.token_to_id("sat")])
    longer, repeats = split.split(ids, cold)
    assert longer.dtype == np.int32
    tokens = [tokenizer.id_to_token(id_) for id_ in longer.tolist()]
    assert tokens == ["[CLS]", "the", "c", "##at", "s", "##at", "[SEP]"]
    assert repeats.tolist() == [1, 1, 2, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_with_structural_ids_alone_every_token_is_spelled_or_refused(kind, model_folders):
    source = ModelSource(kind, None, model_folders[kind])
    tokenizer = source.tokenizer()
    spelled, refused = check_all(tokenizer, structural_ids(source), source.vocab_size)
    assert spelled + refused > 0
    if kind in ("byte_level_bpe", "sentencepiece_bpe", "unigram_bytes"):
        assert refused == 0


def check_all(tokenizer: Tokenizer, kept_ids: np.ndarray, size: int, step: int = 1) -> tuple[int, int]:
    """Split every `step`-th cold token and compare its bytes; how many were spelled and refused."""
    vocab = make_vocab(kept_ids, size)
    split = Fallback(tokenizer, vocab)
    counts = [0, 0]
    for cold_id in vocab.cold_ids[::step].tolist():
        if tokenizer.id_to_token(cold_id) is None:
            continue
        try:
            ids = split.pieces(cold_id)
        except UnknownIdError:
            counts[1] += 1
            continue
        counts[0] += 1
        assert vocab.is_kept(ids).all()
        spelling = b"".join(token_bytes(tokenizer, id_, n > 0) for n, id_ in enumerate(ids.tolist()))
        assert spelling == token_bytes(tokenizer, cold_id, False)
    return counts[0], counts[1]


# A character of the byte-level alphabet -> its byte (bytes_to_unicode of GPT-2's encoder.py).
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_OF = {chr(byte): byte for byte in _printable} | {chr(256 + n): byte for n, byte in enumerate(_others)}


def token_bytes(tokenizer: Tokenizer, id_: int, inside: bool) -> bytes:
    """The bytes a token stands for, straight from its spelling: a naive reference."""
    token = tokenizer.id_to_token(id_)
    if is_byte_token(token):
        return bytes([int(token[3:5], 16)])
    if "ByteLevel" in str(tokenizer.decoder):
        return bytes(BYTE_OF[character] for character in token)
    if "WordPiece" in str(tokenizer.decoder):
        assert not inside or token.startswith("##")
        return token.removeprefix("##" if inside else "").encode()
    return token.replace("▁", " ").encode()


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_split_what_a_domain_does_not_keep(data_dir, name):
    path = data_dir / "tokenizers" / name / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    size = max(tokenizer.get_vocab().values()) + 1
    text = (data_dir / "corpora" / "gsm8k-en" / "text.txt").read_text("utf-8")[:200_000]
    domain = np.unique(tokenizer.encode(text).ids)
    special = np.array(sorted(special_ids(tokenizer)), np.int64)
    vocab = tokenizer.get_vocab()
    alphabet = [vocab[token] for token in vocab if len(token.removeprefix("##")) == 1 or is_byte_token(token)]
    kept = np.unique(np.concatenate([domain, special, alphabet]))
    spelled, refused = check_all(tokenizer, kept[kept < size], size, step=1 + size // 5_000)
    if name in ("gpt2", "qwen2", "phi3"):
        assert refused == 0
    assert spelled > 50 * refused
