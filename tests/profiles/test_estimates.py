import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rounding import FLOAT64, gamma
from trimserve.profiles.estimates import expected_unseen, knee

documents = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=2, max_size=6)


@given(documents)
def test_expected_unseen_is_the_mean_over_all_ways_to_hold_one_document_back(texts):
    counts = np.bincount(np.concatenate(texts), minlength=9)
    holders = np.bincount(np.concatenate([sorted(set(text)) for text in texts]), minlength=9)
    sizes = range(len(texts))
    found = expected_unseen(counts / counts.sum(), holders, len(texts), sizes)
    for size, share in zip(sizes, found, strict=True):
        # Four logarithms of at most 5!, and a sum of nine shares.
        assert share == pytest.approx(by_trying_all(texts, size), abs=gamma(4 * 2 * 5 + 9 + 2, FLOAT64))


def by_trying_all(texts, size):
    """Unseen tokens over tokens, summed over each document held back and each choice of `size` others."""
    unseen = total = 0
    for place, text in enumerate(texts):
        others = texts[:place] + texts[place + 1 :]
        for chosen in itertools.combinations(others, size):
            seen = set(itertools.chain.from_iterable(chosen))
            unseen += sum(id_ not in seen for id_ in text)
            total += len(text)
    return unseen / total


def test_tokens_as_units_end_at_good_and_turing():
    counts = np.array([5, 1, 1, 0, 3, 2])
    found = expected_unseen(counts / 12, counts, 12, [0, 5, 11])
    assert found[0] == pytest.approx(1)
    assert found[-1] == pytest.approx(2 / 12)
    by_hand = sum(c / 12 * math.comb(12 - c, 5) / math.comb(11, 5) for c in counts.tolist() if c)
    assert found[1] == pytest.approx(by_hand)


def test_a_thousand_million_tokens_keep_their_digits():
    counts = np.array([1, 2, 3, 10**9 - 6])
    found = expected_unseen(counts / 10**9, counts, 10**9, [10**9 - 1, 5 * 10**8])
    # Four logarithms of 10^9!, each off by a unit in its last place, which exp makes a relative error.
    rounding = 4 * 2 * math.lgamma(10**9) * FLOAT64
    assert found[0] == pytest.approx(1e-9, rel=rounding)
    assert found[1] == pytest.approx(1e-9 * (1 + 2 / 2 + 3 / 4), rel=rounding)


def test_knee_is_where_the_slope_is_the_average_one():
    sizes = np.arange(0, 10_001)
    assert knee(sizes, np.sqrt(sizes)) == 2_500  # of sqrt(x) on 0..1: at 1/4
    assert knee(np.array([7]), np.array([1.0])) == 0
