"""Follow a matrix with one row a token back to the constants it is made of."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.values import describe
from trimserve_export.trimming.plan import VocabPlan, constant, optional_input, replace_constant

_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def follow_weight(plan: VocabPlan, node: ir.Node, index: int, axis: int) -> None:
    """Cut what an operand is made of.

    Args:
        plan: collects the cuts.
        node: the node that takes the matrix.
        index: which of its inputs it is.
        axis: the axis of the matrix that has one entry a token.

    Raises:
        UnsupportedModelError: a node on the way is not understood, or a constant has other than V rows.
    """
    value = plan.operand(node, index)
    if not plan.carry(value, axis):
        return
    tensor = constant(value)
    if tensor is not None:
        plan.cut(value, tensor, axis, node)
        return
    maker = value.producer()
    if maker is None:
        raise UnsupportedModelError(f"{describe(node)} takes {value.name}, an input: expected a constant.")
    if maker.op_type not in _MAKERS:
        raise UnsupportedModelError(
            f"{describe(maker)} makes the table of {describe(node)}: expected a constant, or one behind "
            f"{', '.join(sorted(_MAKERS))}."
        )
    _MAKERS[maker.op_type](plan, maker, axis)


def _same(plan: VocabPlan, node: ir.Node, axis: int) -> None:
    follow_weight(plan, node, 0, axis)


def _transpose(plan: VocabPlan, node: ir.Node, axis: int) -> None:
    perm = node.attributes.get("perm")
    follow_weight(plan, node, 0, 1 - axis if perm is None else perm.as_ints()[axis])


def _reshape(plan: VocabPlan, node: ir.Node, axis: int) -> None:
    """Blocks of quantised rows are seen as whole rows: (V, n) of (V, blocks, bytes), or of V * n in a row."""
    shape = constant(plan.operand(node, 1))
    source = plan.operand(node, 0)
    tensor = constant(source)
    sizes = None if shape is None else shape.numpy().tolist()
    if axis != 0 or tensor is None or sizes is None or sizes[0] not in (plan.rows, -1, 0):
        raise UnsupportedModelError(
            f"{describe(node)} reshapes a table: expected a constant, to a constant shape of "
            f"{plan.rows:,} rows."
        )
    plan.cut_rows(source, tensor, tensor.size // plan.rows, node)
    if sizes[0] == plan.rows:
        plan.edit(lambda vocab: replace_constant(node, 1, np.array([len(vocab), *sizes[1:]], np.int64)))


def _dequantize(plan: VocabPlan, node: ir.Node, axis: int) -> None:
    """Cut integers, and scales and zero points unless all tokens share them."""
    follow_weight(plan, node, 0, axis)
    scales = constant(optional_input(node, 1))
    if scales is None:
        raise UnsupportedModelError(f"{describe(node)} dequantises a table by scales that are no constant.")
    rank, along = len(scales.shape), int_attribute(node, "axis", 1)
    if scales.size == 1 or (rank == 1 and along % 2 != axis):
        return
    blocked = int_attribute(node, "block_size", 0)
    if blocked and along % 2 == axis:
        raise UnsupportedModelError(f"{describe(node)} has blocks of several tokens: they cannot be parted.")
    for index in (1, 2):
        if optional_input(node, index) is not None:
            follow_weight(plan, node, index, 0 if rank == 1 else axis)


def _arithmetic(plan: VocabPlan, node: ir.Node, axis: int) -> None:
    """A scale or an offset by hand: operands of a matrix that broadcast against it."""
    for index in (0, 1):
        tensor = constant(optional_input(node, index))
        if tensor is None:
            follow_weight(plan, node, index, axis)
            continue
        shape = (1, 1, *tensor.shape.numpy())[-2:]
        if shape[axis] != 1:
            follow_weight(plan, node, index, axis - 2 + len(tensor.shape))


_MAKERS: dict[str, Callable[[VocabPlan, ir.Node, int], None]] = {
    "Identity": _same,
    "Cast": _same,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "DequantizeLinear": _dequantize,
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
}


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node, or what stands for one that is left out."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def set_attribute_to_kept(node: ir.Node, name: str) -> Callable[[VocabMap], None]:
    """A change that gives an attribute the number of kept tokens."""

    def change(vocab: VocabMap) -> None:
        node.attributes.add(ir.AttrInt64(name, len(vocab)))

    return change
