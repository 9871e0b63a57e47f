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
from trimserve_export.serving.block_search import BLOCK, MIDDLE, search_blocks
from trimserve_export.serving.lattice import has_levels
from trimserve_export.serving.quantized_table import quantize_table
from trimserve_export.serving.shared_table import share_table
from trimserve_export.serving.stored_rows import Carried, StoredRows, carrier

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
    quantize: str,
    vocab_bits: int | None = None,
    *,
    vocab_block: int | None = None,
    by_exporter: bool = False,
    keeps: bool = False,
) -> Quantization:
    """What an export with `--quantize` makes.

    Args:
        quantize: one of `QUANTIZE`.
        vocab_bits: of the vocab's rows, 4 or 8; 8 by default.
        vocab_block: block size of the vocab's rows, where they were in smaller blocks before; 32 by default.
        by_exporter: see `Quantization`.
        keeps: see `Quantization`; means nothing to 8 bits.
    """
    if by_exporter:
        return Quantization(_BUILT[quantize], _BUILT[quantize], by_exporter=True)
    body = _BODIES[quantize]
    rows = BlockScheme(bits=vocab_bits or VOCAB_BITS, block_size=vocab_block or BLOCK)
    return Quantization(rows, body, keeps=keeps and body.bits == 4, table=True)


def quantize_graph(
    source: Path,
    output: Path,
    scheme: Quantization,
    *,
    has_head: bool,
    moments: Moments | None = None,
    shares: bool = False,
    stored: StoredRows | None = None,
) -> Path:
    """Quantise every product of a servable graph with a constant matrix.

    Args:
        source: the servable graph.
        output: the folder for a graph of the same name and its data; not the source's folder.
        scheme: see `Quantization`.
        has_head: the graph has a vocab head, which must be among the products.
        moments: see `quantize_products`.
        shares: see `quantize_products`; whoever writes the final graph calls `map_shared`.
        stored: see `quantize_products`.

    Returns:
        The path of the quantised graph.

    Raises:
        UnsupportedModelError: see `quantize_products`.
    """
    model = read_exported(source)
    quantize_products(model, scheme, has_head=has_head, moments=moments, shares=shares, stored=stored)
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
    stored: StoredRows | None = None,
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
        stored: rows that the source has in blocks: matrices of the body that are made of them keep integers,
            scales and offsets, unless fewer bits are asked for than they have.

    Raises:
        UnsupportedModelError: the head, or all of the body, has no product that can be quantised.
    """
    products, head = products_of(model.graph, has_head=has_head)
    writer = _Writer(model.graph, moments or {}, _Keeper(stored, scheme))
    for node, product in products.items():
        blocks = writer.replace(node, product, scheme.rows if node is head else None)
        if shares and node is head and scheme.rows.bits == _SHARED_BITS:
            share_table(model.graph, product.weight, blocks, scheme.rows)
    if shares and scheme.table and not has_head and scheme.rows.bits == _SHARED_BITS:
        quantize_table(model.graph, scheme.rows)
    model.opset_imports.setdefault(_CONTRIB, 1)
    RemoveUnusedNodesPass()(model)
    logger.info("quantised %d products to %d bits", len(products), scheme.body.bits)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """What is done with matrices of the body: kept as they are stored, or rounded, and to how many bits."""

    stored: StoredRows | None
    scheme: Quantization

    def carried(self, product: Product, *, offsets: bool) -> Carried | None:
        """A matrix as it is stored; None where it is not, or has more bits than are asked for."""
        found = None if self.stored is None else self.stored.find(product.rows)
        body = self.scheme.body.bits
        if found is None or (found.bits > body and not self.scheme.keeps):
            return None
        return None if found.offsets is not None and not offsets else carrier(found, body)

    def rounded(self, product: Product) -> BlockScheme:
        """How a matrix is rounded that is not kept."""
        body = self.scheme.body
        if not self.scheme.keeps or has_levels(product.rows, 1 << body.bits):
            return body
        return _BODIES["int8"]


class _Writer:
    """Writes quantised products into a graph; a matrix that two of them share is quantised once."""

    def __init__(self, graph: ir.Graph, moments: Moments, keeper: _Keeper) -> None:
        self._graph = graph
        self._moments = moments
        self._keeper = keeper
        self._opset = graph.opset_imports.get("", 0)
        self._made: dict[tuple[ir.Value, bool, BlockScheme | None], _Operands] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def replace(self, node: ir.Node, product: Product, head: BlockScheme | None) -> tuple[ir.Value, ...]:
        """Put a product with blocks in the place of one with floats; gives integers, scales, zero points.

        Args:
            node: the product.
            product: what it multiplies with.
            head: how the rows of the vocab head are rounded; None for products of the body.
        """
        fed = node.inputs[0]
        if fed is None:
            raise UnsupportedModelError(f"{describe(node)} multiplies nothing: the graph is damaged.")
        outputs, inputs = product.rows.shape
        writer = NodeWriter(self._graph, f"quantize/{node.name}")
        operands = self._operands(product, head, writer)
        attributes = block_attributes(inputs, outputs, operands.scheme)
        result = writer.op("MatMulNBits", [fed, *operands.blocks], domain=_CONTRIB, output=None, **attributes)
        if operands.middles is not None:
            sums = self._block_sums(fed, inputs, operands.scheme.block_size, writer)
            result = writer.op("Add", [result, writer.op("MatMul", [sums, operands.middles])])
        if product.bias is not None:
            result = writer.op("Add", [result, product.bias])
        writer.insert_before(node)
        take_over(node.outputs[0], result)
        self._graph.remove(node, safe=True)
        return operands.blocks

    def _block_sums(self, fed: ir.Value, inputs: int, size: int, writer: NodeWriter) -> ir.Value:
        """The sums of a product's input, a block each (..., blocks); products of one input share them."""
        if (fed, size) not in self._sums:
            parts = [inputs // size, size]
            if fed.shape is None:
                leading = writer.op("Shape", [fed], end=-1)
                shape = writer.op("Concat", [leading, writer.constant(parts)], axis=0)
            else:
                shape = writer.constant([*[0] * (len(fed.shape) - 1), *parts])
            apart = writer.op("Reshape", [fed, shape])
            self._sums[fed, size] = writer.op("ReduceSum", [apart, writer.constant([-1])], keepdims=0)
        return self._sums[fed, size]

    def _operands(self, product: Product, head: BlockScheme | None, writer: NodeWriter) -> "_Operands":
        key = (product.weight, product.by_row, head)
        if key not in self._made:
            scheme, arrays = self._arrays(product, head)
            name = f"{product.weight.name}_Q{scheme.bits}{'_rows' if product.by_row else ''}"
            made = {
                end: self._of_graph(self._constant(f"{name}{end}", array), product, writer)
                for end, array in arrays.items()
            }
            middles = made.pop("_middles", None)
            if (minima := made.pop("_minima", None)) is not None:
                steps = writer.op("Mul", [made["_scales"], writer.array("middle", np.array(MIDDLE))])
                middles = writer.op("Transpose", [writer.op("Add", [minima, steps])], perm=[1, 0])
            self._made[key] = _Operands(scheme, tuple(made.values()), middles)
        return self._made[key]

    def _arrays(self, product: Product, head: BlockScheme | None) -> tuple[BlockScheme, dict[str, Matrix]]:
        """How a matrix lies in blocks, and their constants by how their names end."""
        minima = self._opset >= _SHAPE_OF_SOME_AXES
        kept = None if head is not None else self._keeper.carried(product, offsets=minima)
        if kept is not None:
            has_zeros = kept.zero_points is not None
            return BlockScheme(kept.bits, kept.block_size, zero_points=has_zeros), _carried(kept)
        scheme = self._keeper.rounded(product) if head is None else head
        if scheme.scales == "error":
            return scheme, _searched(product, self._moments.get(str(product.weight.name)), minima=minima)
        blocks = quantize_rows(product.rows, scheme)
        return scheme, {"": blocks.integers, "_scales": blocks.scales}

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

    scheme: BlockScheme
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
    return arrays | _minima_or_middles(found.scales, found.middles)  # the kernel subtracts 8 by itself


def _minima_or_middles(scales: Matrix, middles: Matrix) -> dict[str, Matrix]:
    """What 8 means in each block, for the product with the sums: itself, or minima in float16.

    A middle that takes float32 is often a minimum and 8 scales, both in float16 (GGUF's Q4_1): it is computed
    when the graph is opened, in half the bytes. A graph casts what it has in float16 at that time, too, and
    larger matrices have scales in float32 for that reason.
    """
    if scales.dtype == np.float16 and middles.dtype == np.float32:
        exact = middles - scales.astype(np.float64) * MIDDLE
        halves = exact.astype(np.float16)
        if (halves == exact).all():
            return {"_minima": halves}
    return {"_middles": np.ascontiguousarray(middles.T)}


def _carried(kept: Carried) -> dict[str, Matrix]:
    """The constants of a matrix that is kept as it was stored, by how their names end."""
    halves = kept.scales.astype(np.float16)
    # See `_searched`; float16 is what most formats have their scales in, the K formats aside.
    half = 4 * kept.scales.size <= MAX_FOLDED_BYTES and np.array_equal(halves.astype(np.float32), kept.scales)
    arrays: dict[str, Matrix] = {"": kept.integers, "_scales": halves if half else kept.scales}
    if kept.zero_points is not None:
        arrays["_zero_points"] = kept.zero_points
    if kept.offsets is None:
        return arrays
    if kept.bits == 4 and kept.zero_points is None:
        return arrays | _minima_or_middles(arrays["_scales"], kept.offsets)
    return arrays | {"_middles": np.ascontiguousarray(kept.offsets.T)}


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
