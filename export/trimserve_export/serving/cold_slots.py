"""Pass 3: ids at or above K are looked up in the inputs `cold_rows`, ... instead of the tables."""

from collections.abc import Sequence

import onnx_ir as ir

from trimserve.runtime.cold_rows import COLD_INPUT, table_name
from trimserve_export.graphs.embeddings import Embedding
from trimserve_export.graphs.nodes import NodeWriter, add_input, give_instead


def add_cold_slots(graph: ir.Graph, embeddings: Sequence[Embedding], rows: int) -> None:
    """Add the input `cold_rows` (S, H), S >= 1: compact id K + s takes row s of it.

    ``Gather(E, ids)`` becomes ``Where(ids < K, Gather(E, min(ids, K-1)), Gather(cold_rows, max(ids-K, 0)))``.
    Both lookups stay in range for every id, and the rows pass through unchanged. A quantised embedding keeps
    the nodes that dequantise its rows; cold rows are floats. Each further table has an input of its own,
    `cold_rows.1` and so on: slot s is row s of each.

    Args:
        graph: the graph.
        embeddings: its tables, the token embedding first.
        rows: K.
    """
    inputs = [
        add_input(graph, table_name(COLD_INPUT, table), embedding.dtype, ["cold_slots", embedding.width])
        for table, embedding in enumerate(embeddings)
    ]
    places: dict[ir.Value, _Places] = {}
    for number, fed in enumerate(dict.fromkeys(embedding.fed for embedding in embeddings)):
        readers = {node for embedding in embeddings if embedding.fed is fed for node, _ in embedding.reads}
        writer = NodeWriter(graph, table_name("cold_slots", number))
        places[fed] = _Places(writer, fed, rows)
        writer.insert_before(next(node for node in graph if node in readers))
    for embedding, cold_rows in zip(embeddings, inputs, strict=True):
        _choose_rows(graph, embedding, places[embedding.fed], cold_rows)


class _Places:
    """Where token ids that stand in one value are looked up: in the tables' rows, or in slots.

    Attributes:
        is_kept: bool (..., 1), below K.
        kept: the ids, none above K - 1.
        slots: the slots, none below 0.
    """

    def __init__(self, writer: NodeWriter, fed: ir.Value, rows: int) -> None:
        ids = writer.op("Cast", [fed], to=int(ir.DataType.INT64))  # some exporters look up int32 ids
        below = writer.op("Less", [ids, writer.constant(rows)])
        self.is_kept = writer.op("Unsqueeze", [below, writer.constant([-1])])
        self.kept = writer.op("Min", [ids, writer.constant(rows - 1)])
        if fed.dtype not in (None, ir.DataType.INT64):  # what compares or replaces ids takes no other type
            self.kept = writer.op("Cast", [self.kept], to=int(fed.dtype))
        self.slots = writer.op("Max", [writer.op("Sub", [ids, writer.constant(rows)]), writer.constant(0)])


def _choose_rows(graph: ir.Graph, embedding: Embedding, places: _Places, cold_rows: ir.Value) -> None:
    """Let one lookup take the rows of cold ids from their input."""
    for node, index in embedding.reads:
        node.replace_input_with(index, places.kept)
    uses = tuple(embedding.output.uses())
    writer = NodeWriter(graph, "cold_slots/" + str(cold_rows.name))
    slot_rows = writer.op("Gather", [cold_rows, places.slots], axis=0)
    result = writer.op("Where", [places.is_kept, embedding.output, slot_rows])
    writer.insert_after(embedding.output.producer() or embedding.gather)
    give_instead(embedding.output, result, uses)
