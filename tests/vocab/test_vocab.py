import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimserve.errors import MismatchError, UnknownIdError
from trimserve.vocab.map import Reason, VocabMap

V = 37


def make_vocab(kept_ids, vocab_size=V):
    return VocabMap(np.array(kept_ids), np.full(len(kept_ids), Reason.PROFILE), vocab_size)


@st.composite
def vocabs(draw):
    size = draw(st.integers(1, 200))
    kept = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return make_vocab(sorted(kept), size)


@given(vocabs())
def test_compact_and_original_are_inverse(vocab):
    compact = np.arange(len(vocab))
    assert np.array_equal(vocab.to_compact(vocab.to_original(compact)), compact)
    assert np.array_equal(vocab.to_original(vocab.to_compact(vocab.kept_ids)), vocab.kept_ids)


@given(vocabs())
def test_kept_and_cold_ids_are_the_vocab(vocab):
    both = np.concatenate([vocab.kept_ids, vocab.cold_ids])
    assert sorted(both) == list(range(vocab.vocab_size))
    assert vocab.is_kept(vocab.kept_ids).all()
    assert not vocab.is_kept(vocab.cold_ids).any()
    assert vocab.cold_ids.dtype == np.int32


@given(vocabs(), st.data())
def test_slots_give_any_ids_back(vocab, data):
    size = vocab.vocab_size
    ids = np.array(data.draw(st.lists(st.integers(0, size - 1))), np.int64)
    cold = vocab.cold_ids.tolist()
    held = data.draw(st.lists(st.sampled_from(cold), unique=True)) if cold else []
    slotted = vocab.with_slots(ids, held)
    table = np.concatenate([vocab.kept_ids, slotted.cold_ids])
    assert np.array_equal(table[slotted.ids], ids)
    assert slotted.cold_ids[: len(held)].tolist() == held
    assert len(set(slotted.cold_ids.tolist())) == slotted.cold_ids.size
    assert not vocab.is_kept(slotted.cold_ids).any()
    assert slotted.cold_tokens == sum(int(id_) in cold for id_ in ids)
    # New slots appear in the order in which their ids do.
    fresh = [id_ for id_ in dict.fromkeys(ids.tolist()) if id_ in cold and id_ not in held]
    assert slotted.cold_ids[len(held) :].tolist() == fresh


def test_shapes_and_dtypes_are_those_the_graph_wants():
    vocab = make_vocab([2, 5, 36])
    ids = np.array([[2, 36, 7], [9, 7, 5]], np.int32)
    slotted = vocab.with_slots(ids)
    assert slotted.ids.tolist() == [[0, 2, 3], [4, 3, 1]]
    assert slotted.ids.dtype == np.int64
    assert slotted.cold_ids.tolist() == [7, 9]
    assert slotted.cold_ids.dtype == np.int32
    assert slotted.cold_tokens == 3
    compact = vocab.to_compact([[5], [2]])
    assert (compact.tolist(), compact.dtype) == ([[1], [0]], np.int64)
    assert vocab.to_original([1]).dtype == np.int32
    assert vocab.to_compact(36) == 2


def test_held_slots_stay_when_nothing_new_is_cold():
    slotted = make_vocab([2, 5]).with_slots([5, 2], [30, 9])
    assert slotted.cold_ids.tolist() == [30, 9]
    assert slotted.cold_tokens == 0
    again = make_vocab([2, 5]).with_slots([9, 30, 9], [30, 9])
    assert again.ids.tolist() == [3, 2, 3]


def test_empty_input():
    vocab = make_vocab([2])
    slotted = vocab.with_slots([])
    assert (slotted.ids.shape, slotted.ids.dtype, slotted.cold_ids.size) == ((0,), np.int64, 0)
    assert vocab.to_compact(np.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize("id_", [-1, V, 10**9, -(2**31)])
def test_ids_outside_the_vocab_are_refused(id_):
    vocab = make_vocab([2, 36])
    for method in (vocab.to_compact, vocab.with_slots, vocab.is_kept):
        with pytest.raises(UnknownIdError, match=r"outside the model's vocab \(0\.\.36\)"):
            method([2, id_])


def test_cold_and_compact_ids_out_of_range_are_refused():
    vocab = make_vocab([2, 36])
    with pytest.raises(UnknownIdError, match="token id 7 has no compact row"):
        vocab.to_compact([2, 7])
    for compact in (-1, 2):
        with pytest.raises(UnknownIdError, match="compact id"):
            vocab.to_original([compact])


@pytest.mark.parametrize("kept", [[], [3, 3], [5, 2], [-1, 4], [4, V], [2**32 + 5]])
def test_maps_that_are_none_are_refused(kept):
    with pytest.raises(MismatchError):
        make_vocab(kept)


def test_a_reason_for_each_id_is_needed():
    with pytest.raises(MismatchError, match="one reason for each"):
        VocabMap(np.array([1, 2]), np.array([0]), V)


def test_arrays_are_its_own_and_locked():
    kept = np.array([2, 5], np.int32)
    vocab = VocabMap(kept, np.zeros(2, np.uint8), V)
    kept[0] = 4  # the caller's array stays the caller's
    assert vocab.kept_ids.tolist() == [2, 5]
    with pytest.raises(ValueError, match="read-only"):
        vocab.kept_ids[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        vocab.vocab_size = 3
    assert vocab.kept_ids.dtype == np.int32
    assert vocab.reason.dtype == np.uint8


def test_everything_keeps_each_id_in_its_place():
    vocab = VocabMap.everything(5, "hash")
    assert vocab.kept_ids.tolist() == vocab.to_compact(range(5)).tolist() == [0, 1, 2, 3, 4]
    assert (vocab.vocab_size, vocab.tokenizer_sha256, vocab.cold_ids.size) == (5, "hash", 0)
