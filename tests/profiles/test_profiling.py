import json
import math
import os
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.profiles import make_profile
from tests.support.realdata import TOKENIZERS, corpus_slices
from tests.support.rounding import FLOAT64, gamma
from tests.support.tiny_tokenizers import KINDS, TEXT, save_model_folder
from trimserve.corpus import documents
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.files import CorpusSource
from trimserve.errors import MismatchError, UsageError
from trimserve.files.tensors import read_header
from trimserve.model.resolve import resolve_model
from trimserve.profiles.merging import merge
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile

HOSTILE = [
    "",
    "   ",
    "日本語 😀 ไทย",
    "a\r\nb\r\n",
    TEXT,
    "x" * 500,
    "\n" * 9,
    "\u0000\u200d",
    "<|turn|>user",
]


def reference(folder, texts):
    """The counts that a profile should have, the plain way."""
    tokenizer = resolve_model(folder).tokenizer()
    found = Counter(id_ for text in texts for id_ in tokenizer.encode(text).ids)
    counts = np.zeros(resolve_model(folder).vocab_size, np.int64)
    counts[list(found)] = list(found.values())
    return counts


def test_counts_equal_the_plain_way(model_folder):
    counted = profile((), model_folder, texts=HOSTILE, progress=False)
    assert np.array_equal(counted.counts, reference(model_folder, HOSTILE))
    assert counted.counts.dtype == np.int64
    assert (counted.texts, counted.characters) == (len(HOSTILE), sum(map(len, HOSTILE)))
    assert counted.tokens == counted.counts.sum()
    assert counted.distinct == (counted.counts > 0).sum()
    assert counted.beyond_rows == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("before", [None, "false"])
def test_the_environment_of_the_process_stays_as_it_was(model_folder, monkeypatch, workers, before):
    """Another part of it tokenises, or forks, too."""
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
    found = dict(os.environ)
    profile((), model_folder, texts=HOSTILE, progress=False, workers=workers)
    assert dict(os.environ) == found


def test_files_count_like_the_texts_in_them(model_folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, "utf-8", newline="")
    records = [json.dumps({"t": text}) for text in HOSTILE if text]
    (tmp_path / "b.jsonl").write_text("\n".join(records), "utf-8")
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    counted = profile(paths, model_folder, text_column="t", progress=False)
    assert np.array_equal(counted.counts, reference(model_folder, [TEXT, *filter(None, HOSTILE)]))
    assert [source.name for source in counted.sources] == [str(path) for path in paths]
    single = profile(paths[0], model_folder)  # one path need not be in a list
    assert np.array_equal(single.counts, reference(model_folder, [TEXT]))


@settings(deadline=None, max_examples=40)
@given(text=st.text(alphabet="ab c\n\r.-é日1_", max_size=120), kind=st.sampled_from(sorted(KINDS)))
def test_a_document_in_parts_counts_like_the_whole(text, kind, model_folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MAX_CHARACTERS", 8)
        counted = profile((), model_folders[kind], texts=["x" + text], progress=False)
    assert counted.texts == 1
    assert np.array_equal(counted.counts, reference(model_folders[kind], ["x" + text]))


def test_ids_that_the_model_has_no_row_for_are_counted_apart(tmp_path):
    folder = save_model_folder("byte_level_bpe", tmp_path, vocab_size=200)
    counted = profile((), folder, texts=[TEXT])
    ids = np.array(resolve_model(folder).tokenizer().encode(TEXT).ids)
    assert counted.vocab_size == 200
    assert counted.beyond_rows == (ids >= 200).sum() > 0
    assert counted.tokens == (ids < 200).sum()
    assert counted.structural.max() < 200


def test_padding_rows_are_those_without_a_token(model_folders):
    counted = profile((), model_folders["byte_level_bpe"], texts=["a"])
    assert counted.padding_ids.tolist() == list(range(counted.vocab_size - 7, counted.vocab_size))


def test_texts_are_never_cut_at_the_tokenizers_own_limit(model_folders):
    counted = profile((), model_folders["wordpiece"], texts=["cat " * 100])
    assert counted.counts.tolist().count(100) == 1
    assert counted.counts[0] == 0  # nor padded


def test_saved_profile_comes_back_equal(model_folder, tmp_path):
    counted = profile((), model_folder, texts=HOSTILE)
    for stored in (counted, merge([counted, counted], weights=[1, 3])):
        stored.save(tmp_path / "p.safetensors")
        loaded = Profile.load(tmp_path / "p.safetensors")
        for name in Profile.__dataclass_fields__:
            left, right = getattr(stored, name), getattr(loaded, name)
            assert np.array_equal(left, right), name
        assert loaded.missing_mass == stored.missing_mass
        assert loaded.missing_mass_bound == stored.missing_mass_bound


def test_arrays_of_a_profile_cannot_be_changed(model_folder):
    counted = profile((), model_folder, texts=["a"])
    with pytest.raises(ValueError, match="read-only"):
        counted.counts[0] = 7


def test_missing_mass_is_the_share_of_hapaxes():
    counted = make_profile([5, 1, 1, 0, 3])
    assert counted.missing_mass == 2 / 10
    # By hand for N = 10^8 and delta = 0.05: sqrt(ln 40 / N) twice, once by sqrt 2.
    large = make_profile([10**8 - 1, 1])
    slack = (1 + 2**0.5) * math.sqrt(math.log(40) / 10**8)
    assert large.missing_mass_bound == pytest.approx(1e-8 + slack)
    assert counted.missing_mass_bound == 1.0  # a handful of tokens says nothing
    assert counted.document_missing_mass is None


def test_missing_mass_predicts_held_out_tokens():
    # A Zipf vocabulary, where the truth is known: how often do the bounds hold?
    random = np.random.default_rng(0)
    truth = 1 / np.arange(1, 5_001)
    truth /= truth.sum()
    likely = 0
    for counts in random.multinomial(20_000, truth, size=200):
        counted, unseen = make_profile(counts), truth[counts == 0].sum()
        assert counted.missing_mass == pytest.approx(unseen, rel=0.2)
        assert unseen < counted.missing_mass_bound
        assert counted.missing_mass < counted.missing_mass_likely < counted.missing_mass_bound
        likely += unseen < counted.missing_mass_likely
    assert 0.9 < likely / 200 < 1  # 0.95 in the limit, and no looser than that


def test_missing_mass_of_documents_is_what_each_alone_holds():
    # Three documents: [0 0 1], [0 2 2], [0 3]: 1, 2 2 and 3 would be unseen, 4 of 8 tokens.
    counted = make_profile([4, 1, 2, 1], texts=3, document_counts=np.array([3, 1, 1, 1]))
    assert counted.document_missing_mass == 4 / 8
    assert counted.missing_mass == 2 / 8


def test_coverage_is_a_share_of_occurrences():
    counted = make_profile([5, 1, 1, 0, 3])
    assert counted.coverage([0, 4]) == 0.8
    assert counted.coverage([]) == 0.0
    assert counted.coverage(np.arange(5)) == 1.0


counts = hnp.arrays(np.int64, 6, elements=st.integers(0, 50)).filter(lambda array: array.sum() > 0)


@given(counts, counts, counts, st.booleans())
def test_merge_is_associative_and_commutative(a, b, c, weighted):
    sources = [(CorpusSource(name, name, 1),) for name in "zyx"]
    parts = zip((a, b, c), sources, strict=True)
    x, y, z = (
        make_profile(n, sources=s, output_counts=n // 2, document_counts=np.minimum(n, 3)) for n, s in parts
    )
    if weighted:
        x = merge([x], weights=[2.0])
    variants = [merge([merge([x, y]), z]), merge([x, merge([y, z])]), merge([z, y, x])]
    for merged in variants:
        assert np.array_equal(merged.counts, a + b + c)
        assert np.array_equal(merged.output_counts, a // 2 + b // 2 + c // 2)
        assert np.array_equal(merged.document_counts, sum(np.minimum(part, 3) for part in (a, b, c)))
        assert merged.sources == variants[0].sources
        assert merged.missing_mass == pytest.approx(np.mean((a + b + c) == 1) * 6 / (a + b + c).sum())
        assert merged.effective_tokens == pytest.approx((a + b + c).sum())
        assert merged.mass == pytest.approx((a + b + c) / (a + b + c).sum())


@given(counts, counts, st.floats(0.01, 100), st.floats(0.01, 100))
def test_weighted_merge_follows_the_weights(a, b, left, right):
    merged = merge([make_profile(a), make_profile(b)], weights=[left, right])
    share = left / (left + right)
    expected = share * a / a.sum() + (1 - share) * b / b.sum()
    assert merged.mass == pytest.approx(expected)
    assert np.array_equal(merged.counts, a + b)
    # Law of total probability: a part's hapaxes that no other part has, weighted by the part.
    alone = (
        share * ((a == 1) & (b == 0)).sum() / a.sum() + (1 - share) * ((b == 1) & (a == 0)).sum() / b.sum()
    )
    assert merged.missing_mass == pytest.approx(alone)
    assert merged.effective_tokens <= (a.sum() + b.sum()) * (1 + gamma(8, FLOAT64))
    assert merged.coverage([1, 2]) == pytest.approx(expected[[1, 2]].sum())


def test_weights_like_the_token_counts_change_nothing():
    parts = [make_profile([5, 1, 1, 0, 3]), make_profile([0, 1, 9, 10, 1])]
    plain, weighted = merge(parts), merge(parts, weights=[10, 21])
    assert plain.shares is None
    assert weighted.mass == pytest.approx(plain.mass)
    assert weighted.missing_mass == pytest.approx(plain.missing_mass)
    assert weighted.effective_tokens == pytest.approx(31)


def test_shards_sum_to_the_whole(model_folder):
    whole = profile((), model_folder, texts=HOSTILE)
    shards = [profile((), model_folder, texts=[text, "x"]) for text in HOSTILE]
    merged = merge(shards)
    extra = (len(HOSTILE)) * reference(model_folder, ["x"])
    assert np.array_equal(merged.counts - extra, whole.counts)
    assert np.array_equal(merged.structural, whole.structural)


def test_merge_refuses_other_tokenizers_naming_both_hashes():
    with pytest.raises(MismatchError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        merge([make_profile([1, 2]), make_profile([1, 2], sha="b" * 64)])
    with pytest.raises(MismatchError, match=r"2 .*3 rows"):
        merge([make_profile([1, 2]), make_profile([1, 2, 3])])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -2], [1, math.inf], [math.nan, 1], [1, 2, 3]])
def test_merge_refuses_odd_weights(weights):
    with pytest.raises(UsageError, match=r"2 weights above 0|weights should be a list of numbers"):
        merge([make_profile([1, 2, 3])] * 2, weights=weights)


def test_merge_of_nothing_is_refused():
    with pytest.raises(UsageError, match="no profile"):
        merge([])


def test_merging_one_text_twice_is_said(caplog, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a cat")
    counted = profile(tmp_path / "a.txt", model_folder)
    merge([counted, counted])
    assert "counted more than once" in caplog.text
    assert str(tmp_path / "a.txt") in caplog.text


def test_corpus_without_newlines_is_warned_about(caplog, model_folders):
    profile((), model_folders["byte_level_bpe"], texts=["one line"])
    assert "no newline token was counted" in caplog.text
    caplog.clear()
    profile((), model_folders["byte_level_bpe"], texts=["two\nlines"])
    profile((), model_folders["wordpiece"], texts=["one line"])  # it never makes newline tokens
    assert not caplog.records


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_corpus_is_refused(model_folders, texts):
    with pytest.raises(UsageError, match="holds no text"):
        profile((), model_folders["wordpiece"], texts=texts)


def test_text_with_half_a_surrogate_pair_is_refused(model_folders):
    with pytest.raises(UsageError, match=r"text '\\ud83d' holds half a surrogate pair"):
        profile((), model_folders["wordpiece"], texts=["ok", "\ud83d"])


def test_workers_must_be_positive(model_folders):
    with pytest.raises(UsageError, match="workers should be from 1 to 1024"):
        profile((), model_folders["wordpiece"], texts=["a"], workers=0)


def test_damaged_profiles_are_refused(tmp_path, model_folders):
    file = tmp_path / "p.safetensors"
    profile((), model_folders["wordpiece"], texts=[TEXT]).save(file)
    good = file.read_bytes()
    with pytest.raises(UsageError, match="does not exist"):
        Profile.load(tmp_path / "none.safetensors")
    for damaged in (
        good[:-3],
        good[:100],
        b"",
        good.replace(b'"schema_version":"1"', b'"schema_version":"9"'),
    ):
        file.write_bytes(damaged)
        with pytest.raises(MismatchError, match=r"p\.safetensors"):
            Profile.load(file)
    file.write_bytes(good)
    changed = bytearray(good)
    changed[read_header(file)[0]["counts"].offset] ^= 1
    file.write_bytes(changed)
    with pytest.raises(MismatchError, match=r"should count .* tokens but counts"):
        Profile.load(file)


def test_profile_with_ids_outside_the_vocab_is_refused():
    with pytest.raises(MismatchError, match="ids up to 7"):
        make_profile([1, 2, 3], structural=np.array([0, 7], np.int32))
    with pytest.raises(MismatchError, match="at least 0"):
        make_profile([1, -2, 3])


@pytest.mark.realdata
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_corpora_are_counted_like_the_plain_way(data_dir, name, monkeypatch):
    folder = data_dir / "tokenizers" / name
    texts = list(chain.from_iterable(corpus_slices(data_dir, 6_000).values()))
    expected = reference(folder, texts)
    assert np.array_equal(profile((), folder, texts=texts).counts, expected)
    # In parts of two thousand characters: nothing changes, however the tokenizer treats newlines.
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 2_000)
    parts = list(Corpus([], texts=texts).documents())
    assert len(parts) > 1.5 * len(texts)
    assert np.array_equal(profile((), folder, texts=texts).counts, expected)


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["document", "line"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_files_of_all_corpora_are_counted_like_a_counter(data_dir, name, unit, tmp_path):
    texts = list(chain.from_iterable(corpus_slices(data_dir, 30_000).values()))
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_text(text, "utf-8", newline="")
    if unit == "line":
        texts = [line for text in texts for line in re.split("\r\n|\r|\n", text) if line.strip()]
    folder = data_dir / "tokenizers" / name
    encoded = resolve_model(folder).tokenizer().encode_batch_fast(texts)
    counted = profile(tmp_path, folder, unit=unit, workers=1, progress=False)
    expected = Counter(id_ for one in encoded for id_ in one.ids)
    assert {id_: int(counted.counts[id_]) for id_ in np.flatnonzero(counted.counts)} == expected
    expected = Counter(id_ for one in encoded for id_ in set(one.ids))
    found = counted.document_counts
    assert {id_: int(found[id_]) for id_ in np.flatnonzero(found)} == expected
    assert (counted.texts, counted.characters) == (len(texts), sum(map(len, texts)))
