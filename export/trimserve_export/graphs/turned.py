"""Bring lookups of token ids into one form, `Gather(table, ids)` of rows, without changing a number.

onnxruntime-genai writes tied float models with the head's matrix (H, V), transposed for the embedding. ONNX
Runtime folds the transpose into a private copy; with rows, embedding and head can share one mapped tensor.
Some graphs pick columns instead. EmbedLayerNormalization, which ONNX Runtime's optimiser makes of BERT's
embeddings, looks ids up by itself: it is given the looked-up rows as its table. The optimiser also writes a
DequantizeLinear for each user of rows that are integers: one of them stays.
"""

import numpy as np
import onnx_ir as ir

from trimserve_export.graphs.nodes import NodeWriter

_SWAPPED = (1, 0)
_CONTRIB_LOOKUP = "EmbedLayerNormalization"


class Turned(ir.LazyTensor):
    """The transpose of a matrix, made when it is written.

    Attributes:
        source: the matrix.
    """

    def __init__(self, source: ir.TensorProtocol) -> None:
        shape = tuple(source.shape.numpy())
        super().__init__(self._turned, source.dtype, ir.Shape(shape[::-1]), name=source.name)
        self.source = source

    def _turned(self) -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(self.source.numpy().T), name=self.name)


def turn_tables(graph: ir.Graph) -> None:
    """Let every lookup of rows be a Gather along the first axis of a constant."""
    for node in tuple(graph):
        if node.op_type == _CONTRIB_LOOKUP:
            _look_up_before(graph, node)
        elif (stored := _stored_by_column(node)) is not None and stored.const_value is not None:
            node.replace_input_with(0, _turned(graph, stored, stored.const_value))
        elif (picked := _picked_columns(node)) is not None and picked.const_value is not None:
            _look_up_rows(graph, node, _turned(graph, picked, picked.const_value))
        if node.op_type == "Gather":
            _dequantize_once(graph, node.outputs[0])


def _dequantize_once(graph: ir.Graph, rows: ir.Value) -> None:
    """Let all users of looked-up integers read what the first of equal DequantizeLinear nodes gives."""
    made = [user for user in rows.consumers() if user.op_type == "DequantizeLinear"]
    for other in made[1:]:
        if _operands(other) == _operands(made[0]):
            ir.convenience.replace_all_uses_with(other.outputs[0], made[0].outputs[0])
            graph.remove(other, safe=True)


def _operands(node: ir.Node) -> list[object]:
    """What nodes must have in common to give the same: inputs, constants by their bytes, and attributes."""
    tensors = [None if value is None else value.const_value for value in node.inputs]
    same = [
        value if tensor is None else (tensor.dtype, tensor.tobytes())
        for value, tensor in zip(node.inputs, tensors, strict=True)
    ]
    return [*same, sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())]


def _turned(graph: ir.Graph, stored: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    turned = Turned(tensor)
    turned.name = f"{stored.name}/rows"
    if turned.name in graph.initializers:
        return graph.initializers[turned.name]
    value = ir.Value(
        name=turned.name,
        type=ir.TensorType(turned.dtype),
        shape=ir.Shape(turned.shape.numpy()),
        const_value=turned,
    )
    graph.register_initializer(value)
    return value


def _look_up_before(graph: ir.Graph, node: ir.Node) -> None:
    """Give the node the rows of its ids as a table, and their places in it as ids."""
    ids, table = node.inputs[0], node.inputs[2]
    if ids is None or table is None or table.const_value is None:
        return
    writer = NodeWriter(graph, f"lookup/{node.name}")
    rows = writer.op("Gather", [table, ids], axis=0)
    lines = writer.op("Reshape", [rows, writer.constant([-1, int(table.const_value.shape.numpy()[1])])])
    start, step = writer.constant(0), writer.constant(1)
    places = writer.op("Range", [start, writer.op("Size", [ids]), step])
    places = writer.op("Reshape", [places, writer.op("Shape", [ids])])
    places = writer.op("Cast", [places], to=int(ir.DataType.INT32))
    writer.insert_before(node)
    node.replace_input_with(0, places)
    node.replace_input_with(2, lines)


def _picked_columns(node: ir.Node) -> ir.Value | None:
    """The constant (H, V) of a Gather along its second axis, of ids whose rank is known."""
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or axis is None or axis.as_int() not in (1, -1) or node.inputs[1] is None:
        return None
    table, ids = node.inputs[0], node.inputs[1]
    if table is None or table.const_value is None or ids.shape is None or len(ids.shape) == 0:
        return None
    return table if len(table.const_value.shape) == len(_SWAPPED) else None


def _look_up_rows(graph: ir.Graph, node: ir.Node, table: ir.Value) -> None:
    """``Gather(table, ids, axis=1)`` (H, ...) from rows (..., H)."""
    ids, columns = node.inputs[1], node.outputs[0]
    if ids is None or ids.shape is None:
        return
    uses, rank = tuple(columns.uses()), len(ids.shape)
    node.replace_input_with(0, table)
    node.attributes.add(ir.AttrInt64("axis", 0))
    columns.shape = None
    writer = NodeWriter(graph, f"columns/{node.name}")
    turned = writer.op("Transpose", [columns], perm=[rank, *range(rank)])
    writer.insert_after(node)
    for user, index in uses:
        user.replace_input_with(index, turned)


def _stored_by_column(node: ir.Node) -> ir.Value | None:
    """The constant behind ``Gather(Transpose(constant), ids)``, if a node is that."""
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or node.inputs[0] is None or (axis is not None and axis.as_int() != 0):
        return None
    transpose = node.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    perm, stored = transpose.attributes.get("perm"), transpose.inputs[0]
    if stored is None or stored.const_value is None or (perm and tuple(perm.as_ints()) != _SWAPPED):
        return None
    return stored if len(stored.const_value.shape) == len(_SWAPPED) else None
