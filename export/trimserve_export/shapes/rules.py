"""What operators do to shapes: the sizes of what each of them makes.

A rule gives None where it does not know. Operators without a rule are no error: nothing is known of what
they make.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
import sympy

from trimserve_export.shapes.sizes import (
    Size,
    Sizes,
    broadcast,
    is_at_least,
    plain,
    product,
    quotient,
    slice_size,
    unknown_size,
)

# The entries of a short int64 tensor: an object array of `Size`; of a comparison True, False or None.
Entries = np.ndarray


class Facts(Protocol):
    """What is known of a graph's values."""

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """The shape of a value."""
        ...

    def entries(self, value: ir.Value | None) -> Entries | None:
        """The entries of a short int64 tensor."""
        ...

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The entries of a value, flat, if all are numbers."""
        ...


SizesRule = Callable[[Facts, ir.Node], Sequence[Size] | None]

# fmt: off
_SAME_SHAPE = (
    "Abs", "Cast", "Clip", "Cos", "CumSum", "Elu", "Erf", "Exp", "FastGelu", "Gelu", "Identity",
    "IsInf", "IsNaN", "LayerNormalization", "Log", "Neg", "Not", "QuickGelu", "Reciprocal", "Relu",
    "ScatterND", "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Softmax", "Softplus", "Sqrt",
    "Tanh", "Trilu",
)
# fmt: on
# fmt: off
BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mod", "Mul", "Or", "Pow", "Sub", "Where", "Xor",
)
# fmt: on
_REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")


def int_of(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _axes(facts: Facts, node: ir.Node) -> list[int] | None:
    """The attribute or input `axes`."""
    attribute = node.attributes.get("axes")
    return facts.integers(_input(node, 1)) if attribute is None else list(attribute.as_ints())


def _same(facts: Facts, node: ir.Node) -> Sizes | None:
    return facts.sizes(node.inputs[0])


def _broadcast(facts: Facts, node: ir.Node) -> Sizes | None:
    shapes = [sizes for value in node.inputs if (sizes := facts.sizes(value)) is not None]
    return broadcast(shapes) if shapes and len(shapes) == len(node.inputs) else None


def _reduced(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, axes = facts.sizes(node.inputs[0]), _axes(facts, node)
    if sizes is None or axes is None:
        return None
    gone = {axis % len(sizes) for axis in axes}
    if int_of(node, "keepdims", 1):
        return [1 if axis in gone else size for axis, size in enumerate(sizes)]
    return [size for axis, size in enumerate(sizes) if axis not in gone]


def _unsqueezed(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, axes = facts.sizes(node.inputs[0]), _axes(facts, node)
    if sizes is None or axes is None:
        return None
    out = list(sizes)
    for axis in sorted(axis % (len(sizes) + len(axes)) for axis in axes):
        out.insert(axis, 1)
    return out


def _squeezed(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, axes = facts.sizes(node.inputs[0]), _axes(facts, node)
    if sizes is None or axes is None:
        return None
    gone = {axis % len(sizes) for axis in axes}
    return [size for axis, size in enumerate(sizes) if axis not in gone]


def _gathered(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, indices = facts.sizes(node.inputs[0]), facts.sizes(node.inputs[1])
    if not sizes or indices is None:
        return None
    axis = int_of(node, "axis", 0) % len(sizes)
    return (*sizes[:axis], *indices, *sizes[axis + 1 :])


def _concatenated(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    shapes = [sizes for value in node.inputs if (sizes := facts.sizes(value))]
    if len(shapes) != len(node.inputs):
        return None
    first = list(shapes[0])  # on the other axes all parts have one size
    axis = int_of(node, "axis", 0) % len(first)
    first[axis] = sympy.Add(*(sizes[axis] for sizes in shapes))
    return first


def _transposed(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, perm = facts.sizes(node.inputs[0]), node.attributes.get("perm")
    if sizes is None:
        return None
    return sizes[::-1] if perm is None else [sizes[axis] for axis in perm.as_ints()]


def _multiplied(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    first, second = facts.sizes(node.inputs[0]), facts.sizes(node.inputs[1])
    if first is None or second is None or min(len(first), len(second)) < 2:
        return None
    if int_of(node, "transBatchA", 0) or int_of(node, "transBatchB", 0):
        return None
    rows = first[-1 if int_of(node, "transA", 0) else -2]
    columns = second[-2 if int_of(node, "transB", 0) else -1]
    return (*broadcast([first[:-2], second[:-2]]), rows, columns)


def _multiplied_blocks(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes = facts.sizes(node.inputs[0])
    return None if sizes is None else (*sizes[:-1], node.attributes["N"].as_int())


def _expanded(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, target = facts.sizes(node.inputs[0]), facts.entries(node.inputs[1])
    return None if sizes is None or target is None else broadcast([sizes, _as_sizes(target)])


def _filled(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    target = facts.entries(node.inputs[0])
    return None if target is None else _as_sizes(target)


def _as_sizes(target: Entries) -> Sizes:
    return tuple(entry if is_at_least(entry, 0) else unknown_size() for entry in target.tolist())


def _ranged(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    start, limit, step = map(facts.entries, node.inputs)
    if start is None or limit is None or step is None or step.item() != 1:
        return [unknown_size()]
    length = plain(sympy.sympify(limit.item()) - start.item())
    return [length if is_at_least(length, 0) else unknown_size()]


def _reshaped(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, target = facts.sizes(node.inputs[0]), facts.entries(node.inputs[1])
    if target is None or int_of(node, "allowzero", 0):
        return None
    out: list[Size] = []
    for axis, entry in enumerate(target.tolist()):
        if entry == -1 or is_at_least(entry, 1):
            out.append(entry)
        else:  # 0 copies a size, and what may be 0 may copy it
            out.append(sizes[axis] if entry == 0 and sizes is not None else unknown_size())
    if -1 in out:
        place = out.index(-1)
        rest = product(out[:place] + out[place + 1 :])
        out[place] = unknown_size() if sizes is None else quotient(product(sizes), rest)
    return out


def _flattened(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, axis = facts.sizes(node.inputs[0]), int_of(node, "axis", 1)
    return None if sizes is None else (product(sizes[:axis]), product(sizes[axis:]))


def _sliced(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    sizes, cuts = facts.sizes(node.inputs[0]), slice_cuts(facts, node)
    if sizes is None or cuts is None:
        return None
    return [slice_size(size, *cuts[axis]) if axis in cuts else size for axis, size in enumerate(sizes)]


def slice_cuts(facts: Facts, node: ir.Node) -> dict[int, tuple[Size, Size, int]] | None:
    """Start, end and step of each axis that a Slice cuts."""
    sizes = facts.sizes(node.inputs[0])
    starts, ends = facts.entries(node.inputs[1]), facts.entries(node.inputs[2])
    if sizes is None or starts is None or ends is None:
        return None
    axes = facts.integers(_input(node, 3)) if _input(node, 3) else list(range(starts.size))
    steps = facts.integers(_input(node, 4)) if _input(node, 4) else [1] * starts.size
    if axes is None or steps is None:
        return None
    cuts = zip(starts.tolist(), ends.tolist(), steps, strict=True)
    return dict(zip((axis % len(sizes) for axis in axes), cuts, strict=True))


def shape_of(facts: Facts, node: ir.Node) -> Sizes | None:
    """What a Shape gives."""
    sizes = facts.sizes(node.inputs[0])
    return None if sizes is None else sizes[int_of(node, "start", 0) : int_of(node, "end", len(sizes))]


def _shape_length(facts: Facts, node: ir.Node) -> Sequence[Size] | None:
    found = shape_of(facts, node)
    return None if found is None else (len(found),)


SIZES: dict[str, SizesRule] = {
    **dict.fromkeys(_SAME_SHAPE, _same),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    "Concat": _concatenated,
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Flatten": _flattened,
    "FusedMatMul": _multiplied,
    "Gather": _gathered,
    "MatMul": _multiplied,
    "MatMulNBits": _multiplied_blocks,
    "Range": _ranged,
    "Reshape": _reshaped,
    "Shape": _shape_length,
    "Slice": _sliced,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}


def split_sizes(facts: Facts, node: ir.Node) -> list[Sizes] | None:
    """The shapes of a Split's outputs."""
    sizes = facts.sizes(node.inputs[0])
    if not sizes:
        return None
    axis, count = int_of(node, "axis", 0) % len(sizes), len(node.outputs)
    parts: list[Size] | None = None
    whole = sizes[axis]
    if (given := facts.integers(_input(node, 1))) is not None:
        parts = list(given)
    elif isinstance(whole, int) and whole % count == 0:
        parts = [whole // count] * count
    return [(*sizes[:axis], part, *sizes[axis + 1 :]) for part in parts or [unknown_size()] * count]
