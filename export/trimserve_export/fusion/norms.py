"""RMS normalisation in one node, and in one with the sum before it (SkipSimplifiedLayerNormalization).

Exporters write ``x / sqrt(mean(x^2) + eps) * weight`` as six to nine nodes; the anchor is the mean of the
squares, from which the data is followed to the weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trimserve_export.fusion.probing import Probe
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.values import is_constant

SIMPLIFIED, PLAIN = "SimplifiedLayerNormalization", "LayerNormalization"
_CONTRIB = "com.microsoft"
_SKIP = {SIMPLIFIED: "SkipSimplifiedLayerNormalization", PLAIN: "SkipLayerNormalization"}


@dataclass(frozen=True, slots=True)
class _Norm:
    """``output = fed / sqrt(mean(fed^2) + epsilon) * weight``, over the last axis."""

    fed: ir.Value
    output: ir.Value
    weight: ir.Value
    epsilon: float


def fuse_norms(graph: ir.Graph, probe: Probe) -> int:
    """Write each RMS normalisation as one node, in place; returns how many."""
    found = [norm for node in graph if (norm := _norm_at(node)) is not None]
    made = 0
    for number, norm in enumerate(found):
        weight = _numbers(norm.weight, probe)
        maker = norm.output.producer()
        if weight.ndim != 1 or maker is None:
            continue
        writer = NodeWriter(graph, f"norm/{number}")
        gamma = writer.array("weight", weight.astype(_dtype(norm.output)))
        output = writer.op(SIMPLIFIED, [norm.fed, gamma], axis=-1, epsilon=norm.epsilon, stash_type=1)
        writer.insert_before(maker)
        probe.take_over(norm.output, output)
        made += 1
    return made


def _numbers(weight: ir.Value, probe: Probe) -> np.ndarray:
    """A weight, which the graph may compute: Gemma adds 1."""
    if weight.const_value is not None:
        return weight.const_value.numpy()
    return np.asarray(probe.run([weight], {}, new=1, past=0)[0])


def _dtype(value: ir.Value) -> np.dtype[np.generic]:
    return np.dtype((value.dtype or ir.DataType.FLOAT).numpy())


def _norm_at(node: ir.Node) -> _Norm | None:
    """The normalisation whose mean of squares a node is."""
    if node.op_type == "RMSNormalization" and node.inputs[0] is not None and node.inputs[1] is not None:
        epsilon = node.attributes.get("epsilon")
        number = 1e-5 if epsilon is None else epsilon.as_float()
        return _Norm(node.inputs[0], node.outputs[0], node.inputs[1], number)
    squared = _squared(node)
    if squared is None:
        return None
    root = _root_of(node.outputs[0])
    if root is None:
        return None
    inverse, epsilon_found = root
    for scaled in _times(inverse):
        if scaled.inputs[0] is not squared and scaled.inputs[1] is not squared:
            continue
        norm = _weighted(scaled.outputs[0], _before_cast(squared), epsilon_found)
        if norm is not None:
            return norm
    return None


def _squared(node: ir.Node) -> ir.Value | None:
    """x, where a node is the mean of its squares over the last axis."""
    if node.op_type != "ReduceMean" or node.inputs[0] is None or not _is_over_last(node):
        return None
    square = node.inputs[0].producer()
    if square is None:
        return None
    first, second = square.inputs[0], square.inputs[1] if len(square.inputs) > 1 else None
    if square.op_type == "Mul" and first is second:
        return first
    return first if square.op_type == "Pow" and _number(second) == 2 else None


def _is_over_last(node: ir.Node) -> bool:
    axes = node.attributes.get("axes")
    if axes is not None:
        return list(axes.as_ints()) == [-1]
    tensor = (
        ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    )
    return tensor is not None and tensor.numpy().reshape(-1).tolist() == [-1]


def _root_of(mean: ir.Value) -> tuple[ir.Value, float] | None:
    """``1 / sqrt(mean + eps)`` and eps."""
    add = _only_user(mean, "Add")
    epsilon = None if add is None else next(filter(None, map(_number, add.inputs)), None)
    if add is None or epsilon is None:
        return None
    if (power := _only_user(add.outputs[0], "Pow")) is not None:
        return (power.outputs[0], epsilon) if _number(power.inputs[1]) == -0.5 else None
    root = _only_user(add.outputs[0], "Sqrt")
    if root is None:
        return None
    inverse = _only_user(root.outputs[0], "Reciprocal", "Div")
    if inverse is None:
        return None
    if inverse.op_type == "Div" and _number(inverse.inputs[0]) != 1:
        return root.outputs[0], epsilon
    return inverse.outputs[0], epsilon


def _times(inverse: ir.Value) -> Iterator[ir.Node]:
    """Where something is multiplied with 1 / root, or divided by the root."""
    for node in inverse.consumers():
        if node.op_type == "Mul" or (node.op_type == "Div" and node.inputs[1] is inverse):
            yield node


def _weighted(value: ir.Value, fed: ir.Value, epsilon: float) -> _Norm | None:
    """Follow the normalised value to where it has its weight, and the type that it came in."""
    weight: ir.Value | None = None
    while True:
        node = _only_user(value, "Cast", "Mul")
        if node is None:
            break
        if node.op_type == "Mul":
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            if weight is not None or other is None or not is_constant(other) or not _is_row(other):
                break
            weight = other
        elif weight is not None and _same_type(value, fed):
            break
        value = node.outputs[0]
    if weight is None or not _same_type(value, fed):
        return None
    return _Norm(fed, value, weight, epsilon)


def _same_type(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values have one type, as far as the exporter wrote it down."""
    return None in (first.dtype, second.dtype) or first.dtype == second.dtype


def _is_row(value: ir.Value) -> bool:
    """Whether a constant may have one axis: what the graph computes says so when it is run."""
    shape = value.shape if value.const_value is None else value.const_value.shape
    return shape is None or len(shape) == 1


def _before_cast(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return node.inputs[0]
    return value


def _only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that reads a value, if it is of a type that is asked for."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output() or users[0].node.op_type not in op_types:
        return None
    return users[0].node


def _number(value: ir.Value | None) -> float | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def fuse_skips(graph: ir.Graph, probe: Probe) -> int:
    """Take the sum before a normalisation into it, in place; returns how many."""
    found = 0
    for node in list(graph):
        if node.op_type not in _SKIP or node.domain or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or not _is_sum_of_states(add, node, probe):
            continue
        _fuse_skip(graph, add, node, probe)
        found += 1
    return found


def _is_sum_of_states(add: ir.Node, norm: ir.Node, probe: Probe) -> bool:
    """Whether an Add has two operands of one shape (B, T, H), and nobody reads its sum before the norm."""
    shapes = [probe.sizes(value) for value in add.inputs]
    same = shapes[0] is not None and shapes[0] == shapes[1] and len(shapes[0]) == 3
    axis = norm.attributes.get("axis")
    return same and len(norm.outputs) == 1 and (axis is None or axis.as_int() in (-1, 2))


def _fuse_skip(graph: ir.Graph, add: ir.Node, norm: ir.Node, probe: Probe) -> None:
    writer = NodeWriter(graph, f"skip/{norm.name}")
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    made = writer.ops(
        _SKIP[norm.op_type],
        [*add.inputs, *norm.inputs[1:]],
        4,
        domain=_CONTRIB,
        epsilon=epsilon,
    )
    writer.insert_before(add)
    for old, new in ((norm.outputs[0], made[0]), (add.outputs[0], made[3])):
        probe.take_over(old, new)
    for node in (norm, add):
        graph.remove(node, safe=True)
