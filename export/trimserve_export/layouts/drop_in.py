"""The drop-in: a trimmed graph that takes token ids and gives logits over all V ids, as the full one does.

At the input ``Gather(table, input_ids)`` turns token ids into compact ids; at the output every id that was
not kept gets the logit -inf. Weights stay compact in between.

A cold id at the input is fed its own row, from `cold_rows.safetensors` itself: the graph names that tensor as
external data, so ONNX Runtime maps it and pages of it are read only where a text needs them. Without cold
rows there is no row to feed, and no other one is read in its place: the lookup's index is K, which ONNX
Runtime refuses on a CPU; for devices that do not check their index such a row is NaN.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.files.tensors import TensorSpec, read_header
from trimserve.runtime.cold_rows import COLD_INPUT, table_name
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.embeddings import Embedding, find_embeddings
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.nodes import NodeWriter, give_instead, take_over
from trimserve_export.graphs.reading import read_exported
from trimserve_export.graphs.values import check_opset, find_input, find_output
from trimserve_export.graphs.writing import GRAPH_NAME, write_copy
from trimserve_export.serving.cold_slots import add_cold_slots
from trimserve_export.serving.servable import check_table
from trimserve_export.serving.tied_head import tables_of, tie_head

# What ONNX Runtime names when it refuses a cold id.
LOOKUP_NAME: Final = "trimserve/token_id_without_a_row"
# The cold rows among a drop-in's constants.
COLD_TENSOR: Final = "trimserve/cold_rows"
# The node whose input are the logits of the kept ids alone.
COMPACT_LOGITS_NAME: Final = "trimserve/logits/Pad_0"
_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def save_plain(source: Path, output: Path) -> Path:
    """Write an exporter's graph as it is, its weights in external data, which ONNX Runtime maps.

    Args:
        source: the exporter's graph.
        output: the folder for ``model.onnx`` and ``model.onnx_data``; not the source's folder.

    Returns:
        The path of the graph.
    """
    path = output / GRAPH_NAME
    write_copy(read_exported(source, turned=False), path)
    return path


def save_tied(source: Path, output: Path) -> Path:
    """Write an exporter's graph whose head reads the embedding's one tensor where it is tied.

    The quantiser takes a product with that tensor, not one with a transposed view of it.

    Args:
        source: the exporter's graph; it has a vocab head.
        output: see `save_plain`.
    """
    model = read_exported(source)
    head = find_head(model.graph)
    tie_head(model, tables_of(model.graph, head)[0], head)
    RemoveUnusedNodesPass()(model)
    path = output / GRAPH_NAME
    write_copy(model, path)
    return path


def make_drop_in(
    source: Path, output: Path, vocab: VocabMap, *, has_head: bool, cold_path: Path | None = None
) -> Path:
    """Write a graph with the interface of the full model from one with compact ids.

    Args:
        source: the exporter's graph of the trimmed checkpoint.
        output: the folder for ``model.onnx`` and ``model.onnx_data``; not the source's folder.
        vocab: the kept ids.
        has_head: the graph makes logits over the vocab (decoders and fill-mask).
        cold_path: `cold_rows.safetensors` in `output`; None: a cold id at the input is an error.

    Returns:
        The path of the graph.

    Raises:
        UnsupportedModelError: the embedding is not found, or the logits have another width than K.
    """
    path = output / GRAPH_NAME
    write_drop_in(read_exported(source), path, vocab, has_head=has_head, cold_path=cold_path)
    return path


def write_drop_in(
    model: ir.Model,
    path: Path,
    vocab: VocabMap,
    *,
    has_head: bool,
    cold_path: Path | None = None,
    takes_ids: bool = True,
    write: Callable[[ir.Model, Path], None] = write_copy,
) -> None:
    """Make a graph a drop-in, in place, and write it.

    Args:
        model: the graph with compact ids, its lookups in their normal form (`turn_tables`).
        path: the file to write.
        vocab: the kept ids.
        has_head: see `make_drop_in`.
        cold_path: see `make_drop_in`; beside `path`.
        takes_ids: the graph has the input `input_ids`; a decoder behind a graph of embeddings has none.
        write: writes the graph and its weights.

    Raises:
        UnsupportedModelError: see `make_drop_in`.
    """
    check_opset(model)
    specs = read_header(cold_path)[0] if cold_path and vocab.cold_ids.size else {}
    if takes_ids:
        _take_ids(model.graph, vocab, slots=bool(specs))
    if has_head:
        _expand_logits(model.graph, vocab)
    RemoveUnusedNodesPass()(model)
    write(model, path)
    if specs:
        _bind_cold_rows(path, specs)


def _take_ids(graph: ir.Graph, vocab: VocabMap, *, slots: bool) -> None:
    embeddings = find_embeddings(graph)
    for embedding in embeddings:
        check_table(embedding, len(vocab))
    if slots:
        add_cold_slots(graph, embeddings, len(vocab))
    else:
        for table, embedding in enumerate(embeddings):
            _mark_missing_rows(graph, embedding, table)
    _map_input(graph, vocab, slots=slots)


def id_table(vocab: VocabMap, *, slots: bool) -> npt.NDArray[np.int64]:
    """The table from token id to row, int64 (V,).

    Args:
        vocab: the kept ids.
        slots: cold ids have rows K, K+1, ... in the order of `vocab.cold_ids`; else they all have K, which
            no table of K rows holds.
    """
    table = np.full(vocab.vocab_size, len(vocab), np.int64)
    table[vocab.kept_ids] = np.arange(len(vocab))
    if slots:
        table[vocab.cold_ids] += np.arange(vocab.cold_ids.size)
    return table


def _map_input(graph: ir.Graph, vocab: VocabMap, *, slots: bool) -> None:
    """Put the table between `input_ids` and everything that reads it."""
    ids = find_input(graph, "input_ids")
    uses = tuple(ids.uses())
    readers = {use.node for use in uses}
    writer = NodeWriter(graph, "input_ids")
    mapped = writer.op("Gather", [writer.array("compact_ids", id_table(vocab, slots=slots)), ids], axis=0)
    if ids.dtype not in (None, ir.DataType.INT64):
        mapped = writer.op("Cast", [mapped], to=int(ids.dtype))
    writer.insert_before(next(node for node in graph if node in readers))
    _redirect(uses, mapped)


def _redirect(uses: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)


def _mark_missing_rows(graph: ir.Graph, embedding: Embedding, table: int) -> None:
    """Give an id without a row NaN on devices whose lookup does not check its index."""
    embedding.gather.name = table_name(LOOKUP_NAME, table)
    found = embedding.output
    uses = tuple(found.uses())
    writer = NodeWriter(graph, table_name("missing_rows", table))
    ids = writer.op("Cast", [embedding.ids], to=int(ir.DataType.INT64))
    kept = writer.op("Less", [ids, writer.constant(embedding.rows)])
    mask = writer.op("Unsqueeze", [kept, writer.constant([-1])])
    missing = writer.array("missing_row", np.array(np.nan, embedding.dtype.numpy()))
    rows = writer.op("Where", [mask, found, missing])
    writer.insert_after(found.producer() or embedding.gather)
    give_instead(found, rows, uses)


def _expand_logits(graph: ir.Graph, vocab: VocabMap) -> None:
    """Give `logits` the width V: -inf for every id that was not kept."""
    logits = find_output(graph, "logits")
    head = logits.producer()
    if head is None or logits.dtype is None or logits.shape is None or logits.shape[-1] != len(vocab):
        raise UnsupportedModelError(
            f"logits should come from a head with {len(vocab):,} columns, found {logits.shape}."
        )
    axes = list(logits.shape)
    compact = head.outputs[logits.index() or 0]
    writer = NodeWriter(graph, "logits")
    lowest = writer.array("not_kept", np.array(-np.inf, logits.dtype.numpy()))
    pads = writer.constant([0] * (2 * len(axes) - 1) + [1])
    padded = writer.op("Pad", [compact, pads, lowest])
    columns = writer.array("columns", id_table(vocab, slots=False))
    expanded = writer.op("Gather", [padded, columns], axis=len(axes) - 1)
    writer.insert_after(head)
    take_over(compact, expanded)
    if (pad := padded.producer()) is not None:  # it was redirected with the other readers of logits
        pad.replace_input_with(0, compact)
    expanded.shape = ir.Shape([*axes[:-1], vocab.vocab_size])


def _bind_cold_rows(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Turn the inputs `cold_rows`, ... of a written graph into the tensors of `cold_rows.safetensors`."""
    model = ir.load(path)
    inputs = [value for value in model.graph.inputs if str(value.name).partition(".")[0] == COLD_INPUT]
    for table, rows in enumerate(inputs):
        name = table_name(COLD_TENSOR, table)
        _bind(model.graph, rows, specs[table_name("embedding", table)], path.parent, name)
    ir.save(model, path)


def _bind(graph: ir.Graph, rows: ir.Value, spec: TensorSpec, folder: Path, name: str) -> None:
    (lookup,) = rows.consumers()
    stored = _DTYPES[spec.dtype]
    tensor = ir.ExternalTensor(
        spec.path.name,
        spec.offset,
        spec.nbytes,
        stored,
        shape=ir.Shape(spec.shape),
        name=name,
        base_dir=folder,
    )
    constant = ir.Value(name=tensor.name, type=ir.TensorType(stored), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(constant)
    lookup.replace_input_with(0, constant)
    graph.inputs.remove(rows)
    if stored != rows.dtype and rows.dtype is not None:
        _cast_after(graph, lookup, rows.dtype, name)


def _cast_after(graph: ir.Graph, lookup: ir.Node, dtype: ir.DataType, name: str) -> None:
    found = lookup.outputs[0]
    uses = tuple(found.uses())
    found.type = None  # inferred for the graph's dtype, not for the one that is stored
    writer = NodeWriter(graph, f"{name.removeprefix('trimserve/')}/dtype")
    cast = writer.op("Cast", [found], to=int(dtype))
    writer.insert_after(lookup)
    _redirect(uses, cast)
