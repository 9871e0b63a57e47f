import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from tests.support.tiny_tokenizers import KINDS
from trimserve.errors import UsageError
from trimserve.text.stops import StopStrings
from trimserve.text.streaming import _CONTEXT, StreamDecoder
from trimserve.text.tokenizer import load_tokenizer

HARD = (
    "the cat 😀😀 👨‍👩‍👧‍👦 世界你好 مرحبا بالعالم नमस्ते naïve saßen  two  spaces\n\n\ttab "
    "don't I'm ' s . , ! ? the <|end|> dog<think>sat</think> \ufffd\ufffd real </s><s> on"
)
REAL = ("bert-uncased", "gpt2", "mbert-cased", "phi3", "qwen2", "t5-small", "xlm-roberta")
TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
for _tokenizer in TOKENIZERS.values():
    _tokenizer.no_padding()
    _tokenizer.no_truncation()


def streamed(tokenizer: Tokenizer, pushes: list[list[int]]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(ids) for ids in pushes), decoder.flush()]


def split(ids: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    pushes, start = [], 0
    while start < len(ids):
        stop = start + rng.randint(0, 5)
        pushes.append(ids[start:stop])
        start = stop
    return pushes


def check(tokenizer: Tokenizer, ids: list[int], pushes: list[list[int]]) -> None:
    assert "".join(streamed(tokenizer, pushes)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_split_a_short_text_gives_the_same(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("the 😀 cat é").ids[:11]
    for cuts in range(1 << (len(ids) - 1)):
        pushes, start = [], 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or cuts >> (position - 1) & 1:
                pushes.append(ids[start:position])
                start = position
        check(tokenizer, ids, pushes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_pieces_add_up_to_the_decoded_text(kind, seed):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(HARD * 3).ids
    check(tokenizer, ids, split(ids, seed))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_add_up_for_any_ids(kind, data):
    tokenizer = TOKENIZERS[kind]
    rows = max(tokenizer.get_vocab().values()) + 5  # a few padding rows without a token
    ids = data.draw(st.lists(st.integers(0, rows), max_size=80))
    check(tokenizer, ids, split(ids, data.draw(st.integers(0, 99))))


def test_a_character_of_several_tokens_comes_whole_and_at_once():
    tokenizer = TOKENIZERS["byte_level_bpe"]
    ids = tokenizer.encode("a😀b").ids
    assert len(ids) == 6
    assert streamed(tokenizer, [[id_] for id_ in ids]) == ["a", "", "", "", "😀", "b", ""]


def test_a_cut_off_character_comes_as_the_library_decodes_it():
    tokenizer = TOKENIZERS["byte_level_bpe"]
    ids = tokenizer.encode("a😀").ids[:-1]
    assert streamed(tokenizer, [[id_] for id_ in ids]) == ["a", "", "", "", "\ufffd"]


def test_a_byte_run_is_held_until_it_ends():
    tokenizer = TOKENIZERS["sentencepiece_bpe"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    wrong = tokenizer.token_to_id("<0xFF>")
    the = tokenizer.token_to_id("t")
    assert streamed(tokenizer, [[the], ids, ids, [the]]) == ["t", "", "", "éét", ""]
    assert streamed(tokenizer, [[the], ids, [wrong], [the]]) == ["t", "", "", "\ufffd" * 3 + "t", ""]


@pytest.mark.parametrize("kind", ["byte_level_bpe", "sentencepiece_bpe", "wordpiece", "unigram"])
def test_text_comes_with_each_token(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("the cat sat on the dog", add_special_tokens=False).ids
    pieces = streamed(tokenizer, [[id_] for id_ in ids])
    assert pieces[-1] == ""
    assert sum(map(bool, pieces)) >= len(ids) - 1  # the first may be a bare space that decoding drops


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_stays_small(kind):
    tokenizer = TOKENIZERS[kind]
    decoder = StreamDecoder(tokenizer)
    for id_ in tokenizer.encode(HARD * 20).ids:
        decoder.push([id_])
        assert len(decoder._window) <= 2 * _CONTEXT + 1


def test_endless_broken_bytes_keep_the_window_small():
    tokenizer = TOKENIZERS["byte_level_bpe"]
    ids = tokenizer.encode("😀").ids[:2] * 100
    decoder = StreamDecoder(tokenizer)
    text = ""
    for id_ in ids:
        text += decoder.push([id_])
        assert len(decoder._window) <= 2 * _CONTEXT + 1
    assert text + decoder.flush() == tokenizer.decode(ids)


def test_a_decoder_that_changes_earlier_text_gives_all_at_the_end():
    tokenizer = KINDS["byte_level_bpe"]()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("e", 0, 1)])
    ids = tokenizer.encode("the fee").ids
    assert streamed(tokenizer, [[id_] for id_ in ids]) == [""] * len(ids) + [tokenizer.decode(ids)]


def test_a_tokenizer_without_a_decoder():
    tokenizer = KINDS["byte_level_bpe"]()
    tokenizer.decoder = None
    ids = tokenizer.encode("the cat sat").ids
    check(tokenizer, ids, [[id_] for id_ in ids])


def test_flush_starts_a_new_text():
    tokenizer = TOKENIZERS["sentencepiece_bpe"]
    ids = tokenizer.encode("the cat").ids
    decoder = StreamDecoder(tokenizer)
    first = decoder.push(ids) + decoder.flush()
    assert decoder.push(ids) + decoder.flush() == first == "the cat"


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["bert-uncased", "gpt2", "mbert-cased", "phi3", "qwen2", "t5-small", "xlm-roberta"]
)
def test_real_tokenizers_on_real_corpora(data_dir, name):
    tokenizer = load_tokenizer(data_dir / "tokenizers" / name / "tokenizer.json")
    rows = tokenizer.get_vocab_size() + 20
    rng = random.Random(0)
    texts = [HARD, "", *(path.read_text("utf-8")[2000:2600] for path in corpora(data_dir))]
    for seed, text in enumerate(texts):
        ids = tokenizer.encode(text).ids
        noisy = [rng.randrange(rows) if rng.random() < 0.3 else id_ for id_ in ids]
        for sequence in (ids, noisy):
            check(tokenizer, sequence, [[id_] for id_ in sequence])
            check(tokenizer, sequence, split(sequence, seed))


def corpora(data_dir: Path) -> list[Path]:
    return [path for path in sorted(data_dir.glob("corpora/*/*.txt")) if path.name != "SOURCE.txt"]


def released(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    cutter = StopStrings(stops)
    text = "".join(map(cutter.push, pieces))
    return text + cutter.flush(), cutter.stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["\n\n"], "a\n\nb\n\nc", ("a", "\n\n")),
        (["xyz"], "abxyab", ("abxyab", None)),
        (["bcd", "c"], "abcd", ("ab", "c")),  # complete first
        (["bc", "c"], "abc", ("a", "bc")),  # complete together: the longest
        (["aab"], "aaab", ("a", "aab")),  # begins inside a false start
        (["abab", "ba"], "xabab", ("xa", "ba")),
        (["😀"], "a😀b", ("a", "😀")),
        (["a"], "a", ("", "a")),
        ([], "abc", ("abc", None)),
    ],
)
def test_stop_strings_cut_the_same_however_the_text_is_split(stops, text, expected):
    assert released(stops, [text]) == expected
    assert released(stops, list(text)) == expected
    for cut in range(len(text)):
        assert released(stops, [text[:cut], text[cut:]]) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_stop_strings_equal_a_scan_of_every_prefix(stops, pieces):
    text = "".join(pieces)
    expected = (text, None)
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            expected = (text[: end - len(longest)], longest)
            break
    assert released(stops, pieces) == expected


def test_nothing_of_a_possible_stop_string_is_released_early():
    cutter = StopStrings(["<|end|>"])
    assert [cutter.push(piece) for piece in ("ab<", "|en", "d", "|x")] == ["ab", "", "", "<|end|x"]
    assert cutter.push("<|end|>tail") == ""
    assert (cutter.push("more"), cutter.flush(), cutter.stopped) == ("", "", "<|end|>")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="must not be empty"):
        StopStrings(["a", ""])
