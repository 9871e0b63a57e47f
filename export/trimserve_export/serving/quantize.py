"""Quantise a servable graph: each product with a constant matrix becomes a MatMulNBits (`--quantize`).

The integers are those of ONNX Runtime's own quantiser (round to nearest, symmetric, no calibration), called
a slice of a matrix at a time, so that peak memory is that of the result. Every product is treated alike, the
vocab head too, also where it is the embedding: its rows are quantised into a matrix of their own, and the
embedding stays the table of floats it is. That stores a tied matrix a second time, in 5 bits a weight
(int4) beside its 32, and is still the cheaper way where it counts: `Gather` touches only the rows of the
tokens at hand, so the table costs file pages and no memory, the input is not rounded, and cold embedding
rows are the checkpoint's own. One table for both (GatherBlockQuantized over the head's integers) would
save those file bytes, at the price of rounding every layer's input.

Rows are quantised independently of each other, so what is cut before quantising equals what would be
cut after it: kept and cold rows hold the integers of the untrimmed quantised model.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError, require
from trimserve.files.quantized import BlockScheme, BlockSpecs, block_specs
from trimserve.files.tensors import TensorSpec, map_tensor, to_float32
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.nodes import NodeWriter, take_over
from trimserve_export.graphs.reading import read_exported
from trimserve_export.graphs.values import describe
from trimserve_export.graphs.writing import ALIGNMENT
from trimserve_export.serving.lattice import on_lattice

logger = logging.getLogger(__name__)

SCHEMES = {"int4": BlockScheme(bits=4), "int8": BlockScheme(bits=8)}
_CONTRIB = "com.microsoft"
_SLICE_BYTES = 16 << 20
_DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
Matrix = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised rows: uint8 (n, blocks, block bytes), and scales (n, blocks) in the dtype of the rows."""

    integers: npt.NDArray[np.uint8]
    scales: Matrix


def quantize_rows(rows: Matrix, scheme: BlockScheme) -> Blocks:
    """Quantise each row of a matrix by itself.

    Args:
        rows: float32 or float16 (n, H); may be a transposed view of a mapped file.
        scheme: see `BlockScheme`.
    """
    count, width = rows.shape
    shape = (count, scheme.blocks(width))
    made = Blocks(np.empty((*shape, scheme.block_bytes), np.uint8), np.empty(shape, rows.dtype))
    step = max(1, _SLICE_BYTES // (rows.itemsize * width))
    for start in range(0, count, step):
        part = slice(start, start + step)
        # The kernel reads the memory behind the array and ignores its strides.
        columns = np.ascontiguousarray(rows[part].T)
        made.integers[part], made.scales[part], _ = _quantizer(scheme).qbits_block_quant(columns)
        if rows.dtype == np.float32 and width % scheme.block_size == 0:
            _keep_lattice(rows[part], made.integers[part], made.scales[part], scheme)
    return made


def _keep_lattice(rows: Matrix, integers: Matrix, scales: Matrix, scheme: BlockScheme) -> None:
    """Give blocks that were quantised before the scale and the integers that they had, in place."""
    blocks = np.ascontiguousarray(rows).reshape(-1, scheme.block_size)
    found, known, whole = on_lattice(blocks, scheme.bits)
    shifted = (whole[found] + (1 << (scheme.bits - 1))).astype(np.uint8)
    if scheme.bits == 4:
        shifted = shifted[:, ::2] | (shifted[:, 1::2] << np.uint8(4))
    integers.reshape(-1, scheme.block_bytes)[found] = shifted
    scales.reshape(-1)[found] = known[found]


@cache
def _quantizer(scheme: BlockScheme) -> Any:  # noqa: ANN401 - onnxruntime has no types
    root = logging.getLogger()
    silent = logging.NullHandler()
    root.addHandler(
        silent
    )  # the module calls logging.basicConfig, which does nothing to a root with a handler
    try:
        module = require(
            "onnxruntime.quantization.matmul_nbits_quantizer", extra="cpu", purpose="export --quantize"
        )
    finally:
        root.removeHandler(silent)
    config = module.DefaultWeightOnlyQuantConfig(
        block_size=scheme.block_size, is_symmetric=True, bits=scheme.bits
    )
    return module.DefaultWeightOnlyQuantizer(config)


def quantize_graph(source: Path, output: Path, scheme: BlockScheme, *, has_head: bool) -> Path:
    """Quantise every product of a servable graph with a constant matrix.

    Args:
        source: the servable graph.
        output: the folder for a graph of the same name and its data; not the source's folder.
        scheme: see `BlockScheme`.
        has_head: the graph has a vocab head, which must be among the products.

    Returns:
        The path of the quantised graph.

    Raises:
        UnsupportedModelError: see `quantize_products`.
    """
    model = read_exported(source)
    quantize_products(model, scheme, has_head=has_head)
    path = output / source.name
    ir.save(model, path, external_data=f"{path.name}_data", alignment=ALIGNMENT)
    return path


def quantize_products(model: ir.Model, scheme: BlockScheme, *, has_head: bool) -> None:
    """Quantise every product of a servable graph with a constant matrix, in place.

    Args:
        model: the servable graph.
        scheme: see `BlockScheme`.
        has_head: see `quantize_graph`.

    Raises:
        UnsupportedModelError: the head, or all of the body, has no product that can be quantised.
    """
    head = find_head(model.graph).product if has_head else None
    products = {node: found for node in model.graph if (found := _product(node)) is not None}
    if head is not None and head not in products:
        raise UnsupportedModelError(
            f"{describe(head)}, the vocab head, cannot be quantised: export without it."
        )
    if not products.keys() - {head}:
        raise UnsupportedModelError("the graph has no product with a constant matrix: nothing to quantise.")
    weights = _Weights(model.graph, scheme)
    for node, product in products.items():
        _replace(model.graph, node, product, weights)
    model.opset_imports.setdefault(_CONTRIB, 1)
    RemoveUnusedNodesPass()(model)
    logger.info("quantised %d products to %d bits", len(products), scheme.bits)


@dataclass(frozen=True, slots=True)
class _Product:
    """``x @ rows.T (+ bias)``: `weight` holds the rows, or the columns unless `by_row`."""

    weight: ir.Value
    by_row: bool
    bias: ir.Value | None = None

    @property
    def rows(self) -> Matrix:
        """The matrix with a row an output (outputs, inputs)."""
        if self.weight.const_value is None:
            raise UnsupportedModelError(f"{self.weight.name} is no constant of the graph.")
        values = self.weight.const_value.numpy()
        return values if self.by_row else values.T


def _product(node: ir.Node) -> _Product | None:
    """What a node multiplies with, if that is a constant matrix and nothing else is done."""
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    by_row = bool(attributes.pop("transB", 0))
    # transA, transBatchA and transBatchB are flags, alpha and beta factors: set, they make another product.
    plain = all(value == (1 if name in ("alpha", "beta") else 0) for name, value in attributes.items())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Product(weight, by_row, bias) if plain else None


class _Weights:
    """The quantised matrices of a graph; a matrix that two products share is quantised once."""

    def __init__(self, graph: ir.Graph, scheme: BlockScheme) -> None:
        self._graph = graph
        self.scheme = scheme
        self._made: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def of(self, product: _Product) -> tuple[ir.Value, ir.Value]:
        """Integers and scales of a product's matrix."""
        key = (product.weight, product.by_row)
        if key not in self._made:
            blocks = quantize_rows(product.rows, self.scheme)
            name = f"{product.weight.name}_Q{self.scheme.bits}{'_rows' if product.by_row else ''}"
            self._made[key] = (
                self._constant(name, blocks.integers),
                self._constant(f"{name}_scales", blocks.scales),
            )
        return self._made[key]

    def _constant(self, name: str, array: Matrix) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


def _replace(graph: ir.Graph, node: ir.Node, product: _Product, weights: _Weights) -> None:
    outputs, inputs = product.rows.shape
    scheme = weights.scheme
    writer = NodeWriter(graph, f"quantize/{node.name}")
    result = writer.op(
        "MatMulNBits",
        [node.inputs[0], *weights.of(product)],
        domain=_CONTRIB,
        output=None,
        **block_attributes(inputs, outputs, scheme),
    )
    if product.bias is not None:
        result = writer.op("Add", [result, product.bias])
    writer.insert_before(node)
    take_over(node.outputs[0], result)
    graph.remove(node, safe=True)


def block_attributes(inputs: int, outputs: int, scheme: BlockScheme) -> dict[str, int]:
    """Attributes of a MatMulNBits with `outputs` quantised rows of `inputs` numbers."""
    return {
        "K": inputs,
        "N": outputs,
        "bits": scheme.bits,
        "block_size": scheme.block_size,
        "accuracy_level": scheme.accuracy_level,
    }


def scheme_of(node: ir.Node) -> BlockScheme:
    """The scheme of a MatMulNBits."""
    attributes = block_attributes_of(node)
    return BlockScheme(**attributes, zero_points=len(node.inputs) > 3 and node.inputs[3] is not None)


def block_attributes_of(node: ir.Node) -> dict[str, int]:
    """A MatMulNBits' bits, block size and accuracy level; other tools leave out those with their default."""
    found = {"bits": 4, "block_size": 0, "accuracy_level": 0}
    return found | {name: node.attributes[name].as_int() for name in found if name in node.attributes}


def write_blocks(rows: TensorSpec, path: Path, scheme: BlockScheme, dtype: npt.DTypeLike) -> BlockSpecs:
    """Quantise stored rows into a file, a slice at a time.

    Args:
        rows: float (n, H), in any dtype.
        path: the file to write.
        scheme: see `BlockScheme`.
        dtype: the graph's dtype, which the rows are converted to first, as the exporter does.

    Returns:
        Where integers and scales lie in the file.
    """
    count, width = rows.shape
    specs = block_specs(path, count, width, scheme, _DTYPE_NAMES[np.dtype(dtype)])
    step = max(1, _SLICE_BYTES // (4 * width))
    stored = map_tensor(rows)
    scales = []
    with path.open("wb") as file:
        for start in range(0, count, step):
            part = to_float32(np.asarray(stored[start : start + step]), rows.dtype).astype(dtype, copy=False)
            blocks = quantize_rows(part, scheme)
            file.write(blocks.integers.tobytes())
            scales.append(blocks.scales)
        file.write(np.concatenate(scales).tobytes())
    return specs
