"""Pass 4: a head that is the embedding reads the embedding's one tensor, through FusedMatMul(transB)."""

import numpy as np
import onnx_ir as ir

from trimserve_export.graphs.embeddings import Embedding, find_embeddings
from trimserve_export.graphs.head import Head
from trimserve_export.graphs.nodes import NodeWriter, take_over

_CONTRIB = "com.microsoft"
_BLOCK_BYTES = 8 << 20


def tie_head(model: ir.Model, embedding: Embedding, head: Head) -> bool:
    """Let the head read the embedding's tensor where their numbers are the same.

    ONNX Runtime folds ``Transpose(E)`` into a private copy of E, and some exporters (optimum-onnx with
    Gemma 3) already store that copy. ``FusedMatMul(h, E, transB=1)`` needs neither.

    Returns:
        Whether the head is tied now.
    """
    floats = head.product.op_type in ("MatMul", "FusedMatMul") and head.is_plain
    if not floats or not same_numbers(embedding.table, head):
        return False
    if head.product.op_type == "FusedMatMul" and head.weight is embedding.table:
        return True
    writer = NodeWriter(model.graph, "tied_head")
    operands = [head.product.inputs[0], embedding.table]
    product = writer.op("FusedMatMul", operands, domain=_CONTRIB, transA=0, transB=1)
    writer.insert_before(head.product)
    take_over(head.product.outputs[0], product)
    model.graph.remove(head.product, safe=True)
    model.opset_imports.setdefault(_CONTRIB, 1)
    return True


def tables_of(graph: ir.Graph, head: Head | None) -> tuple[Embedding, ...]:
    """The tables that token ids are looked up in, one that is the head's first: cold rows of it serve both.

    Raises:
        UnsupportedModelError: see `find_embeddings`.
    """
    found = find_embeddings(graph)
    if head is None or len(found) == 1:
        return found
    return tuple(sorted(found, key=lambda embedding: not _is_heads(embedding.table, head)))


def _is_heads(table: ir.Value, head: Head) -> bool:
    return head.weight is table or same_numbers(table, head)


def same_numbers(table: ir.Value, head: Head) -> bool:
    """Compare the embedding (K, H) with the head's weight, whichever way that lies, block by block."""
    if head.weight is table:
        return head.by_row
    return same_tables(table, head.weight, turned=not head.by_row)


def same_tables(first: ir.Value, second: ir.Value, *, turned: bool = False) -> bool:
    """Compare two matrices, block by block; the second one may lie `turned`."""
    one, other = first.const_value, second.const_value
    # Entries that are cut when they are written would be made here: compare what they are cut from, which
    # is mapped.
    wholes = getattr(one, "whole", None), getattr(other, "whole", None)
    if None not in wholes:
        one, other = wholes
    if one is None or other is None or one.dtype != other.dtype:
        return False
    rows, weights = one.numpy(), other.numpy().T if turned else other.numpy()
    if rows.shape != weights.shape:
        return False
    step = max(1, _BLOCK_BYTES // max(rows[:1].nbytes, 1))
    blocks = range(0, len(rows), step)
    return all(_same_bits(rows[start : start + step], weights[start : start + step]) for start in blocks)


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    bits = np.dtype(f"u{first.dtype.itemsize}")
    return np.array_equal(np.ascontiguousarray(first).view(bits), np.ascontiguousarray(second).view(bits))
