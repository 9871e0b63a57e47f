"""The bounds that numbers are compared within: any order of sums lies inside, a neighbouring row outside."""

import numpy as np
import pytest

from tests.support.rounding import (
    FLOAT16,
    assert_within,
    chain_bound,
    change_of_outputs,
    gamma,
    model_bound,
    product_bound,
)

RANDOM = np.random.default_rng(0)
# Large numbers that nearly cancel: a product is small beside the sum of its terms.
HIDDEN = (RANDOM.standard_normal((5, 48)) * 100).astype(np.float32)
ROWS = RANDOM.standard_normal((37, 48)).astype(np.float32)


def added_in_turn(left: np.ndarray, right: np.ndarray, order: np.ndarray, lanes: int = 1) -> np.ndarray:
    """The product in float32, its terms added in an order of their own, in as many sums side by side."""
    terms = (left[:, order, None] * right[None, order]).astype(np.float32)
    parts = [np.cumsum(terms[:, lane::lanes], axis=1, dtype=np.float32)[:, -1] for lane in range(lanes)]
    return np.cumsum(np.stack(parts, 1), axis=1, dtype=np.float32)[:, -1]


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_any_order_of_a_products_sums_is_within_its_bound(lanes):
    bound = product_bound(HIDDEN, ROWS.T)
    expected = HIDDEN.astype(np.float64) @ ROWS.T.astype(np.float64)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(48)
        found = added_in_turn(HIDDEN, ROWS.T, order, lanes)
        assert_within(found, expected, bound, rows=1)
        assert not np.array_equal(found, added_in_turn(HIDDEN, ROWS.T, np.arange(48)[::-1], lanes))


def test_two_products_in_a_row_are_within_the_bound_of_both():
    square = RANDOM.standard_normal((48, 48)).astype(np.float32)
    exact = HIDDEN.astype(np.float64) @ square.astype(np.float64) @ ROWS.T.astype(np.float64)
    assert_within((HIDDEN @ square) @ ROWS.T, exact, chain_bound(HIDDEN, square, ROWS.T), rows=1)
    assert_within(HIDDEN @ (square @ ROWS.T), exact, chain_bound(HIDDEN, square, ROWS.T), rows=1)


@pytest.mark.parametrize("row", [0, 17, 36])
def test_one_wrong_row_is_beyond_the_bound(row):
    expected, bound = HIDDEN @ ROWS.T, product_bound(HIDDEN, ROWS.T)
    found = expected.copy()
    found[:, row] = expected[:, row - 1]
    with pytest.raises(AssertionError, match=r"5 of 185 numbers lie beyond their bound; worst at \(\d, "):
        assert_within(found, expected, bound, rows=1)
    for wrong in (np.nan, np.inf):
        found[0, row] = wrong
        with pytest.raises(AssertionError, match="beyond"):
            assert_within(found, expected, np.inf, rows=None)
    with pytest.raises(AssertionError, match="expected"):
        assert_within(expected[:, :1], expected, bound, rows=None)


def test_a_bound_that_cannot_see_a_neighbouring_row_is_refused():
    expected = HIDDEN @ ROWS.T
    with pytest.raises(AssertionError, match="could be their neighbours"):
        assert_within(expected, expected, np.ptp(expected), rows=1)
    expected[:, 4] = expected[:, 3]
    with pytest.raises(AssertionError, match=r"rows \[4\]"):
        assert_within(expected, expected, product_bound(HIDDEN, ROWS.T), rows=1)
    assert_within(expected, expected, product_bound(HIDDEN, ROWS.T), rows=None)


def test_infinities_and_nans_are_equal_to_themselves_alone():
    numbers = np.array([-np.inf, np.nan, 1, np.inf])
    assert_within(numbers, numbers, 0, rows=None)
    with pytest.raises(AssertionError, match="2 of 4"):
        assert_within(np.array([np.inf, np.nan, 1, -np.inf]), numbers, 1e300, rows=None)


def test_gamma_counts_roundings():
    assert gamma(0) == 0
    assert gamma(1) > 2.0**-24
    with pytest.raises(AssertionError, match="leave no digit"):
        gamma(2048, FLOAT16)


def test_a_models_bound_holds_its_numbers_in_single_precision_and_its_weights_stay():
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (torch.nn.Linear(16, 24), torch.nn.LayerNorm(24), torch.nn.GELU(), torch.nn.Linear(24, 37))
        model, inputs = torch.nn.Sequential(*layers).eval(), torch.randn(7, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bound = model_bound(model, lambda model: model(inputs))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = model(inputs)
    assert_within(found, model.double()(inputs.double()), bound, rows=-1)
    assert bound < 1e-3 * found.abs().max()
    assert change_of_outputs(model, lambda model: model(inputs.double()), lambda weight, _: 0 * weight) == 0
