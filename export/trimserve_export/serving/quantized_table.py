"""The embedding of a model without a vocab head, looked up in blocks of integers instead of floats.

``Gather(E, ids)`` of a servable graph becomes GatherBlockQuantized over integers and scales. Each row of `E`
is rounded by itself, so kept rows are those of the untrimmed model, and cold rows are rounded alike
(`quantized_embedding.py`). Positions and types stay floats: they are few.
"""

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from trimserve.files.quantized import BlockScheme
from trimserve.runtime.cold_rows import COLD_INPUT
from trimserve_export.graphs.nodes import NodeWriter, take_over
from trimserve_export.serving.block_rows import quantize_rows

_CONTRIB = "com.microsoft"
LOOKUP = "GatherBlockQuantized"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def quantize_table(graph: ir.Graph, scheme: BlockScheme) -> bool:
    """Quantise the table that a servable graph looks token ids up in, if its width is one of whole blocks.

    Args:
        graph: a servable graph, in place.
        scheme: of the rows.

    Returns:
        Whether there was one.
    """
    node = _lookup(graph)
    table = None if node is None else node.inputs[0]
    if node is None or table is None or table.const_value is None or table.dtype not in _FLOATS:
        return False
    rows = table.const_value.numpy()
    if rows.ndim != 2 or rows.shape[1] % scheme.block_size:
        return False
    blocks = quantize_rows(rows, scheme)
    integers = _constant(graph, f"{table.name}_Q{scheme.bits}", blocks.integers.reshape(len(rows), -1))
    scales = _constant(graph, f"{table.name}_Q{scheme.bits}_scales", blocks.scales)
    look_up_blocks(graph, NodeWriter(graph, f"quantized_table/{node.name}"), node, integers, scales, scheme)
    return True


def look_up_blocks(
    graph: ir.Graph,
    writer: NodeWriter,
    node: ir.Node,
    integers: ir.Value,
    scales: ir.Value,
    scheme: BlockScheme,
) -> None:
    """Put GatherBlockQuantized in the place of a Gather of rows.

    Args:
        graph: where it is.
        writer: of nodes before it.
        node: the Gather.
        integers: of the table, the bytes of a row together.
        scales: of its blocks.
        scheme: how its rows are quantised.
    """
    found = writer.op(
        LOOKUP,
        [integers, node.inputs[1], scales],
        domain=_CONTRIB,
        gather_axis=0,
        quantize_axis=1,
        block_size=scheme.block_size,
        bits=scheme.bits,
    )
    writer.insert_before(node)
    take_over(node.outputs[0], found)
    graph.remove(node, safe=True)


def _lookup(graph: ir.Graph) -> ir.Node | None:
    """The lookup whose rows the serving pass chooses beside those of `cold_rows`; see `cold_slots.py`."""
    cold = next((value for value in graph.inputs if value.name == COLD_INPUT), None)
    for slots, _ in () if cold is None else cold.uses():
        for chosen, _ in slots.outputs[0].uses():
            kept = chosen.inputs[1] if chosen.op_type == "Where" else None
            node = None if kept is None else kept.producer()
            if node is not None and node.op_type == "Gather" and _axis(node) == 0:
                return node
    return None


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value
