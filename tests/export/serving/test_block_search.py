"""Four bits chosen by error: what they stand for, by the formula, and by ONNX Runtime's kernel."""

import numpy as np
import pytest

pytest.importorskip("torch")

from trimserve.files.quantized import BlockScheme, dequantize
from trimserve_export.serving.block_rows import quantize_rows
from trimserve_export.serving.block_search import SearchedBlocks, search_blocks

pytestmark = pytest.mark.export

SCHEME = BlockScheme(4, zero_points=True)
RANDOM = np.random.default_rng(3)


def floats(blocks: SearchedBlocks, width: int) -> np.ndarray:
    """What the blocks stand for, by the formula in the module's docstring."""
    if blocks.middles is None:
        return dequantize(blocks.integers, blocks.scales, width, SCHEME, blocks.zero_points)
    low, high = blocks.integers & 15, blocks.integers >> 4
    integers = np.stack([low, high], axis=-1).reshape(*blocks.scales.shape, 32).astype(np.float32)
    rows = (integers - 8) * blocks.scales[..., None] + blocks.middles[..., None].astype(np.float32)
    return rows.reshape(len(rows), -1)[:, :width]


def error(rows: np.ndarray, found: np.ndarray, moments: np.ndarray | float = 1.0) -> float:
    return float((moments * (rows.astype(np.float64) - found) ** 2).sum())


@pytest.mark.parametrize("width", [32, 576, 48, 80, 40])
def test_the_error_is_well_below_that_of_the_largest_number(width):
    rows = RANDOM.standard_normal((64, width)).astype(np.float32)
    nearest = quantize_rows(rows, BlockScheme(4))
    plain = error(rows, dequantize(nearest.integers, nearest.scales, width, BlockScheme(4)))
    assert error(rows, floats(search_blocks(rows, None), width)) < 0.9 * plain


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_on_a_lattice_with_minima_come_out_as_they_went_in(dtype):
    """Q4_1's blocks: integers of 0 to 15, both ends taken, a scale and a minimum in fp16."""
    integers = RANDOM.integers(0, 16, (70, 4, 32))
    integers[..., 3], integers[..., 9] = 0, 15
    scales = RANDOM.random((70, 4, 1)).astype(np.float16) / 64
    rows = (integers * scales.astype(np.float32) - scales.astype(np.float32) * 7.3).astype(dtype)
    minima = rows.astype(np.float32).reshape(70, 4, 32).min(axis=-1)
    found = search_blocks(rows.reshape(70, 128), None)
    assert found.middles is not None
    # The minimum is stored in fp16, a scale is rounded: nothing like a step.
    bound = np.abs(minima).max() * 2.0**-11 + np.abs(rows).max() * 2.0**-9 * (dtype == np.float16) + 1e-6
    assert np.abs(floats(found, 128) - rows.reshape(70, 128)).max() <= bound
    without = search_blocks(rows.reshape(70, 128), None, minima=False)
    assert without.middles is None
    assert error(rows.reshape(70, 128), floats(without, 128)) > 10 * error(
        rows.reshape(70, 128), floats(found, 128)
    )


@pytest.mark.parametrize("half", [False, True])
def test_blocks_of_q4_0_keep_their_integers(half):
    """Integers of -8 to 7, one end taken at most, a scale of either sign in fp16; others are searched."""
    integers = RANDOM.integers(-7, 8, (70, 4, 32))
    integers[..., 5] = -8
    signs = RANDOM.choice([-1, 1], (70, 4, 1))
    scales = (signs * (1 + RANDOM.random((70, 4, 1))) / 64).astype(np.float16).astype(np.float32)
    rows = (integers * scales).astype(np.float32).reshape(70, 128)
    rows[3, 32:64] = 0
    rows[5, :32] = RANDOM.standard_normal(32)
    found = search_blocks(rows, None, half=half)
    assert found.middles is None
    assert found.scales.dtype == (np.float16 if half else np.float32)
    kept = np.ones((70, 128), bool)
    kept[5, :32] = False
    back = floats(found, 128)
    assert np.array_equal(back[kept], rows[kept])
    weighted = search_blocks(rows, RANDOM.random(128).astype(np.float32), half=half)
    assert np.array_equal(floats(weighted, 128)[kept], rows[kept])
    rows[:5] = RANDOM.standard_normal((5, 128))
    rows[6:] = RANDOM.standard_normal((64, 128))
    searched = floats(search_blocks(rows, None, half=half), 128)
    assert np.array_equal(back[5, :32], searched[5, :32])


def test_any_weights_take_zero_points_which_cost_nothing_to_multiply_with():
    assert search_blocks(RANDOM.standard_normal((64, 96)).astype(np.float32), None).middles is None


def test_moments_move_the_error_to_where_inputs_are_small():
    rows = RANDOM.standard_normal((64, 128)).astype(np.float32)
    moments = np.where(np.arange(128) % 4 == 0, 100.0, 1.0).astype(np.float32)
    plain, weighted = (floats(search_blocks(rows, given), 128) for given in (None, moments))
    assert error(rows, weighted, moments) < 0.85 * error(rows, plain, moments)
    assert error(rows, weighted) > error(rows, plain)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((3, 64), np.float32),
        np.full((3, 64), 0.25, np.float32),
        np.full((3, 64), -1e-30, np.float32),
        np.full((3, 64), 3e4, np.float32),
        np.eye(64, dtype=np.float32),
    ],
    ids=["zeros", "equal", "tiny", "large", "one"],
)
def test_odd_blocks_stay_finite_and_close(rows):
    found = floats(search_blocks(rows, None), 64)
    assert np.abs(found - rows).max() <= np.abs(rows).max() / 30 + 1e-30


def test_rows_do_not_depend_on_each_other():
    rows = RANDOM.standard_normal((40, 96)).astype(np.float32)
    whole, part = search_blocks(rows, None), search_blocks(rows[7:9], None)
    np.testing.assert_array_equal(whole.integers[7:9], part.integers)
    np.testing.assert_array_equal(whole.scales[7:9], part.scales)


@pytest.mark.parametrize("moments", [np.zeros(64, np.float32), np.full(64, np.inf, np.float32)])
def test_moments_that_say_nothing_are_not_used(moments):
    rows = RANDOM.standard_normal((4, 64)).astype(np.float32)
    np.testing.assert_array_equal(search_blocks(rows, moments).integers, search_blocks(rows, None).integers)
