"""Find the embedding and the head of a graph by following the data: from `input_ids`, and back from `logits`.

Never by a dimension that equals the vocab size: position tables and linear layers can have that, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.graphs.values import (
    describe,
    find_input,
    matrix_behind,
    shape_of,
    tensor_of,
)
from trimserve_export.graphs.vocab_flow import BOUNDS, IdUse, uses_of_ids

_LOGIC = frozenset({"And", "Or", "Not"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})

Reads = tuple[tuple[ir.Node, int], ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table that a graph looks token ids up in: the token embedding, or one of per-layer embeddings.

    Attributes:
        gather: the node ``Gather(table, ids)`` or ``GatherBlockQuantized(table, ids, ...)``.
        ids: its second input, in the shape that the graph made of `input_ids`.
        fed: the token ids, in the same shape; other than `ids` where the graph replaces those that this table
            has no row for (``Where(ids < 262144, ids, 0)``, Gemma 3n).
        reads: the nodes, and which input of each, that read `fed` for this lookup.
        table: the constant (K, H); of a quantised embedding the integers, K rows of some shape.
        output: the rows that were looked up, as floats: the node's own output, or that of the
            DequantizeLinear behind it.
        width: H.
        dtype: type of `output`.
    """

    gather: ir.Node
    ids: ir.Value
    fed: ir.Value
    reads: Reads
    table: ir.Value
    output: ir.Value
    width: int
    dtype: ir.DataType

    @property
    def rows(self) -> int:
        """K; fewer where the table has none for the last ids."""
        return shape_of(self.table)[0]

    @property
    def is_guarded(self) -> bool:
        """Whether the graph replaces ids that the table has no row for."""
        return self.ids is not self.fed


def find_embeddings(graph: ir.Graph) -> tuple[Embedding, ...]:
    """Follow `input_ids` to the tables that it is looked up in, in the order of their nodes; at least one.

    Raises:
        UnsupportedModelError: no table, tables of two types, or a node that computes with the ids themselves.
    """
    found: list[Embedding] = []
    for use in uses_of_ids(find_input(graph, "input_ids")):
        embedding = _looked_up(use.node, use.ids) if use.node.graph is graph else None
        if embedding is not None and _is_direct(use):
            found.append(embedding if use.choice is None else _guarded(embedding, use.choice))
        elif not _is_harmless(use):
            raise UnsupportedModelError(
                f"{describe(use.node)} depends on the token ids themselves: compact ids would change its "
                "result."
            )
    if not found:
        raise UnsupportedModelError("expected a table that input_ids is looked up in, found 0.")
    for embedding in found:
        if embedding.dtype not in _FLOATS or embedding.dtype != found[0].dtype:
            raise UnsupportedModelError(
                f"{describe(embedding.gather)} looks up {embedding.dtype.name} rows: expected floats, "
                "of one type in all tables."
            )
    order = {node: place for place, node in enumerate(graph)}
    return tuple(sorted(found, key=lambda embedding: order[embedding.gather]))


def _is_direct(use: IdUse) -> bool:
    """Whether ids, once some were replaced, go to the node as they are: in the shape they were fed in."""
    return use.choice is None or (use.choice.choice is None and use.ids is use.choice.node.outputs[0])


def _guarded(embedding: Embedding, choice: IdUse) -> Embedding:
    """A lookup of ids of which the graph replaces those that the table has no row for."""
    reads = ((choice.node, choice.index), *_bounds_of(choice.node, choice.ids))
    return replace(embedding, fed=choice.ids, reads=reads)


def _is_harmless(use: IdUse) -> bool:
    """Whether compact ids, and those of slots, change nothing in what a node makes of ids.

    Equal compares with a special token (RoBERTa's pad): compact ids of special tokens are constants of the
    graph, cold slots equal none.
    """
    if use.node.op_type == "Equal":
        return True
    if use.choice is not None:
        return False
    return use.is_choice or (use.node.op_type in BOUNDS and _only_chooses(use.node, use.ids))


def _only_chooses(node: ir.Node, ids: ir.Value) -> bool:
    """Whether a comparison does nothing but tell a Where which of the same ids to replace."""
    uses = tuple(node.outputs[0].uses())
    chosen = [
        (user.op_type == "Where" and index == 0 and ids in user.inputs[1:])
        or (user.op_type in _LOGIC and _only_chooses(user, ids))
        for user, index in uses
    ]
    return bool(chosen) and all(chosen) and not node.outputs[0].is_graph_output()


def _bounds_of(choice: ir.Node, ids: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The comparisons of ids that a Where chooses by."""
    condition = choice.inputs[0]
    pending = [] if condition is None else [condition]
    while pending:
        node = pending.pop().producer()
        if node is not None and node.op_type in _LOGIC:
            pending += [value for value in node.inputs if value is not None]
        elif node is not None:
            yield from ((node, index) for index, value in enumerate(node.inputs) if value is ids)


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
    dtype = tensor_of(scale or table).dtype
    return Embedding(node, ids, ids, ((node, 1),), table, output, shape_of(table)[1], dtype)


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
    dtype = tensor_of(scales).dtype
    return Embedding(node, ids, ids, ((node, 1),), value, node.outputs[0], columns * packed, dtype)
