import dataclasses
import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer, models

from tests.support.realdata import TOKENIZERS, corpus_slices
from tests.support.rounding import FLOAT64, gamma
from tests.support.tiny_tokenizers import TEXT, save_model_folder
from trimserve.corpus.files import CorpusSource
from trimserve.errors import MismatchError, UnknownIdError, UsageError
from trimserve.model.resolve import resolve_model
from trimserve.profiles.merging import merge
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile
from trimserve.selection.ranking import coverage_curve
from trimserve.selection.select_ids import select
from trimserve.vocab.map import Reason

V = 37
STRUCTURAL = [0, 1, 30]
PADDING = [35, 36]


def make_profile(counts, **options):
    arrays = {
        "structural": np.array(STRUCTURAL, np.int32),
        "padding_ids": np.array(PADDING, np.int32),
    }
    facts = {"texts": 1, "characters": 5, "beyond_rows": 0, "row_bytes": 10}
    facts["sources"] = (CorpusSource("a.txt", "c" * 64, 5),)
    return Profile(np.asarray(counts, np.int64), "a" * 64, "model", **(facts | arrays | options))


@pytest.fixture
def counted():
    """Ids 5..14 occur 100, 90, ... 10 times, the structural 1 once."""
    counts = np.zeros(V, np.int64)
    counts[5:15] = np.arange(100, 0, -10)
    counts[1] = 1
    return make_profile(counts)


def kept(vocab):
    return vocab.kept_ids.tolist()


def by_reason(vocab, reason):
    return vocab.kept_ids[vocab.reason == reason].tolist()


def test_coverage_takes_the_fewest_ids_that_reach_it(counted):
    # 551 occurrences: structural ids have 1, then 100 + 90 + 80 makes 271, plus 70 is 341 >= 330.6.
    vocab = select(counted, coverage=0.6, multiple_of=1)
    assert kept(vocab) == [0, 1, 5, 6, 7, 8, 30]
    assert vocab.rule["coverage"] == pytest.approx(341 / 551)
    assert kept(select(counted, coverage=271 / 551, multiple_of=1)) == [0, 1, 5, 6, 7, 30]
    assert kept(select(counted, coverage=0, multiple_of=1)) == STRUCTURAL
    assert select(counted, coverage=1, multiple_of=1).rule["coverage"] == 1.0


def test_default_is_coverage_of_999_per_mille(counted):
    vocab = select(counted, multiple_of=1)
    assert vocab.rule["options"]["coverage"] == 0.999
    assert kept(vocab) == kept(select(counted, coverage=0.999, multiple_of=1))


def test_top_k_counts_the_ids_that_must_stay(counted):
    vocab = select(counted, top_k=6, multiple_of=1)
    assert kept(vocab) == [0, 1, 5, 6, 7, 30]
    assert len(select(counted, top_k=30, multiple_of=1)) == 13  # no more ids occur


def test_min_count_limits_what_stays_for_its_frequency(counted):
    assert by_reason(select(counted, min_count=80, multiple_of=1), Reason.PROFILE) == [5, 6, 7]
    assert by_reason(select(counted, min_count=80, coverage=1, multiple_of=1), Reason.PROFILE) == [5, 6, 7]
    assert by_reason(select(counted, min_count=80, top_k=5, multiple_of=1), Reason.PROFILE) == [5, 6]


def test_max_bytes_is_never_exceeded(counted):
    assert len(select(counted, max_bytes=79, multiple_of=1)) == 7
    assert len(select(counted, max_bytes=79, multiple_of=4)) == 4
    assert len(select(counted, max_bytes=10_000, multiple_of=1)) == 13
    widths = make_profile(counted.counts, linear_widths=(4, 8))
    assert len(select(widths, max_bytes=120, multiple_of=4)) == 12
    with pytest.raises(UsageError, match="allow 120 bytes"):
        select(widths, max_bytes=110, multiple_of=4)
    with pytest.raises(UsageError, match="held no weights"):
        select(make_profile(counted.counts, row_bytes=0), max_bytes=100)


def test_rounding_up_fills_with_the_next_most_frequent_ids(counted):
    vocab = select(counted, coverage=0.6, multiple_of=4)
    assert len(vocab) == 8
    assert by_reason(vocab, Reason.FILL) == [9]
    # Ids that never occur come last, the lower first.
    vocab = select(counted, coverage=1, multiple_of=8)
    assert len(vocab) == 16
    assert by_reason(vocab, Reason.FILL) == [2, 3, 4]


def test_size_avoids_the_width_of_a_linear_layer(counted):
    widths = make_profile(counted.counts, linear_widths=(8, 12))
    vocab = select(widths, coverage=0.6, multiple_of=4)
    assert len(vocab) == 16
    assert vocab.rule["reasons"] == {"structural": 3, "profile": 4, "explicit": 0, "fill": 9}


def test_padding_rows_are_never_filled_in_but_structural_ones_stay(counted):
    vocab = select(counted, coverage=1, multiple_of=128)
    assert kept(vocab) == list(range(35))  # all that the tokenizer has
    padded = make_profile(counted.counts, structural=np.array([0, 36], np.int32))
    assert kept(select(padded, coverage=0, multiple_of=1)) == [0, 36]


def test_equally_frequent_ids_the_lower_first():
    counts = np.zeros(V, np.int64)
    counts[[20, 9, 33]] = 4
    vocab = select(make_profile(counts), top_k=5, multiple_of=1)
    assert by_reason(vocab, Reason.PROFILE) == [9, 20]


def test_weighted_profiles_rank_by_weight(counted):
    other = np.zeros(V, np.int64)
    other[20] = 1
    both = [counted, make_profile(other)]
    assert 20 not in kept(select(both, top_k=4, multiple_of=1))
    weighted = merge(both, weights=[1, 9])
    vocab = select(weighted, top_k=4, multiple_of=1)
    assert by_reason(vocab, Reason.PROFILE) == [20]
    assert vocab.rule["coverage"] == pytest.approx(0.9 + 0.1 / 551)
    # What occurs less than min_count stays out, however heavy it weighs.
    assert by_reason(select(weighted, min_count=2, multiple_of=1), Reason.PROFILE) == list(range(5, 15))


def test_explicit_ids_stay_unless_structural(counted):
    vocab = select(counted, coverage=0, keep_ids=[22, 1, 5], multiple_of=1)
    assert by_reason(vocab, Reason.EXPLICIT) == [5, 22]
    assert by_reason(vocab, Reason.STRUCTURAL) == STRUCTURAL
    assert vocab.rule["options"]["keep_ids"] == [1, 5, 22]


def test_rule_says_how_the_ids_were_chosen(counted):
    vocab = select(counted, top_k=6, multiple_of=1)
    assert vocab.rule["options"] == {"top_k": 6, "multiple_of": 1}
    assert vocab.rule["sources"] == [{"name": "a.txt", "sha256": "c" * 64, "bytes": 5}]
    assert vocab.rule["missing_mass"] == counted.missing_mass
    assert vocab.rule["tokens"] == 551
    assert sum(vocab.rule["reasons"].values()) == len(vocab)
    json.dumps(vocab.rule)
    assert (vocab.vocab_size, vocab.tokenizer_sha256) == (V, "a" * 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 0.9, "top_k": 5}, "coverage and top_k contradict"),
        ({"top_k": 5, "max_bytes": 5}, "top_k and max_bytes contradict"),
        ({"coverage": 1.01}, "from 0 to 1"),
        ({"coverage": float("nan")}, "from 0 to 1"),
        ({"coverage": -0.1}, "from 0 to 1"),
        ({"top_k": 0}, "top_k should be 1 or more"),
        ({"min_count": 0}, "min_count should be 1 or more"),
        ({"multiple_of": 0}, "multiple_of should be 1 or more"),
        ({"top_k": 2}, "top_k 2 is less than the 3 ids that must stay"),
        ({"max_bytes": 20, "multiple_of": 1}, "allow 30 bytes"),
    ],
)
def test_options_that_cannot_be_met_are_refused(counted, options, message):
    with pytest.raises(UsageError, match=message):
        select(counted, **options)


@pytest.mark.parametrize("id_", [-1, V])
def test_keep_ids_outside_the_vocab_are_refused(counted, id_):
    with pytest.raises(UnknownIdError, match=r"rows 0\.\.36"):
        select(counted, keep_ids=[id_])


# Of a sum of the shares of all ids.
ROUNDING = gamma(V + 2, FLOAT64)
many = hnp.arrays(np.int64, V, elements=st.integers(0, 9)).filter(lambda array: array.sum() > 0)
shares = st.floats(0, 1)


@given(many, shares, st.integers(1, 9), st.sets(st.integers(0, V - 1), max_size=4))
def test_properties_of_a_selection(counts, coverage, multiple_of, keep_ids):
    counts[PADDING] = 0
    assume(counts.sum() > 0)
    counted = make_profile(counts, linear_widths=(8, 18))
    vocab = select(counted, coverage=coverage, multiple_of=multiple_of, keep_ids=sorted(keep_ids))
    assert set(kept(vocab)) >= set(STRUCTURAL) | keep_ids
    assert counted.coverage(vocab.kept_ids) >= coverage - ROUNDING
    assert vocab.rule["coverage"] == counted.coverage(vocab.kept_ids)
    everything = set(range(V)) - set(PADDING) | keep_ids
    if set(kept(vocab)) != everything:
        assert len(vocab) % multiple_of == 0
        assert len(vocab) not in {8, 18}
    dropped = np.setdiff1d(sorted(everything), vocab.kept_ids)
    chosen = np.array(by_reason(vocab, Reason.PROFILE) + by_reason(vocab, Reason.FILL), np.int64)
    if dropped.size and chosen.size:
        assert counts[dropped].max() <= counts[chosen].min()
    assert not set(by_reason(vocab, Reason.FILL)) & set(PADDING)


@given(many, shares, shares)
def test_coverage_grows_with_what_is_asked(counts, one, other):
    counted = make_profile(counts)
    low, high = sorted((one, other))
    fewer, more = (select(counted, coverage=value, multiple_of=1) for value in (low, high))
    assert set(kept(fewer)) <= set(kept(more))


@given(many)
def test_coverage_is_monotone_in_k(counts):
    counted = make_profile(counts)
    covered = [select(counted, top_k=k, multiple_of=1).rule["coverage"] for k in range(3, V + 1)]
    assert covered == sorted(covered)
    sizes, curve = zip(*coverage_curve(counted), strict=True)
    assert list(curve) == sorted(curve)
    assert curve[-1] == 1.0 or counts[PADDING].any()
    assert list(sizes) == sorted(set(sizes))


def test_coverage_curve_doubles():
    counts = np.arange(5_000, 0, -1)
    points = coverage_curve(make_profile(counts, padding_ids=np.array([], np.int32)))
    assert [size for size, _ in points] == [128, 256, 512, 1024, 2048, 4096, 5000]
    assert points[-1][1] == 1.0


def test_keep_tokens_and_keep_file(tmp_path):
    folder = save_model_folder("byte_level_bpe", tmp_path / "model")
    counted = profile((), folder, texts=["?"])
    tokenizer = resolve_model(folder).tokenizer()
    (tmp_path / "keep.txt").write_text("Ġcat\n\nthe dog\n", "utf-8")
    vocab = select(counted, coverage=0, keep_tokens=["total", "Ġon"], keep_file=tmp_path / "keep.txt")
    wanted = {"Ġcat", "Ġon", *tokenizer.encode("the dog").tokens, *tokenizer.encode("total").tokens}
    assert {tokenizer.token_to_id(token) for token in wanted} <= set(kept(vocab))
    # The tokenizer is found by the name in the profile, and must be the one that was profiled.
    other = save_model_folder("wordpiece", tmp_path / "other")
    with pytest.raises(MismatchError, match="another tokenizer"):
        select(counted, keep_tokens=["cat"], model=other)
    with pytest.raises(UsageError, match=r"none\.txt does not exist"):
        select(counted, keep_file=tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        select(counted, keep_file=tmp_path / "bad.txt")
    with pytest.raises(UsageError, match="no token of it"):
        select(counted, keep_tokens=[""])


def test_every_tokenizer_goes_there_and_back(model_folder):
    counted = profile((), model_folder, texts=[TEXT])
    vocab = select(counted, coverage=0.9, multiple_of=1)
    assert set(counted.structural.tolist()) <= set(kept(vocab))
    assert_round_trip(vocab, resolve_model(model_folder).tokenizer(), ["日本 😀", TEXT, "", "zebra!"])


def assert_round_trip(vocab, tokenizer, texts):
    """Token ids survive compact ids and slots, and the text decodes as it does without trimming."""
    for encoding in tokenizer.encode_batch(texts):
        ids = np.array(encoding.ids, np.int64)
        slotted = vocab.with_slots(ids)
        table = np.concatenate([vocab.kept_ids, slotted.cold_ids])
        back = table[slotted.ids]
        assert np.array_equal(back, ids)
        assert slotted.cold_tokens == int((slotted.ids >= len(vocab)).sum())
        assert tokenizer.decode(back.tolist(), skip_special_tokens=False) == tokenizer.decode(
            encoding.ids, skip_special_tokens=False
        )


@pytest.mark.realdata
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_select_and_round_trip(data_dir, name):
    folder = data_dir / "tokenizers" / name
    slices = corpus_slices(data_dir, 12_000)
    tokenizer = resolve_model(folder).tokenizer()
    for texts in (slices["udhr-25langs"], slices["medquad-en"], slices["dialogue-zh-kdconv"]):
        counted = profile((), folder, texts=texts, progress=False)
        vocab = select(counted)
        assert len(vocab) % 128 == 0
        assert vocab.rule["coverage"] >= 0.999
        assert set(counted.structural.tolist()) <= set(kept(vocab))
        assert_round_trip(vocab, tokenizer, [*texts, *slices["udhr-25langs"][:5]])


def test_floors_hold_for_each_named_profile(counted):
    small = np.zeros(V, np.int64)
    small[20:24] = [6, 3, 1, 1]
    named = {"big": counted, "small": make_profile(small)}
    assert not {20, 21} & set(kept(select(named, coverage=0.6, multiple_of=1)))
    vocab = select(named, coverage=0.6, floors={"small": 0.8}, multiple_of=1)
    assert {20, 21} <= set(kept(vocab))
    assert not {22, 23} & set(kept(vocab))
    assert vocab.rule["profiles"]["small"] == pytest.approx(9 / 11)
    assert vocab.rule["options"]["floors"] == {"small": 0.8}
    assert vocab.rule["coverage"] >= 0.6
    # A size holds them too: floors first, the rest by frequency.
    vocab = select(named, top_k=7, floors={"small": 0.8}, multiple_of=1)
    assert kept(vocab) == [0, 1, 5, 6, 20, 21, 30]
    with pytest.raises(UsageError, match="top_k 4 is less than the 5 ids"):
        select(named, top_k=4, floors={"small": 0.8}, multiple_of=1)
    with pytest.raises(UsageError, match=r"floor smal=0\.8 names no profile \(named profiles: big, small\)"):
        select(named, floors={"smal": 0.8})
    with pytest.raises(UsageError, match="none: pass NAME=PROFILE"):
        select(counted, floors={"a": 0.8})
    with pytest.raises(UsageError, match=r"floor small=0\.9 cannot be met: .* cover 0\.5455"):
        select(named, floors={"small": 0.9}, min_count=5)
    with pytest.raises(UsageError, match=r"floors should be from 0 to 1, found 1\.5"):
        select(named, floors={"small": 1.5})


@given(many, many, shares, shares, st.integers(1, 9))
def test_floors_are_met_whatever_the_counts(a, b, coverage, floor, multiple_of):
    for counts in (a, b):
        counts[PADDING] = 0
    assume(a.sum() > 0 and b.sum() > 0)
    named = {"a": make_profile(a), "b": make_profile(b)}
    vocab = select(named, coverage=coverage, floors={"b": floor}, multiple_of=multiple_of)
    assert named["b"].coverage(vocab.kept_ids) >= floor - ROUNDING
    assert vocab.rule["coverage"] >= coverage - ROUNDING


def test_completions_have_a_coverage_of_their_own(counted):
    spoken = np.zeros(V, np.int64)
    spoken[[13, 14]] = [20, 10]  # rare ids, that only completions hold
    told = dataclasses.replace(counted, output_counts=spoken)
    assert select(told, coverage=0.6, multiple_of=1).rule["output_coverage"] == 0
    vocab = select(told, coverage=0.6, output_coverage=0.66, multiple_of=1)
    assert 13 in kept(vocab)
    assert vocab.rule["output_coverage"] == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="needs completions counted apart"):
        select(counted, output_coverage=0.9)


def test_dead_ids_fill_up_behind_all_others(tmp_path):
    """Piece 3 has a lower id than 4 and 5, but no merge makes it."""
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3, "ba": 4, "aba": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "a"), ("ab", "a")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counted = profile((), tmp_path, texts=["a", "b", "ab"], progress=False)
    assert counted.counts.tolist() == [1, 1, 1, 0, 0, 0]
    assert kept(select(counted, top_k=4, multiple_of=1)) == [0, 1, 2]  # the rest never occurs
    assert kept(select(counted, multiple_of=5)) == [0, 1, 2, 4, 5]
    assert kept(select(counted, multiple_of=6)) == [0, 1, 2, 3, 4, 5]
    # In a weighted merge, and where the model lies elsewhere.
    weighted = merge([counted, counted], weights=[1, 3])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere" / "tokenizer.json")
    assert kept(select(weighted, multiple_of=4, model=tmp_path / "elsewhere")) == [0, 1, 2, 4]
    assert kept(select(weighted, multiple_of=4)) == [0, 1, 2, 3]  # nothing tells that it is dead


def test_ids_of_few_documents_do_not_even_fill_up(counted):
    documents = np.minimum(counted.counts, 1)
    documents[5:9] = 3
    private = dataclasses.replace(counted, document_counts=documents, texts=4)
    vocab = select(private, coverage=1, min_docs=2, multiple_of=1)
    assert by_reason(vocab, Reason.PROFILE) == [5, 6, 7, 8]
    vocab = select(private, coverage=1, min_docs=2, multiple_of=128)
    assert not set(range(9, 15)) & set(kept(vocab))
    assert by_reason(vocab, Reason.FILL)  # ids that never occurred tell nothing about a document
    assert 9 in kept(select(private, coverage=1, min_docs=2, keep_ids=[9]))
    with pytest.raises(UsageError, match="needs the documents of each id"):
        select(counted, min_docs=2)
    with pytest.raises(UsageError, match="min_docs should be 1 or more"):
        select(private, min_docs=0)
