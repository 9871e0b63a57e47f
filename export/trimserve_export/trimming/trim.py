"""Trim a graph in place: find its vocab axis, check that all of it was found, cut."""

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.values import find_output
from trimserve_export.trimming.logits import follow_logits
from trimserve_export.trimming.lookups import follow_ids
from trimserve_export.trimming.plan import VocabPlan

# Names of a graph's token ids; encoder-decoders of older exporters have the second.
IDS = ("input_ids", "decoder_input_ids")
LOGITS = "logits"


def plan_trim(model: ir.Model, rows: int, *, has_head: bool) -> VocabPlan:
    """Find what has to change; nothing is changed yet.

    Args:
        model: as `load_graph` gives it with ``turned=False``.
        rows: V.
        has_head: its output `logits` has one entry a token, along its last axis.

    Raises:
        UnsupportedModelError: something is not understood; the message names the node.
    """
    plan = VocabPlan(rows)
    for value in model.graph.inputs:
        if value.name in IDS:
            follow_ids(plan, value)
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if has_head:
        if logits is None:
            names = ", ".join(str(value.name) for value in model.graph.outputs)
            raise UnsupportedModelError(f"the graph has no output {LOGITS}: it has {names}.")
        follow_logits(plan, logits)
    if not plan.cuts:
        raise UnsupportedModelError("the graph looks no token ids up and makes no logits: nothing to trim.")
    plan.check(logits)
    return plan


def trim_graph(model: ir.Model, vocab: VocabMap, *, has_head: bool) -> VocabPlan:
    """Cut a graph to the kept ids, in place.

    Args:
        model: as `load_graph` gives it with ``turned=False``.
        vocab: the kept ids; its `vocab_size` must be the rows of the graph's tables.
        has_head: see `plan_trim`.

    Returns:
        What was changed.

    Raises:
        UnsupportedModelError: see `plan_trim`; or the graph compares token ids with one that is not kept.
            The model is of no use then.
    """
    plan = plan_trim(model, vocab.vocab_size, has_head=has_head)
    plan.apply(vocab)
    return plan


def trim_head(model: ir.Model, vocab: VocabMap) -> VocabPlan:
    """Cut the vocab head alone to some ids, in place; the embedding stays as it is.

    Args:
        model: as `load_graph` gives it with ``turned=False``; embedding and head are two tensors.
        vocab: the ids that stay; its `vocab_size` must be the rows of the head.

    Returns:
        What was changed.

    Raises:
        UnsupportedModelError: see `plan_trim`.
    """
    logits = find_output(model.graph, LOGITS)
    plan = VocabPlan(vocab.vocab_size)
    follow_logits(plan, logits)
    plan.check(logits)
    plan.apply(vocab)
    return plan
