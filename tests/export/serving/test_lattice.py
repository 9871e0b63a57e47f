import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.gguf_files import Tensor, Written, random_tensor
from trimserve.files.gguf import read_gguf
from trimserve.files.quantized import BlockScheme, dequantize
from trimserve_export.serving.block_rows import quantize_rows
from trimserve_export.serving.lattice import has_levels, on_lattice, on_offset_lattice

SCHEMES = {"int4": BlockScheme(4), "int8": BlockScheme(8)}
pytestmark = pytest.mark.export


def q8_0(rows):
    """Rows as ggml makes them Q8_0: the largest number of a block becomes 127; a quarter of them less."""
    blocks = rows.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    whole = np.rint(blocks / scale[:, None].astype(np.float32)).clip(-127, 127).astype(np.int8)
    whole[::4] //= 3
    data = np.concatenate([scale[:, None].view(np.uint8).reshape(-1, 2), whole.view(np.uint8)], axis=1)
    return Tensor("t", "Q8_0", tuple(reversed(rows.shape)), data.tobytes())


def stored(kind, tmp_path, rows=40, width=256):
    normal = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    tensor = q8_0(normal) if kind == "Q8_0" else random_tensor("t", kind, (rows, width))
    return read_gguf(Written(tensors=[tensor]).write(tmp_path / "m.gguf")).tensors["t"]


@pytest.mark.parametrize(("kind", "name"), [("Q4_0", "int4"), ("Q8_0", "int8"), ("Q4_0", "int8")])
def test_blocks_of_a_gguf_file_are_kept_to_the_bit(kind, name, tmp_path):
    tensor, scheme = stored(kind, tmp_path), SCHEMES[name]
    rows = tensor.floats()
    blocks = quantize_rows(rows, scheme)
    assert np.array_equal(dequantize(blocks.integers, blocks.scales, rows.shape[1], scheme), rows)


def test_the_integers_are_those_of_the_file(tmp_path):
    tensor = stored("Q8_0", tmp_path)
    packed = np.asarray(tensor.mapped()).reshape(40, 8, 34)
    whole = packed[..., 2:].view(np.int8).astype(np.int16)
    blocks = quantize_rows(tensor.floats(), SCHEMES["int8"])
    scale = np.ascontiguousarray(packed[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    full = np.abs(whole).max(axis=-1) == 127
    assert np.array_equal(blocks.integers.astype(np.int16)[full] - 128, whole[full])
    assert np.array_equal(blocks.scales[full], scale[full])


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_numbers_have_no_lattice(name, dtype):
    rows = np.random.default_rng(0).standard_normal((512, 32)).astype(np.float32)
    if dtype == "bfloat16":
        rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    elif dtype == "float16":
        rows = rows.astype(np.float16).astype(np.float32)
    assert not on_lattice(rows, SCHEMES[name].bits)[0].any()


def test_zeros_and_what_is_no_number_are_left_alone():
    blocks = np.zeros((3, 32), np.float32)
    blocks[1, 3], blocks[2, 0] = np.nan, np.inf
    assert not on_lattice(blocks, 8)[0].any()
    assert on_lattice(np.full((2, 32), 0.5, np.float32), 4)[0].all()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_block_with_both_signs_of_its_largest_number_stays_in_range(name):
    rows = np.zeros((1, 32), np.float32)
    rows[0, :4] = (1.0, -1.0, 0.5, -0.25)
    blocks = quantize_rows(rows, SCHEMES[name])
    found = dequantize(blocks.integers, blocks.scales, 32, SCHEMES[name])
    assert np.abs(found - rows).max() <= np.abs(blocks.scales).max()


def offset_blocks(seed=0, count=500):
    """Numbers ``d q + m`` as Q4_1 has them: d and m in float16, the order of operations that of ggml."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(1e-4, 0.3, (count, 1)).astype(np.float16).astype(np.float32)
    minima = (rng.standard_normal((count, 1)) * 0.5).astype(np.float16).astype(np.float32)
    integers = rng.integers(0, 16, (count, 32)).astype(np.float32)
    return scales * integers + minima, scales, minima


def test_blocks_with_a_minimum_come_back_to_the_bit():
    blocks, _, _ = offset_blocks()
    found, scales, middles, integers = on_offset_lattice(blocks)
    assert found.all()
    assert integers.min() >= 0
    assert integers.max() <= 15
    made = (integers - 8).astype(np.float32) * scales[:, None] + middles[:, None]
    assert np.array_equal(made, blocks)


def test_blocks_of_one_number_of_few_levels_and_of_none():
    blocks, scales, minima = offset_blocks(1, 3)
    blocks[0] = minima[0]
    blocks[1] = np.where(np.arange(32) % 2, minima[1], minima[1] + 5 * scales[1])
    blocks[2, 3] = np.nextafter(blocks[2, 3], np.float32(9))
    found, _, _, _ = on_offset_lattice(blocks)
    assert found.tolist() == [True, True, False]
    assert not on_offset_lattice(np.full((1, 32), np.nan, np.float32))[0].any()


def test_levels_tell_four_bits_from_more():
    blocks, _, _ = offset_blocks()
    rows = blocks.reshape(-1, 64)
    assert has_levels(rows, 16)
    rows[7] = np.random.default_rng(2).standard_normal(64)
    assert not has_levels(rows, 16)
    assert has_levels(rows, 32)
