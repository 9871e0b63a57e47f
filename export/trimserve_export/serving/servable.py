"""Make an exported graph servable: last logits, hidden states, cold slots, tied weights, shapes.

The passes are apart so that each can be tested and read alone; `make_servable` runs them in order and
writes the graph with its weights in external data, which ONNX Runtime maps instead of copying.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.runtime.after_head import AFTER_HEAD_KEY
from trimserve.runtime.decoder import SHARED_KV_KEY
from trimserve_export.fusion.fuse import fuse_decoder
from trimserve_export.graphs.embeddings import Embedding
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.reading import read_exported
from trimserve_export.graphs.values import check_opset, describe
from trimserve_export.graphs.writing import GRAPH_NAME, write_copy
from trimserve_export.serving.cold_slots import add_cold_slots
from trimserve_export.serving.last_logits import slice_before_head
from trimserve_export.serving.tied_head import tables_of, tie_head
from trimserve_export.serving.unfused_head import unfuse_head
from trimserve_export.shapes.fix import fix_shapes

_ADDED = {"cold_rows", "logits_to_keep", "hidden_states"}
# What the runtime feeds, besides the past.
_KNOWN = {"input_ids", "attention_mask", "token_type_ids", "position_ids"} | _ADDED


@dataclass(frozen=True, slots=True)
class ServableGraph:
    """A graph that the runtime can serve.

    Attributes:
        path: the graph; its weights are in ``<name>_data`` beside it.
        tied: embedding and head are one tensor.
        files: names of the files that were written.
    """

    path: Path
    tied: bool
    files: tuple[str, ...]


def make_servable(
    source: Path, output: Path, *, rows: int, has_head: bool, fuses: bool = True
) -> ServableGraph:
    """Run the serving passes on a graph and write the result.

    Args:
        source: the exporter's graph.
        output: the folder for ``model.onnx`` and ``model.onnx_data``; not the source's folder.
        rows: K, the rows that embedding and head must have.
        has_head: the graph makes logits over the vocab (decoders and fill-mask).
        fuses: fuse a decoder's graph; graphs for other runtimes are not.

    Raises:
        UnsupportedModelError: the embedding or the head is not found, or has other rows; nothing is
            written then.
    """
    return serve(read_exported(source), output, rows=rows, has_head=has_head, fuses=fuses)


def serve(
    model: ir.Model,
    output: Path,
    *,
    rows: int,
    has_head: bool,
    head_rows: int | None = None,
    fuses: bool = True,
    write: Callable[[ir.Model, Path], None] = write_copy,
) -> ServableGraph:
    """Fuse a graph in memory where it is a decoder's, run the serving passes on it, and write the result.

    Args:
        model: the exporter's graph, its lookups in their normal form, which may be changed; its large tensors
            may lie in files.
        output: see `make_servable`.
        rows: see `make_servable`.
        has_head: see `make_servable`.
        head_rows: rows of the head, where it has fewer than the embedding.
        fuses: see `make_servable`.
        write: writes the graph and its weights.

    Raises:
        UnsupportedModelError: see `make_servable`.
    """
    _check_inputs(model.graph)
    if fuses:
        model = fuse_decoder(model)
    tied = apply_passes(model, rows=rows, has_head=has_head, head_rows=head_rows)
    path = output / GRAPH_NAME
    write(model, path)
    return ServableGraph(path, tied, (path.name, f"{path.name}_data"))


def apply_passes(model: ir.Model, *, rows: int, has_head: bool, head_rows: int | None = None) -> bool:
    """Run the serving passes on a graph in place.

    Args:
        model: the exporter's graph.
        rows: see `make_servable`.
        has_head: see `make_servable`.
        head_rows: see `serve`.

    Returns:
        Whether embedding and head are one tensor.

    Raises:
        UnsupportedModelError: see `make_servable`.
    """
    check_opset(model)
    _check_untouched(model.graph)
    if has_head:
        unfuse_head(model.graph)
    head = find_head(model.graph) if has_head else None
    embeddings = tables_of(model.graph, head)
    for embedding in embeddings:
        check_table(embedding, rows)
    tied = False
    if head is not None:
        _check_rows(head.product, head.rows, head_rows or rows)
        model.metadata_props[AFTER_HEAD_KEY] = json.dumps(head.after)
        slice_before_head(model.graph, head)
        tied = tie_head(model, embeddings[0], head)
    if any(node.op_type == "GroupQueryAttention" for node in model.graph):
        model.metadata_props[SHARED_KV_KEY] = "true"
    add_cold_slots(model.graph, embeddings, rows)
    fix_shapes(model.graph)
    RemoveUnusedNodesPass()(model)
    return tied


def _check_inputs(graph: ir.Graph) -> None:
    names = [str(value.name) for value in graph.inputs]
    unknown = [name for name in names if name not in _KNOWN and not name.startswith("past_key_values.")]
    if unknown:
        raise UnsupportedModelError(
            f"the graph has the input {unknown[0]}, which the runtime does not feed: "
            "this model cannot be served yet."
        )


def _check_untouched(graph: ir.Graph) -> None:
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} & _ADDED
    if taken:
        raise UnsupportedModelError(
            f"the graph already has {', '.join(sorted(map(str, taken)))}: was it made servable before?"
        )


def check_table(embedding: Embedding, expected: int) -> None:
    """Refuse a table of other rows than K; fewer are right where the graph replaces ids beyond them.

    Raises:
        UnsupportedModelError: see above.
    """
    if not embedding.is_guarded or embedding.rows > expected:
        _check_rows(embedding.gather, embedding.rows, expected)


def _check_rows(node: ir.Node, found: int, expected: int) -> None:
    if found != expected:
        raise UnsupportedModelError(
            f"{describe(node)} has a table of {found:,} rows where {expected:,} were expected: "
            "the exporter did not export the trimmed checkpoint's vocab there."
        )
