"""The products that can be a vocab head: which of their inputs have one entry a token, and along which axis.

Layouts of the quantised ones: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Callable

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.graphs.values import describe
from trimserve_export.trimming.plan import VocabPlan, constant, optional_input
from trimserve_export.trimming.weights import follow_weight, int_attribute, set_attribute_to_kept


def _matmul(plan: VocabPlan, node: ir.Node) -> None:
    if int_attribute(node, "transBatchB", 0):
        raise UnsupportedModelError(f"{describe(node)} has transBatchB set: expected a plain matrix.")
    follow_weight(plan, node, 1, 1 - int_attribute(node, "transB", 0))


def _gemm(plan: VocabPlan, node: ir.Node) -> None:
    _matmul(plan, node)
    _per_token(plan, node, 2)


def _with_integers(*per_token: int, weight: int = 1) -> Callable[[VocabPlan, ir.Node], None]:
    """A product with an integer matrix (K, V); the other inputs are scalars or have an entry a token."""

    def product(plan: VocabPlan, node: ir.Node) -> None:
        follow_weight(plan, node, weight, 1)
        for index in per_token:
            _per_token(plan, node, index)

    return product


def _per_token(plan: VocabPlan, node: ir.Node, index: int) -> None:
    """Cut the last axis of an optional constant input, unless all tokens share its number."""
    value = optional_input(node, index)
    if value is None:
        return
    tensor = constant(value)
    if tensor is None:
        raise UnsupportedModelError(f"{describe(node)} takes {value.name}: expected a constant.")
    if tensor.size > 1 and tensor.shape[-1] != 1:
        plan.cut(plan.operand(node, index), tensor, -1, node)


def _matmul_nbits(plan: VocabPlan, node: ir.Node) -> None:
    """Rows lie one after the other, in blocks; `g_idx` belongs to the other axis and stays."""
    if int_attribute(node, "weight_prepacked", 0):
        raise UnsupportedModelError(
            f"{describe(node)} has weights in the packed order of one kind of GPU (weight_prepacked): rows "
            "cannot be told apart. Use the graph from before packing."
        )
    width, bits, size = (int_attribute(node, name, 0) for name in ("K", "bits", "block_size"))
    _check_rows(plan, node)
    bits = bits or 4
    blocks = -(-width // size)
    zero_points = constant(optional_input(node, 3))
    packed = zero_points is not None and zero_points.dtype == ir.DataType.UINT8
    entries = {1: blocks * size * bits // 8, 2: blocks, 3: -(-blocks * bits // 8) if packed else blocks, 5: 1}
    for index, count in entries.items():
        _rows(plan, node, index, count)
    plan.edit(set_attribute_to_kept(node, "N"))


def _matmul_bnb4(plan: VocabPlan, node: ir.Node) -> None:
    """All numbers lie in one row of blocks, which are those of single tokens only if they divide K."""
    width, size = int_attribute(node, "K", 0), int_attribute(node, "block_size", 0)
    _check_rows(plan, node)
    if width % size or not int_attribute(node, "transB", 1):
        raise UnsupportedModelError(
            f"{describe(node)} has blocks of {size} and rows of {width} numbers: a block belongs to several "
            "tokens, so they cannot be parted without rounding again."
        )
    for index, count in {1: width // 2, 2: width // size}.items():
        _rows(plan, node, index, count)
    plan.edit(set_attribute_to_kept(node, "N"))


def _check_rows(plan: VocabPlan, node: ir.Node) -> None:
    if int_attribute(node, "N", 0) != plan.rows:
        raise UnsupportedModelError(
            f"{describe(node)} makes {int_attribute(node, 'N', 0):,} logits: expected {plan.rows:,}."
        )


def _rows(plan: VocabPlan, node: ir.Node, index: int, entries: int) -> None:
    value = optional_input(node, index)
    if value is None:
        return
    tensor = constant(value)
    if tensor is None:
        raise UnsupportedModelError(f"{describe(node)} takes {value.name}: expected a constant.")
    plan.cut_rows(plan.operand(node, index), tensor, entries, node)


PRODUCTS: dict[str, Callable[[VocabPlan, ir.Node], None]] = {
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "Gemm": _gemm,
    "MatMulNBits": _matmul_nbits,
    "MatMulBnb4": _matmul_bnb4,
    "MatMulInteger": _with_integers(3),
    # What ONNX Runtime's optimiser fuses MatMulInteger and its scales into.
    "DynamicQuantizeMatMul": _with_integers(2, 3, 4),
    "MatMulIntegerToFloat": _with_integers(3, 5, 6),
    "QLinearMatMul": _with_integers(4, 5, weight=3),
}
