"""Trimmed graphs for this runtime: serving passes, cold rows, and for generators the cold head."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import CutTensor
from trimserve.folder.names import COLD_NAME
from trimserve.folder.tasks import GENERATOR_TASKS
from trimserve.vocab.map import VocabMap
from trimserve_export.cold_head.writing import write_cold_head
from trimserve_export.from_graph.cold_head import write_graph_head
from trimserve_export.graphs.embeddings import Embedding, find_embeddings
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.reading import GraphFiles
from trimserve_export.graphs.turned import turn_tables
from trimserve_export.graphs.writing import GRAPH_NAME, LinkingWriter, Writer, write_copy
from trimserve_export.serving.quantize import scheme_of
from trimserve_export.serving.seq2seq import DECODER_NAME, ENCODER_NAME, add_cross_attention, save_sharing
from trimserve_export.serving.servable import apply_passes, serve
from trimserve_export.serving.tied_head import same_tables, tables_of
from trimserve_export.serving.unfused_head import unfuse_head
from trimserve_export.trimming.cold_rows import (
    FullGraph,
    multiplied_by_graph,
    write_cold_blocks,
    write_cold_rows,
)
from trimserve_export.trimming.parts import ENCODER, FIRST, LATER, MERGED, Part
from trimserve_export.trimming.stored import trim_stored

logger = logging.getLogger(__name__)

# The branch of a merged decoder that `use_cache_branch` chooses.
_CACHED = "then_branch"


def full_graph(model: ir.Model, *, has_head: bool) -> FullGraph:
    """An untrimmed graph with its embedding and head found, the head taken apart if it is a fused one."""
    if has_head:
        unfuse_head(model.graph)
    head = find_head(model.graph) if has_head else None
    return FullGraph(model, tables_of(model.graph, head), head)


def write_servable(
    untrimmed: ir.Model,
    trimmed: ir.Model,
    vocab: VocabMap,
    folder: Path,
    *,
    task: str,
    cold: bool,
    has_head: bool,
    writer: Writer = write_copy,
) -> dict[str, str]:
    """Write `model.onnx` and, where asked for, its cold rows and cold head; returns role -> file name."""
    logger.info("making the graph servable")
    full = full_graph(untrimmed, has_head=has_head)
    rows, head_rows = len(vocab), len(vocab.head)
    path = serve(trimmed, folder, rows=rows, head_rows=head_rows, has_head=has_head, write=writer).path
    if cold:
        write_cold(full, path, vocab, folder, exact=task in GENERATOR_TASKS)
    return {"model": GRAPH_NAME}


def write_cold(full: FullGraph, served: Path, vocab: VocabMap, folder: Path, *, exact: bool) -> None:
    """Write cold rows and, for exact mode, the cold head.

    Raises:
        UnsupportedModelError: the head cannot be multiplied with cold rows as the graph would do it.
    """
    write_cold_rows(full, vocab, folder / COLD_NAME)
    if full.head is None or not exact:
        return
    if multiplied_by_graph(full.model.graph, full.head):
        write_graph_head(full, vocab, folder)
        return
    blocks = None
    if full.head.is_quantized:
        blocks = write_cold_blocks(full.head, scheme_of(full.head.product), vocab, folder)
    write_cold_head(served, folder / COLD_NAME, blocks)


def load_seq2seq(parts: Mapping[str, Part], files: GraphFiles, *, turned: bool = True) -> dict[str, ir.Model]:
    """Read an encoder, and its decoder for the first and for later tokens.

    Args:
        parts: the parts of one variant, by name.
        files: reads them.
        turned: see `load_graph`.

    Returns:
        The graphs by the names of those parts.

    Raises:
        UnsupportedModelError: a part is missing.
    """
    if FIRST in parts and LATER in parts:
        return {name: files.copy(parts[name].path, turned=turned) for name in (ENCODER, FIRST, LATER)}
    if MERGED not in parts:
        raise UnsupportedModelError(
            f"beside {ENCODER}.onnx there are {', '.join(sorted(parts))}: expected {MERGED}.onnx, or "
            f"{FIRST}.onnx and {LATER}.onnx."
        )
    models = {ENCODER: files.copy(parts[ENCODER].path, turned=turned)}
    for name, branch in ((FIRST, "else_branch"), (LATER, _CACHED)):
        models[name] = take_branch(files.copy(parts[MERGED].path, turned=False), branch)
        if turned:
            turn_tables(models[name].graph)
    return models


def take_branch(model: ir.Model, name: str) -> ir.Model:
    """Turn a merged decoder into the decoder of one of its branches, in place.

    Raises:
        UnsupportedModelError: the graph's outputs do not all come from one If.
    """
    graph = model.graph
    choice = graph.outputs[0].producer()
    if choice is None or choice.op_type != "If" or any(v.producer() is not choice for v in graph.outputs):
        raise UnsupportedModelError("the merged decoder does not choose between two decoders by one If.")
    branch = choice.attributes[name].as_graph()
    other = choice.attributes["else_branch" if name == "then_branch" else "then_branch"].as_graph()
    for node in other.all_nodes():  # they would go on counting as users of the weights
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    made = [branch.outputs[value.index() or 0] for value in graph.outputs]
    for value, whole in zip(made, graph.outputs, strict=True):
        whole_name, whole.name = whole.name, f"{whole.name}/merged"
        value.name, value.type, value.shape = whole_name, whole.type, whole.shape
    constants = list(branch.initializers.values())
    branch.initializers.clear()
    for constant in constants:
        graph.register_initializer(constant)
    nodes = list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.outputs.clear()
    graph.insert_before(choice, nodes)
    graph.remove(choice, safe=True)
    # Behind a cache the cross-attention's keys and values are no result: the branch gives empty ones.
    graph.outputs.extend(v for v in made if name != _CACHED or ".encoder." not in str(v.name))
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(value)
    return model


def write_seq2seq(
    parts: Mapping[str, Part],
    files: GraphFiles,
    vocab: VocabMap,
    folder: Path,
    *,
    cold: bool,
    writer: Writer = write_copy,
) -> tuple[dict[str, str], tuple[CutTensor, ...]]:
    """Write an encoder-decoder's two graphs and, where asked for, cold rows and cold head.

    Returns:
        Role -> file name, and what was cut.

    Raises:
        UnsupportedModelError: a part is not understood, or encoder and decoder have different tables.
    """
    untrimmed, trimmed = load_seq2seq(parts, files), load_seq2seq(parts, files, turned=False)
    full = full_graph(untrimmed[LATER], has_head=True)
    tables = find_embeddings(untrimmed[ENCODER].graph)
    if cold and not _same_rows(tables, full.embeddings):
        raise UnsupportedModelError(
            f"encoder and decoder look ids up in different tables ({_names(tables)} and "
            f"{_names(full.embeddings)}): one cold row cannot be fed to both."
        )
    cut = trim_stored(trimmed[ENCODER], vocab, has_head=False)
    cut += trim_stored(trimmed[LATER], vocab, has_head=True)
    serve_seq2seq(trimmed, folder, rows=len(vocab), writer=writer)
    if cold:
        write_cold(full, folder / DECODER_NAME, vocab, folder, exact=True)
    return {"encoder": ENCODER_NAME, "decoder": DECODER_NAME}, cut


def _same_rows(first: Sequence[Embedding], second: Sequence[Embedding]) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(same_tables(one.table, other.table) for one, other in pairs)


def _names(tables: Sequence[Embedding]) -> str:
    return ", ".join(str(embedding.table.name) for embedding in tables)


def serve_seq2seq(
    models: Mapping[str, ir.Model], folder: Path, *, rows: int, writer: Writer = write_copy
) -> Path:
    """Run the serving passes on an encoder-decoder's graphs and write two; returns the decoder's path."""
    encoder, decoder = models[ENCODER], models[LATER]
    add_cross_attention(encoder, models[FIRST])
    apply_passes(encoder, rows=rows, has_head=False)
    apply_passes(decoder, rows=rows, has_head=True)
    if isinstance(writer, LinkingWriter):
        writer(encoder, folder / ENCODER_NAME)
        writer(decoder, folder / DECODER_NAME)
    else:
        save_sharing({ENCODER_NAME: encoder, DECODER_NAME: decoder}, folder)
    return folder / DECODER_NAME
