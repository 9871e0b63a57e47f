"""Pass 5: shapes that are constants but for the batch and the length become constants.

Exporters write out how each Reshape's shape is computed (Shape, Gather, Unsqueeze, Concat): in a small model
two thirds of a step's nodes, each of them a microsecond or two. Where a size is proven to be a number, or to
be the input's own, the shape is written as a constant: 0 copies a size, -1 stands for the one that is left.
What then computes nothing that is used is removed with the unused nodes. The numbers that go
through the graph are the same.
"""

import numpy as np
import onnx_ir as ir

from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.shapes.facts import ShapeFacts
from trimserve_export.shapes.rules import slice_cuts
from trimserve_export.shapes.sizes import Sizes, is_at_least


def fix_shapes(graph: ir.Graph) -> None:
    """Write shapes as constants, and take out what then changes nothing, in place."""
    facts = ShapeFacts(graph)
    outputs = set(graph.outputs)
    for number, node in enumerate(list(graph)):
        writer = NodeWriter(graph, f"shapes/{number}")
        source = node.inputs[0] if node.inputs else None
        if source is not None and _is_idle(facts, node) and node.outputs[0] not in outputs:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        elif (shape := _constant_shape(facts, node)) is not None:
            if facts.integers(node.inputs[1]) != shape:
                node.replace_input_with(1, writer.array("shape", np.array(shape, np.int64)))
        elif _computes_a_constant(facts, node) and node.outputs[0] not in outputs:
            entries = np.array(facts.entries(node.outputs[0]), np.int64)
            ir.convenience.replace_all_uses_with(node.outputs[0], writer.array("entries", entries))


def _is_idle(facts: ShapeFacts, node: ir.Node) -> bool:
    """Whether a node gives what it gets."""
    if node.op_type == "Expand":
        return _same(facts, node)
    if node.op_type != "Slice" or not _same(facts, node):
        return False
    return all(start == 0 and step == 1 for start, _, step in (slice_cuts(facts, node) or {}).values())


def _same(facts: ShapeFacts, node: ir.Node) -> bool:
    before = facts.sizes(node.inputs[0])
    return before is not None and before == facts.sizes(node.outputs[0])


def _constant_shape(facts: ShapeFacts, node: ir.Node) -> list[int] | None:
    """The shape that a Reshape or an Expand can be given as a constant."""
    if node.op_type not in ("Reshape", "Expand"):
        return None
    before, after = facts.sizes(node.inputs[0]), facts.sizes(node.outputs[0])
    if before is None or after is None:
        return None
    return _reshaping(before, after) if node.op_type == "Reshape" else _expanding(before, after)


def _reshaping(before: Sizes, after: Sizes) -> list[int] | None:
    shape, left = [], []
    for axis, size in enumerate(after):
        if isinstance(size, int) and size > 0:
            shape.append(size)
        elif axis < len(before) and size == before[axis]:
            shape.append(0)
        else:
            shape.append(-1)
            left.append(axis)
    # ONNX divides by the other sizes to find the one that is left: none of them may be 0.
    others = (size for axis, size in enumerate(after) if axis not in left)
    solvable = not left or (len(left) == 1 and all(is_at_least(size, 1) for size in others))
    return shape if solvable else None


def _expanding(before: Sizes, after: Sizes) -> list[int] | None:
    padded = (1,) * (len(after) - len(before)) + before
    # 1 leaves a size as it is.
    shape = [1 if new == old else new for old, new in zip(padded, after, strict=True)]
    return shape if all(isinstance(size, int) for size in shape) else None


def _computes_a_constant(facts: ShapeFacts, node: ir.Node) -> bool:
    return node.op_type != "Constant" and facts.integers(node.outputs[0]) is not None
