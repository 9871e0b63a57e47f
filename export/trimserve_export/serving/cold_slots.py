"""Pass 3: ids at or above K are looked up in the input `cold_rows` instead of the embedding."""

import onnx_ir as ir

from trimserve_export.serving.flow import Embedding
from trimserve_export.serving.nodes import NodeWriter, add_input


def add_cold_slots(graph: ir.Graph, embedding: Embedding) -> None:
    """Add the input `cold_rows` (S, H), S >= 1: compact id K + s takes row s of it.

    ``Gather(E, ids)`` becomes ``Where(ids < K, Gather(E, min(ids, K-1)), Gather(cold_rows, max(ids-K, 0)))``.
    Both lookups stay in range for every id, and the rows pass through unchanged. A quantised embedding keeps
    the nodes that dequantise its rows; cold rows are floats.
    """
    rows, width = embedding.rows, embedding.width
    cold_rows = add_input(graph, "cold_rows", embedding.dtype, ["cold_slots", width])
    before = NodeWriter(graph, "cold_slots")
    ids = before.op("Cast", [embedding.ids], to=int(ir.DataType.INT64))  # some exporters look up int32 ids
    kept = before.op("Less", [ids, before.constant(rows)])
    mask = before.op("Unsqueeze", [kept, before.constant([-1])])
    kept_ids = before.op("Min", [ids, before.constant(rows - 1)])
    slots = before.op("Max", [before.op("Sub", [ids, before.constant(rows)]), before.constant(0)])
    slot_rows = before.op("Gather", [cold_rows, slots], axis=0)
    before.insert_before(embedding.gather)
    embedding.gather.replace_input_with(1, kept_ids)
    uses = list(embedding.output.uses())
    after = NodeWriter(graph, "cold_slots/rows")
    result = after.op("Where", [mask, embedding.output, slot_rows])
    for user, index in uses:
        user.replace_input_with(index, result)
    maker = embedding.output.producer() or embedding.gather
    after.insert_after(maker)
