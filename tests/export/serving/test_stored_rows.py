"""Rows in blocks, found again in matrices of floats and brought into the form of MatMulNBits, to the bit."""

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir

from tests.support.gguf_files import Tensor, Written, random_blocks
from tests.support.quantized_graphs import matrices
from trimserve.files.ggml_blocks import PACKED
from trimserve.files.gguf import read_gguf
from trimserve.files.packed_rows import PackedRows
from trimserve.files.quantized import BlockScheme, dequantize
from trimserve_export.serving.quantize import quantization_of, quantize_graph
from trimserve_export.serving.stored_rows import StoredRows, carrier, stored_rows

pytestmark = pytest.mark.export
gguf = pytest.importorskip("gguf", reason="compares with the gguf package (pip install gguf)")
SHAPE = (48, 512)


def tensors(folder, kinds, shape=SHAPE, change=None):
    """Matrices of a GGUF file, one of each format."""
    written = []
    for seed, kind in enumerate(kinds):
        blocks = random_blocks(kind, shape, seed)
        if change is not None:
            change(blocks)
        written.append(Tensor(f"{kind}.{seed}", kind, tuple(reversed(shape)), blocks.tobytes()))
    return list(read_gguf(Written(tensors=written).write(folder / "m.gguf")).tensors.values())


def expected(tensor):
    """What the gguf package says that a tensor stands for."""
    kind = gguf.GGMLQuantizationType[tensor.kind.name]
    return gguf.dequantize(np.asarray(tensor.mapped()), kind)


def quantized(rows, tensors, folder, quantize, *, keeps=True):
    """The one matrix of a quantised graph ``x @ rows.T``: the product's node, and its numbers."""
    weight = ir.tensor(np.ascontiguousarray(rows.T), name="w")
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    net (float[n, {rows.shape[1]}] x) => (float[n, {len(rows)}] y)
    <float[{rows.shape[1]}, {len(rows)}] w> {{ y = MatMul(x, w) }}"""
    model = ir.from_onnx_text(text, initializers=[weight])
    ir.save(model, folder / "plain.onnx")
    (folder / "made").mkdir(exist_ok=True)
    path = quantize_graph(
        folder / "plain.onnx",
        folder / "made",
        quantization_of(quantize, keeps=keeps),
        has_head=False,
        stored=stored_rows(tensors),
    )
    ((node, numbers),) = matrices(ir.load(path).graph)
    return node, numbers


@pytest.mark.parametrize("kind", PACKED)
def test_a_matrix_keeps_its_numbers_to_the_bit(kind, tmp_path):
    (tensor,) = tensors(tmp_path, [kind])
    rows = expected(tensor)
    node, numbers = quantized(rows, [tensor], tmp_path, "int4")
    assert np.array_equal(numbers, rows)
    small = kind in ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K")
    assert node.attributes["bits"].as_int() == (4 if small else 8)
    assert node.attributes["block_size"].as_int() == (16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)


@pytest.mark.parametrize("kinds", [("Q4_1", "Q8_0"), ("Q4_K", "Q6_K"), ("Q5_1", "Q3_K", "Q4_0"), PACKED])
@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_rows_of_several_matrices_in_one_product_keep_theirs(kinds, quantize, tmp_path):
    """As a fused graph has queries, keys and values; the rows in any order."""
    chosen = tensors(tmp_path, kinds)
    rows = np.concatenate([expected(tensor) for tensor in chosen])
    rows = rows[np.random.default_rng(1).permutation(len(rows))]
    node, numbers = quantized(rows, chosen, tmp_path, quantize)
    assert np.array_equal(numbers, rows)
    assert node.attributes["bits"].as_int() == 8


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q2_K", "Q4_1", "Q5_1"])
def test_minima_that_no_float_moves_to_the_middle_stay_minima(kind, tmp_path):
    """A scale and a minimum of very different size: their sum has more bits than a float32."""
    place = {"Q2_K": 80}.get(kind, 0)

    def apart(blocks):
        flat = blocks.reshape(-1, {"Q4_K": 144, "Q5_K": 176, "Q2_K": 84, "Q4_1": 20, "Q5_1": 24}[kind])
        flat[::2, place : place + 2] = np.frombuffer(np.float16(2.0**-20 * 1.5).tobytes(), np.uint8)
        flat[::2, place + 2 : place + 4] = np.frombuffer(np.float16(1023.5).tobytes(), np.uint8)

    (tensor,) = tensors(tmp_path, [kind], change=apart)
    rows = expected(tensor)
    node, numbers = quantized(rows, [tensor], tmp_path, "int4")
    assert np.array_equal(numbers, rows)
    if kind in ("Q4_K", "Q4_1"):
        assert len(node.inputs) == 4  # zero points of 0 beside those of 8


def test_scales_and_minima_in_float16_stay_in_float16(tmp_path):
    (tensor,) = tensors(tmp_path, ["Q4_1"])
    node, numbers = quantized(expected(tensor), [tensor], tmp_path, "int4")
    stored = {name: value.dtype for name, value in node.graph.initializers.items() if value.shape == (48, 16)}
    assert [dtype for name, dtype in stored.items() if name.endswith("_minima")] == [ir.DataType.FLOAT16]
    assert [dtype for name, dtype in stored.items() if name.endswith("_scales")] == [ir.DataType.FLOAT16]
    assert np.array_equal(numbers, expected(tensor))


def test_more_bits_than_asked_for_are_rounded(tmp_path):
    (tensor,) = tensors(tmp_path, ["Q6_K"])
    node, numbers = quantized(expected(tensor), [tensor], tmp_path, "int4", keeps=False)
    assert node.attributes["bits"].as_int() == 4
    assert not np.array_equal(numbers, expected(tensor))


def test_a_matrix_with_one_other_number_is_not_found(tmp_path):
    chosen = tensors(tmp_path, ["Q4_K", "Q6_K"])
    rows = expected(chosen[0])
    assert StoredRows(tuple(chosen)).find(rows) is not None
    rows[3, 5] = np.nextafter(rows[3, 5], np.float32(9))
    assert StoredRows(tuple(chosen)).find(rows) is None
    assert StoredRows(tuple(chosen)).find(rows[:3].astype(np.float16)) is None
    assert StoredRows(tuple(chosen)).find(rows[:, :256]) is None


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 128), (4, 512), (8, 64), (3, 32), (4, 96)])
def test_any_zero_points_and_sizes_of_blocks(bits, size):
    """As GPTQ and AWQ have them: a zero point may be any integer, a block a whole row."""
    rng = np.random.default_rng(bits * size)
    shape = (7, 1536 // size)
    rows = PackedRows(
        bits,
        rng.integers(0, 1 << bits, (7, 1536), np.uint8),
        rng.uniform(0.01, 0.02, shape).astype(np.float16).astype(np.float32),
        rng.integers(0, 1 << bits, shape, np.uint8),
    )
    for least in (4, 8):
        made = carrier(rows, least)
        assert made.bits == (4 if least == 4 and bits <= 4 else 8)
        assert 1536 % made.block_size == 0
        assert made.block_size & (made.block_size - 1) == 0
        found = numbers_of(made)
        assert np.array_equal(found, rows.floats())


def numbers_of(made):
    scheme = BlockScheme(made.bits, made.block_size, zero_points=made.zero_points is not None)
    return dequantize(made.integers, made.scales, 1536, scheme, made.zero_points)
