"""Rows of heads as floats: what integers stand for, in whatever layout they lie, or what a Gemm scales.

Layouts: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError, require
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export.graphs.head import STATIC_PRODUCTS, Head
from trimserve_export.graphs.values import describe
from trimserve_export.trimming.plan import VocabPlan, constant, optional_input
from trimserve_export.trimming.rows import copy_nodes, dtype_name, inline
from trimserve_export.trimming.weights import follow_weight, int_attribute

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_BLOCK_BYTES = 8 << 20
# bitsandbytes' 4-bit types: what the sixteen integers stand for, times a block's largest magnitude.
# QLoRA (arXiv 2305.14314), appendix E, and the FP4 of bitsandbytes (1 sign, 2 exponent, 1 mantissa bits).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))
_CODES = {0: np.array(_FP4, np.float32), 1: np.array(_NF4, np.float32)}


@dataclass(frozen=True, slots=True)
class DequantizedRows:
    """Rows of a head that are not stored as they are multiplied, in the order of some ids.

    Attributes:
        head: the head, in the untrimmed graph.
        opsets: the graph's opset imports.
        rows: V.
        ids: the rows to give.
    """

    head: Head
    opsets: dict[str, int]
    rows: int
    ids: Ids

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return dtype_name(self.head.dtype, str(self.head.product.name))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H)."""
        return (len(self.ids), self.head.width)

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a block of rows at a time; yield their sizes."""
        numbers = np.float16 if self.dtype == "F16" else np.float32
        step = max(1, _BLOCK_BYTES // (4 * self.head.width))
        for start in range(0, len(self.ids), step):
            rows = self.read(self.ids[start : start + step])
            yield os.write(file.fileno(), np.ascontiguousarray(rows, numbers).tobytes())

    def read(self, ids: Ids) -> Floats:
        """Rows (n, H).

        Raises:
            UnsupportedModelError: a layout that is not understood.
        """
        readers = {"MatMulNBits": _nbits, "MatMulBnb4": _bnb4, "MatMulInteger": _integers}
        node = self.head.product
        if node.op_type in STATIC_PRODUCTS:
            weight, scales, _ = STATIC_PRODUCTS[node.op_type]
            return _columns(node, weight, _array(node, scales), ids.astype(np.int64), self.rows)
        if node.op_type in readers:
            return readers[node.op_type](node, ids.astype(np.int64), self.rows)
        if node.op_type == "Gemm":
            return self._scaled(ids)
        return self._computed(ids)

    def _scaled(self, ids: Ids) -> Floats:
        """A Gemm's weight times its alpha."""
        weight = constant(self.head.weight)
        if weight is None:
            raise UnsupportedModelError(f"{describe(self.head.product)} has no constant weight.")
        rows = weight.numpy() if self.head.by_row else weight.numpy().T
        return rows[ids] * np.float32(scale_of(self.head.product))

    def _computed(self, ids: Ids) -> Floats:
        """Run the nodes that dequantise the weight, cut to the asked rows."""
        weight = self.head.product.inputs[1]
        if weight is None:
            raise UnsupportedModelError(f"{describe(self.head.product)} has no weight.")
        by_row = int_attribute(self.head.product, "transB", 0)
        copied, nodes, constants = copy_nodes(weight, {})
        result = ir.Value(name="weight", type=ir.TensorType(self.head.dtype))
        end = ir.Node("", "Identity", [copied], outputs=[result])
        graph = ir.Graph(
            [],
            [result],
            nodes=[*nodes, end],
            initializers=constants,
            opset_imports=self.opsets,
            name="weight",
        )
        plan = VocabPlan(self.rows)
        follow_weight(plan, end, 0, 0 if by_row else 1)
        plan.apply(VocabMap(ids, np.full(len(ids), Reason.EXPLICIT, np.uint8), self.rows))
        runtime = require("onnxruntime", extra="cpu", purpose="trimming a quantised graph")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        proto = ir.to_proto(inline(ir.Model(graph, ir_version=10))).SerializeToString()
        session = runtime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {})
        return np.asarray(found if by_row else found.T)


def scale_of(product: ir.Node) -> float:
    """What a Gemm multiplies its product by."""
    alpha = product.attributes.get("alpha")
    return 1.0 if alpha is None else alpha.as_float()


def _array(node: ir.Node, index: int) -> npt.NDArray[Any]:
    tensor = constant(optional_input(node, index))
    if tensor is None:
        raise UnsupportedModelError(f"{describe(node)} has no constant at input {index}.")
    return tensor.numpy()


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Integers of 2, 4 or 8 bits along the last axis, one a byte, the first in a byte's lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)


def _nbits(node: ir.Node, ids: npt.NDArray[np.int64], rows: int) -> Floats:
    """``scale * (q - zero point)``; g_idx says which block's scale and zero point a column has."""
    width, size, bits = (int_attribute(node, name, 4) for name in ("K", "block_size", "bits"))
    blocks = -(-width // size)
    integers = unpack(_array(node, 1).reshape(rows, -1)[ids], bits)[:, :width].astype(np.float32)
    scales = _array(node, 2).reshape(rows, blocks)[ids].astype(np.float32)
    zeros = np.full(scales.shape, 1 << (bits - 1), np.float32)
    reordered = optional_input(node, 4) is not None
    # Where columns are reordered, ONNX Runtime 1.31.1 takes the middle for every packed zero point.
    if optional_input(node, 3) is not None and not (reordered and _array(node, 3).dtype == np.uint8):
        stored = _array(node, 3)
        if stored.dtype == np.uint8:
            stored = unpack(stored.reshape(rows, -1)[ids], bits)[:, :blocks]
        else:
            stored = stored.reshape(rows, blocks)[ids]
        zeros = stored.astype(np.float32)
    columns = _array(node, 4)[:width] if reordered else np.arange(width) // size
    return (integers - zeros[:, columns]) * scales[:, columns]


def _bnb4(node: ir.Node, ids: npt.NDArray[np.int64], rows: int) -> Floats:
    """Numbers of a code book times their block's largest magnitude; a byte's high half comes first."""
    width, size = (int_attribute(node, name, 0) for name in ("K", "block_size"))
    packed = _array(node, 1).reshape(rows, -1)[ids]
    integers = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=-1).reshape(len(ids), width)
    largest = _array(node, 2).reshape(rows, width // size)[ids].astype(np.float32)
    return _CODES[int_attribute(node, "quant_type", 1)][integers] * np.repeat(largest, size, axis=1)


def _integers(node: ir.Node, ids: npt.NDArray[np.int64], rows: int) -> Floats:
    """Columns of (H, V), less their zero point, times their scale."""
    product = node.outputs[0].consumers()[0].outputs[0].consumers()[0]  # through Cast to the Mul of scales
    scale = next(
        tensor
        for value in product.inputs
        if value is not None and (maker := value.producer()) is not None and maker.op_type == "Mul"
        for operand in maker.inputs
        if (tensor := constant(operand)) is not None
    )
    return _columns(node, 1, scale.numpy(), ids, rows, zero_index=3)


def _columns(
    node: ir.Node,
    index: int,
    scale: npt.NDArray[Any],
    ids: npt.NDArray[np.int64],
    rows: int,
    zero_index: int = 5,
) -> Floats:
    """Columns of an input (H, V), less their zero point, times their scale: one of all or one each."""
    columns = np.take(_array(node, index), ids, axis=1).astype(np.float32)
    zeros = np.zeros(1) if optional_input(node, zero_index) is None else _array(node, zero_index)
    zeros, factors = (array.astype(np.float32).reshape(-1) for array in (zeros, scale))
    zeros, factors = (array[ids] if array.size == rows else array for array in (zeros, factors))
    return np.ascontiguousarray(((columns - zeros) * factors).T)
