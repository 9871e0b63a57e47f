"""Pass 3: ids at or above K are looked up in the input `cold_rows` instead of the embedding."""

import onnx_ir as ir

from trimserve_export.serving.flow import Embedding
from trimserve_export.serving.nodes import NodeWriter, add_input


def add_cold_slots(graph: ir.Graph, embedding: Embedding) -> None:
    """Add the input `cold_rows` (S, H), S >= 1: compact id K + s takes row s of it.

    ``Gather(E, ids)`` becomes ``Where(ids < K, Gather(E, min(ids, K-1)), Gather(cold_rows, max(ids-K, 0)))``.
    Both lookups stay in range for every id, and the rows pass through unchanged.
    """
    rows, width = embedding.rows, embedding.width
    cold_rows = add_input(graph, "cold_rows", embedding.dtype, ["cold_slots", width])
    writer = NodeWriter(graph, "cold_slots")
    ids = writer.op("Cast", [embedding.ids], to=int(ir.DataType.INT64))  # some exporters look up int32 ids
    kept = writer.op("Less", [ids, writer.constant(rows)])
    mask = writer.op("Unsqueeze", [kept, writer.constant([-1])])
    kept_ids = writer.op("Min", [ids, writer.constant(rows - 1)])
    slots = writer.op("Max", [writer.op("Sub", [ids, writer.constant(rows)]), writer.constant(0)])
    kept_rows = writer.op("Gather", [embedding.table, kept_ids], axis=0)
    slot_rows = writer.op("Gather", [cold_rows, slots], axis=0)
    result = writer.op("Where", [mask, kept_rows, slot_rows])
    writer.insert_before(embedding.gather)
    ir.convenience.replace_all_uses_with(embedding.gather.outputs[0], result)
    graph.remove(embedding.gather, safe=True)
