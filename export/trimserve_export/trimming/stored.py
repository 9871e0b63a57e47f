"""Trim a graph as it is stored, and only then bring its lookups into their normal form."""

import onnx_ir as ir

from trimserve.folder.manifest import CutTensor
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.turned import turn_tables
from trimserve_export.trimming.facts import cut_tensors
from trimserve_export.trimming.trim import trim_graph, trim_head


def trim_stored(model: ir.Model, vocab: VocabMap, *, has_head: bool) -> tuple[CutTensor, ...]:
    """Cut a graph to the kept ids, in place, and its head to the output ids where a vocab has some.

    Turned first, a matrix that embedding and head share would be two tables, each of them cut and listed.

    Args:
        model: a graph read with ``turned=False``; afterwards its lookups are in their normal form.
        vocab: the kept ids; its `vocab_size` must be the rows of the graph's tables.
        has_head: the output `logits` has one entry a token, along its last axis.

    Returns:
        What was cut.

    Raises:
        UnsupportedModelError: see `trim_graph`; the model is of no use then.
    """
    separate = vocab.output_ids is not None
    cut = cut_tensors(trim_graph(model, vocab, has_head=has_head and not separate), len(vocab))
    if separate and has_head:
        cut += cut_tensors(trim_head(model, vocab.head), len(vocab.head))
    turn_tables(model.graph)
    return cut
