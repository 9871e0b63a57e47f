"""Turn a table that is stored with a column a token: a lookup in `Transpose(table)` reads rows instead.

onnxruntime-genai writes tied float models so: the head's matrix (H, V), transposed for the embedding. ONNX
Runtime folds the transpose into a private copy; with rows, embedding and head can share one mapped tensor.
"""

import numpy as np
import onnx_ir as ir

_SWAPPED = (1, 0)


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
    """Let lookups in a transposed constant read a constant that is stored transposed."""
    for node in graph:
        stored = _stored_by_column(node)
        if stored is None or stored.const_value is None:
            continue
        turned = Turned(stored.const_value)
        turned.name = f"{stored.name}/rows"
        value = ir.Value(
            name=turned.name,
            type=ir.TensorType(turned.dtype),
            shape=ir.Shape(turned.shape.numpy()),
            const_value=turned,
        )
        graph.register_initializer(value)
        node.replace_input_with(0, value)


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
