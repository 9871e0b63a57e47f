"""Quantise a servable graph: each product with a constant matrix becomes a MatMulNBits (`--quantize`).

Four bits of the body are searched (`block_search.py`). All else has the integers of ONNX Runtime's own
quantiser (round to nearest, symmetric), called a slice of a matrix at a time, so that peak memory is that of
the result. The vocab head's rows have a scheme of their own, 8 bits unless 4 are asked for. A tied embedding
is looked up in them (`shared_table.py`), and that of a model without a head in blocks of its own
(`quantized_table.py`); other embeddings, and with 4 bits all, stay the floats they are.

Rows are quantised independently of each other, so what is cut before quantising equals what would be
cut after it: kept and cold rows hold the integers of the untrimmed quantised model.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.files.quantized import BlockScheme, BlockSpecs, Quantization, block_specs
from trimserve.files.tensors import TensorSpec, map_tensor, to_float32
from trimserve.runtime.session import MAX_FOLDED_BYTES
from trimserve_export.graphs.nodes import NodeWriter, take_over
from trimserve_export.graphs.products import Matrix, Product, products_of
from trimserve_export.graphs.reading import read_exported
from trimserve_export.graphs.values import describe
from trimserve_export.graphs.writing import ALIGNMENT
from trimserve_export.serving.block_rows import quantize_rows
from trimserve_export.serving.block_search import BLOCK, search_blocks
from trimserve_export.serving.lattice import has_levels
from trimserve_export.serving.quantized_table import quantize_table
from trimserve_export.serving.shared_table import share_table

logger = logging.getLogger(__name__)

_BODIES = {"int4": BlockScheme(bits=4, zero_points=True, scales="error"), "int8": BlockScheme(bits=8)}
# What builders that quantise themselves do: the largest number of a block fits.
_BUILT = {"int4": BlockScheme(bits=4), "int8": BlockScheme(bits=8)}
QUANTIZE = tuple(_BODIES)
# Most of what 4 bits cost a small model they cost in its vocab rows, of which a trimmed one has few.
VOCAB_BITS = 8
# With fewer a lookup would round every layer's input too much.
_SHARED_BITS = 8
_CONTRIB = "com.microsoft"
# The opset from which Shape gives all sizes but the last.
_SHAPE_OF_SOME_AXES = 15
_SLICE_BYTES = 16 << 20
_DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
Moment = npt.NDArray[np.float32]
Moments = Mapping[str, Moment]


def quantization_of(
    quantize: str, vocab_bits: int | None = None, *, by_exporter: bool = False, keeps: bool = False
) -> Quantization:
    """What an export with `--quantize` makes.

    Args:
        quantize: one of `QUANTIZE`.
        vocab_bits: of the vocab's rows, 4 or 8; 8 by default.
        by_exporter: see `Quantization`.
        keeps: see `Quantization`; means nothing to 8 bits.
    """
    if by_exporter:
        return Quantization(_BUILT[quantize], _BUILT[quantize], by_exporter=True)
    body = _BODIES[quantize]
    rows = BlockScheme(bits=vocab_bits or VOCAB_BITS)
    return Quantization(rows, body, keeps=keeps and body.bits == 4, table=True)


def quantize_graph(
    source: Path,
    output: Path,
    scheme: Quantization,
    *,
    has_head: bool,
    moments: Moments | None = None,
    shares: bool = False,
) -> Path:
    """Quantise every product of a servable graph with a constant matrix.

    Args:
        source: the servable graph.
        output: the folder for a graph of the same name and its data; not the source's folder.
        scheme: see `Quantization`.
        has_head: the graph has a vocab head, which must be among the products.
        moments: see `quantize_products`.
        shares: see `quantize_products`; whoever writes the final graph calls `map_shared`.

    Returns:
        The path of the quantised graph.

    Raises:
        UnsupportedModelError: see `quantize_products`.
    """
    model = read_exported(source)
    quantize_products(model, scheme, has_head=has_head, moments=moments, shares=shares)
    path = output / source.name
    ir.save(model, path, external_data=f"{path.name}_data", alignment=ALIGNMENT)
    return path


def quantize_products(
    model: ir.Model,
    scheme: Quantization,
    *,
    has_head: bool,
    moments: Moments | None = None,
    shares: bool = False,
) -> None:
    """Quantise every product of a servable graph with a constant matrix, in place.

    Args:
        model: the servable graph.
        scheme: see `Quantization`.
        has_head: see `quantize_graph`.
        moments: second moments of the inputs of the body's products, by the name of the matrix; what is not
            known counts alike.
        shares: a tied embedding is looked up in the head's rows, if they have 8 bits (`shared_table.py`), and
            without a head in blocks of its own (`quantized_table.py`).

    Raises:
        UnsupportedModelError: the head, or all of the body, has no product that can be quantised.
    """
    products, head = products_of(model.graph, has_head=has_head)
    writer = _Writer(model.graph, moments or {})
    for node, product in products.items():
        own = scheme.rows if node is head else _body_scheme(scheme, product)
        blocks = writer.replace(node, product, own)
        if shares and node is head and scheme.rows.bits == _SHARED_BITS:
            share_table(model.graph, product.weight, blocks, scheme.rows)
    if shares and scheme.table and not has_head and scheme.rows.bits == _SHARED_BITS:
        quantize_table(model.graph, scheme.rows)
    model.opset_imports.setdefault(_CONTRIB, 1)
    RemoveUnusedNodesPass()(model)
    logger.info("quantised %d products to %d bits", len(products), scheme.body.bits)


def _body_scheme(scheme: Quantization, product: Product) -> BlockScheme:
    """How a matrix of the body is quantised."""
    if not scheme.keeps or has_levels(product.rows, 1 << scheme.body.bits):
        return scheme.body
    return _BODIES["int8"]


class _Writer:
    """Writes quantised products into a graph; a matrix that two of them share is quantised once."""

    def __init__(self, graph: ir.Graph, moments: Moments) -> None:
        self._graph = graph
        self._moments = moments
        self._opset = graph.opset_imports.get("", 0)
        self._made: dict[tuple[ir.Value, bool, BlockScheme, bool], _Operands] = {}
        self._sums: dict[ir.Value, ir.Value] = {}

    def replace(self, node: ir.Node, product: Product, scheme: BlockScheme) -> tuple[ir.Value, ...]:
        """Put a product with blocks in the place of one with floats; gives integers, scales, zero points."""
        fed = node.inputs[0]
        if fed is None:
            raise UnsupportedModelError(f"{describe(node)} multiplies nothing: the graph is damaged.")
        outputs, inputs = product.rows.shape
        writer = NodeWriter(self._graph, f"quantize/{node.name}")
        operands = self._operands(product, scheme, writer, minima=self._opset >= _SHAPE_OF_SOME_AXES)
        attributes = block_attributes(inputs, outputs, scheme)
        result = writer.op("MatMulNBits", [fed, *operands.blocks], domain=_CONTRIB, output=None, **attributes)
        if operands.middles is not None:
            sums = self._block_sums(fed, inputs // BLOCK, writer)
            result = writer.op("Add", [result, writer.op("MatMul", [sums, operands.middles])])
        if product.bias is not None:
            result = writer.op("Add", [result, product.bias])
        writer.insert_before(node)
        take_over(node.outputs[0], result)
        self._graph.remove(node, safe=True)
        return operands.blocks

    def _block_sums(self, fed: ir.Value, blocks: int, writer: NodeWriter) -> ir.Value:
        """The sums of a product's input, a block each (..., blocks); products of one input share them."""
        if fed not in self._sums:
            if fed.shape is None:
                leading = writer.op("Shape", [fed], end=-1)
                shape = writer.op("Concat", [leading, writer.constant([blocks, BLOCK])], axis=0)
            else:
                shape = writer.constant([*[0] * (len(fed.shape) - 1), blocks, BLOCK])
            apart = writer.op("Reshape", [fed, shape])
            self._sums[fed] = writer.op("ReduceSum", [apart, writer.constant([-1])], keepdims=0)
        return self._sums[fed]

    def _operands(
        self, product: Product, scheme: BlockScheme, writer: NodeWriter, *, minima: bool
    ) -> "_Operands":
        key = (product.weight, product.by_row, scheme, minima)
        if key not in self._made:
            name = f"{product.weight.name}_Q{scheme.bits}{'_rows' if product.by_row else ''}"
            if scheme.scales == "largest":
                blocks = quantize_rows(product.rows, scheme)
                arrays = {"": blocks.integers, "_scales": blocks.scales}
            else:
                arrays = _searched(product, self._moments.get(str(product.weight.name)), minima=minima)
            made = {
                end: self._of_graph(self._constant(f"{name}{end}", array), product, writer)
                for end, array in arrays.items()
            }
            middles = made.pop("_middles", None)
            self._made[key] = _Operands(tuple(made.values()), middles)
        return self._made[key]

    def _of_graph(self, constant: ir.Value, product: Product, writer: NodeWriter) -> ir.Value:
        """Floats that are stored in float16, in the graph's dtype."""
        dtype = ir.DataType.from_numpy(product.rows.dtype)
        if constant.dtype in (ir.DataType.UINT8, dtype):
            return constant
        return writer.op("Cast", [constant], to=int(dtype))

    def _constant(self, name: str, array: Matrix) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


@dataclass(frozen=True, slots=True)
class _Operands:
    """Integers, scales and perhaps zero points; the middles (blocks, outputs) where a matrix has minima."""

    blocks: tuple[ir.Value, ...]
    middles: ir.Value | None


def _searched(product: Product, moments: Moment | None, *, minima: bool) -> dict[str, Matrix]:
    """The constants of a matrix in searched blocks, by how their names end."""
    rows = product.rows
    # Larger casts are not folded when a session opens, and MatMulNBits packs by constant scales alone.
    half = 4 * rows.size // BLOCK <= MAX_FOLDED_BYTES
    found = search_blocks(rows, moments, minima=minima, half=half)
    arrays: dict[str, Matrix] = {"": found.integers, "_scales": found.scales}
    if found.middles is None:
        return arrays | {"_zero_points": cast(Matrix, found.zero_points)}
    return arrays | {"_middles": np.ascontiguousarray(found.middles.T)}  # the kernel subtracts 8 by itself


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
    bits, size, level = block_attributes_of(node).values()
    return BlockScheme(bits, size, level, zero_points=len(node.inputs) > 3 and node.inputs[3] is not None)


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
