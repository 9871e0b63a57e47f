"""What operators do to the entries of shape tensors, which shapes are computed with.

A rule gives None where it does not know, as those of `shape_rules` do.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from trimserve_export.shapes.rules import SIZES, Entries, Facts, int_of, shape_of, slice_cuts
from trimserve_export.shapes.sizes import Size, is_at_least, plain, quotient, unknown_integer

EntriesRule = Callable[[Facts, ir.Node], Entries | None]
_INT64 = int(ir.DataType.INT64)


def _shape_entries(facts: Facts, node: ir.Node) -> Entries | None:
    sizes = shape_of(facts, node)
    if sizes is None:
        return None
    entries = np.empty(len(sizes), object)
    entries[:] = sizes
    return entries


def _moved(facts: Facts, node: ir.Node) -> Entries | None:
    """The same entries in another shape."""
    entries, rule = facts.entries(node.inputs[0]), SIZES[node.op_type]
    sizes = rule(facts, node)
    if entries is None or sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return entries.reshape(tuple(sizes))


def _cast_entries(facts: Facts, node: ir.Node) -> Entries | None:
    return facts.entries(node.inputs[0]) if int_of(node, "to", 0) == _INT64 else None


def _gathered_entries(facts: Facts, node: ir.Node) -> Entries | None:
    entries, indices = facts.entries(node.inputs[0]), facts.integers(node.inputs[1])
    shape = facts.sizes(node.inputs[1])
    if entries is None or indices is None or shape is None or entries.ndim != 1:
        return None
    return entries[np.array(indices, np.int64)].reshape(shape)


def _concatenated_entries(facts: Facts, node: ir.Node) -> Entries | None:
    parts = [part for value in node.inputs if (part := facts.entries(value)) is not None]
    return np.concatenate(parts, axis=int_of(node, "axis", 0)) if len(parts) == len(node.inputs) else None


def _sliced_entries(facts: Facts, node: ir.Node) -> Entries | None:
    entries, cuts = facts.entries(node.inputs[0]), slice_cuts(facts, node)
    if entries is None or entries.ndim != 1 or cuts is None:
        return None
    start, end, step = cuts[0]
    return entries[start:end:step] if isinstance(start, int) and isinstance(end, int) else None


def _filled_entries(facts: Facts, node: ir.Node) -> Entries | None:
    shape, value = facts.integers(node.inputs[0]), node.attributes.get("value")
    if shape is None or value is None or value.as_tensor().dtype != ir.DataType.INT64:
        return None
    return np.full(shape, int(value.as_tensor().numpy().item()), object)


def _expanded_entries(facts: Facts, node: ir.Node) -> Entries | None:
    entries, sizes = facts.entries(node.inputs[0]), SIZES["Expand"](facts, node)
    if entries is None or sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return np.broadcast_to(entries, tuple(sizes))


def _each(combine: Callable[..., Any]) -> EntriesRule:
    """A rule that works entry by entry, broadcast."""

    def rule(facts: Facts, node: ir.Node) -> Entries | None:
        parts = [part for value in node.inputs if (part := facts.entries(value)) is not None]
        if len(parts) != len(node.inputs):
            return None
        return np.asarray(np.frompyfunc(combine, len(parts), 1)(*parts), object)

    return rule


def _divided(dividend: Size, divisor: Size) -> Size:
    """Integer division as ONNX has it, which rounds to zero."""
    if isinstance(dividend, int) and isinstance(divisor, int):
        return int(dividend / divisor) if divisor else unknown_integer()
    if not is_at_least(dividend, 0) or not is_at_least(divisor, 1):
        return unknown_integer()
    return quotient(dividend, divisor)


def _equal(first: Size, second: Size) -> bool | None:
    difference = plain(sympy.sympify(first) - second)
    if isinstance(difference, int):
        return difference == 0
    return False if difference.is_nonzero else None


def _chosen(condition: bool | None, first: Size, second: Size) -> Size:
    return unknown_integer() if condition is None else first if condition else second


ENTRIES: dict[str, EntriesRule] = {
    "Add": _each(lambda first, second: first + second),
    "Cast": _cast_entries,
    "Concat": _concatenated_entries,
    "ConstantOfShape": _filled_entries,
    "Div": _each(_divided),
    "Equal": _each(_equal),
    "Expand": _expanded_entries,
    "Gather": _gathered_entries,
    "Identity": lambda facts, node: facts.entries(node.inputs[0]),
    "Mul": _each(lambda first, second: first * second),
    "Neg": _each(lambda entry: -entry),
    "Reshape": _moved,
    "Shape": _shape_entries,
    "Slice": _sliced_entries,
    "Squeeze": _moved,
    "Sub": _each(lambda first, second: first - second),
    "Unsqueeze": _moved,
    "Where": _each(_chosen),
}
