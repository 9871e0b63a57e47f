"""Find the embedding and the head of a graph by following the data: from `input_ids`, and back from `logits`.

Never by a dimension that equals the vocab size: position tables and linear layers can have that, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.serving.head import Head, find_head
from trimserve_export.serving.values import (
    OLDEST_OPSET,
    check_opset,
    describe,
    find_input,
    find_output,
    matrix_behind,
    shape_of,
    tensor_of,
)

__all__ = [
    "OLDEST_OPSET",
    "Embedding",
    "Head",
    "check_opset",
    "describe",
    "find_embedding",
    "find_head",
    "find_input",
    "find_output",
]

# Operators whose output holds the same ids in another shape or integer type.
_SAME_IDS = frozenset({"Identity", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"})
# Operators that look at ids without caring which row they stand for. Equal compares with a special
# token (RoBERTa's pad): compact ids of special tokens are constants of the graph, cold slots equal none.
_BLIND = frozenset({"Shape", "Size", "Equal"})


@dataclass(frozen=True, slots=True)
class Embedding:
    """The token embedding of a graph.

    Attributes:
        gather: the node ``Gather(table, ids)`` or ``GatherBlockQuantized(table, ids, ...)``.
        ids: its second input, in the shape that the graph made of `input_ids`.
        table: the constant (K, H); of a quantised embedding the integers, K rows of some shape.
        output: the rows that were looked up, as floats: the node's own output, or that of the
            DequantizeLinear behind it.
        width: H.
        dtype: type of `output`.
    """

    gather: ir.Node
    ids: ir.Value
    table: ir.Value
    output: ir.Value
    width: int
    dtype: ir.DataType

    @property
    def rows(self) -> int:
        """K."""
        return shape_of(self.table)[0]


def find_embedding(graph: ir.Graph) -> Embedding:
    """Follow `input_ids` to the one table that it is looked up in.

    Raises:
        UnsupportedModelError: no table, more than one, or a node that computes with the ids themselves.
    """
    found = []
    for node, ids in _uses_of_ids(find_input(graph, "input_ids")):
        embedding = _looked_up(node, ids) if node.graph is graph else None
        if embedding is not None:
            found.append(embedding)
        elif node.op_type not in _BLIND:
            raise UnsupportedModelError(
                f"{describe(node)} depends on the token ids themselves: compact ids would change its result."
            )
    if len(found) != 1:
        nodes = ", ".join(describe(embedding.gather) for embedding in found) or "none"
        raise UnsupportedModelError(
            f"expected one table that input_ids is looked up in, found {len(found)} ({nodes})."
        )
    return found[0]


def _uses_of_ids(ids: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in ids.consumers():
        if node.op_type in _SAME_IDS and node.inputs[0] is ids:
            yield from _uses_of_ids(node.outputs[0])
        else:
            yield node, ids


def _looked_up(node: ir.Node, ids: ir.Value) -> Embedding | None:
    if len(node.inputs) < 2 or node.inputs[1] is not ids:
        return None
    if node.op_type == "GatherBlockQuantized":
        return _looked_up_in_blocks(node, ids)
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or (axis is not None and axis.as_int() != 0):
        return None
    output = node.outputs[0]
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if before is not None and before.op_type == "DequantizeLinear":
        found, scale = matrix_behind(before.inputs[0]), before.inputs[1]
    else:
        found, scale = matrix_behind(node.inputs[0]), None
    if found is None or found[1]:
        return None
    table = found[0]
    after = [user for user in output.consumers() if user.op_type == "DequantizeLinear"]
    if scale is None and len(after) == 1 and len(list(output.uses())) == 1:
        output, scale = after[0].outputs[0], after[0].inputs[1]
    return Embedding(node, ids, table, output, shape_of(table)[1], tensor_of(scale or table).dtype)


def _looked_up_in_blocks(node: ir.Node, ids: ir.Value) -> Embedding | None:
    """Integers of fewer than 8 bits lie in bytes (uint8), or have a type of their own (int4, uint4)."""
    value, scales = node.inputs[0], node.inputs[2]
    reshape = None if value is None else value.producer()
    if reshape is not None and reshape.op_type == "Reshape":
        shape = ir.convenience.get_const_tensor(reshape.inputs[1]) if reshape.inputs[1] else None
        value = reshape.inputs[0]
    else:
        shape = None
    if value is None or value.const_value is None or scales is None or (reshape and shape is None):
        return None
    columns = int(shape_of(value)[-1] if shape is None else shape.numpy()[-1])
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    packed = 8 // bits if tensor_of(value).dtype == ir.DataType.UINT8 else 1
    return Embedding(node, ids, value, node.outputs[0], columns * packed, tensor_of(scales).dtype)
