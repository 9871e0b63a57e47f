"""One table for lookup and head: a tied embedding is looked up in the head's 8-bit rows.

``Gather(E, ids)`` becomes GatherBlockQuantized over the integers and scales that the head multiplies with,
and the table of floats goes. The two operators want the integers in two shapes, a block or a row together; a
Reshape between them would copy the table at each call, so the written graph has two constants over the same
bytes of its data file.
"""

from pathlib import Path

import onnx
import onnx_ir as ir

from trimserve.files.quantized import BlockScheme
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.serving.quantized_table import LOOKUP, look_up_blocks


def share_table(graph: ir.Graph, table: ir.Value, blocks: tuple[ir.Value, ...], scheme: BlockScheme) -> None:
    """Let the lookups of a tied embedding read the head's integers and scales.

    Args:
        graph: a servable graph whose head is quantised.
        table: the embedding (K, H), which was the head's matrix too.
        blocks: the head's integers (K, blocks, bytes of a block) and scales.
        scheme: how its rows are quantised.
    """
    if table.const_value is None or table.const_value.shape.numpy()[1] % scheme.block_size:
        return  # the head's rows have padding, a table has none
    rows, width = table.const_value.shape.numpy()
    for node, index in tuple(table.uses()):
        axis = node.attributes.get("axis")
        if node.op_type != "Gather" or index != 0 or (axis is not None and axis.as_int() != 0):
            continue
        writer = NodeWriter(graph, f"shared_table/{node.name}")
        whole = writer.op("Reshape", [blocks[0], writer.constant([rows, width * scheme.bits // 8])])
        look_up_blocks(graph, writer, node, whole, blocks[1], scheme)


def map_shared(path: Path) -> None:
    """Give the lookups of a written graph a constant of their own over the bytes of the head's."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    reshapes = {node.output[0]: node for node in graph.node if node.op_type == "Reshape"}
    for node in graph.node:
        if node.op_type != LOOKUP or node.input[0] not in reshapes:
            continue
        reshape = reshapes[node.input[0]]
        source = constants[reshape.input[0]]
        if not source.external_data:  # small ones lie in the graph, and their copies are small
            continue
        shape = onnx.numpy_helper.to_array(constants[reshape.input[1]]).tolist()
        whole = graph.initializer.add()
        whole.CopyFrom(source)
        whole.name = f"{source.name}/whole"
        del whole.dims[:]
        whole.dims.extend(shape)
        node.input[0] = whole.name
        graph.node.remove(reshape)
    onnx.save(model, path)
