"""Turn a decoder's graph into ONNX Runtime's fused operators, or say why not.

What is replaced is found by its data flow, and run on numbers beside what replaces it: a layer that is
understood wrongly does not pass.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.folder.manifest import Lengths
from trimserve.runtime.contract import CROSS, PAST
from trimserve_export.fusion.activations import fuse_activations
from trimserve_export.fusion.attention import Attention, find_attention
from trimserve_export.fusion.chains import places_of
from trimserve_export.fusion.flat_products import unflatten_products
from trimserve_export.fusion.linear import pack_products
from trimserve_export.fusion.masks import Windows
from trimserve_export.fusion.norms import fuse_norms, fuse_skips
from trimserve_export.fusion.operator import AttentionWriter, check_same
from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused
from trimserve_export.fusion.rotary import Tables

logger = logging.getLogger(__name__)

# Metadata of a graph: the longest text, in tokens, that it is made for; and what fusing it came to, in JSON.
POSITIONS_KEY, FUSION_KEY = "trimserve.positions", "trimserve.fusion"
_GROUPED = "GroupQueryAttention"
_CONTRIB = "com.microsoft"
_DTYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


@dataclass(frozen=True, slots=True)
class Fusion:
    """What fusing a decoder came to.

    Attributes:
        fused: it has a fused attention in every layer.
        layers: how many it has.
        nodes: of the graph.
        nodes_before: of the graph as it came.
        reason: why it stays as it is, as the end of a sentence about it; None where it is fused.
    """

    fused: bool
    layers: int
    nodes: int
    nodes_before: int
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return dataclasses.asdict(self)


def fuse_decoder(model: ir.Model) -> ir.Model:
    """Fuse a decoder's graph, all its layers or none.

    Args:
        model: as an exporter made it, with `POSITIONS_KEY` in its metadata; not changed.

    Returns:
        The fused graph, or the graph as it was; `FUSION_KEY` of its metadata says which. A graph without
        keys and values of its own is given back without.
    """
    layers = _layers(model.graph)
    if not layers:
        return model
    before, reason, fused = len(list(model.graph)), None, model
    try:
        if all(node.op_type != _GROUPED for node in model.graph):  # else by whoever made it
            model.graph.sort()  # onnx_ir copies nodes in their order
            fused = model.clone()
            _fuse(fused)
    except Unfused as error:
        reason, fused = str(error), model
        logger.info("the decoder's graph stays as it is: %s.", reason)
    found = Fusion(reason is None, len(layers), len(list(fused.graph)), before, reason)
    fused.metadata_props[FUSION_KEY] = json.dumps(found.to_dict())
    return fused


def note_positions(model: ir.Model, lengths: Lengths | None) -> None:
    """Write into a graph how long its texts may be, for `fuse_decoder`."""
    if lengths is not None and lengths.longest is not None:
        model.metadata_props[POSITIONS_KEY] = str(lengths.longest)


def fusion_of(path: Path) -> dict[str, Any] | None:
    """What fusing a graph came to, by its metadata; None of one that is no decoder."""
    found = ir.load(path).metadata_props.get(FUSION_KEY)
    return None if found is None else dict(json.loads(found))


def _layers(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Keys and values of each layer that come in; none of an encoder-decoder."""
    named = {str(value.name): value for value in graph.inputs if str(value.name).startswith(PAST)}
    if any(CROSS in name for name in named):
        return []
    keys = [name for name in named if name.endswith(".key")]
    pairs = [(named[name], named.get(f"{name.removesuffix('key')}value")) for name in keys]
    return [(key, value) for key, value in pairs if value is not None]


def _fuse(model: ir.Model) -> None:
    graph = model.graph
    positions = int(model.metadata_props.get(POSITIONS_KEY, 0))
    dtypes = {value.dtype for pair in _layers(graph) for value in pair}
    if not dtypes <= _DTYPES:
        raise Unfused("GroupQueryAttention takes float32 and float16 on a CPU")
    if positions < 1:
        raise Unfused("neither its exporter nor its config says how long its texts may be")
    model.opset_imports.setdefault(_CONTRIB, 1)
    probe = Probe(model)
    unflatten_products(graph, probe)
    fuse_norms(graph, probe)
    RemoveUnusedNodesPass()(model)  # what is left of them would count as readers
    attentions = _attentions(graph, probe)
    tables, windows = Tables(probe, positions), Windows(probe, positions)
    writer = AttentionWriter(graph, probe)
    for layer, attention in enumerate(attentions):
        rotary = None
        if attention.queries.rope is not None and attention.keys.rope is not None:
            rotary = tables.of(attention.queries.rope)
            if tables.of(attention.keys.rope) is not rotary:
                raise Unfused("its queries and keys are turned by different tables")
        elif attention.queries.rope is not attention.keys.rope:
            raise Unfused("its queries are turned by position and its keys are not, or the other way round")
        window = windows.of(attention.scores.masks)
        fused = writer.write(layer, attention, rotary, window)
        check_same(fused, probe, window, positions)
        for old, new in zip(fused.replaced, fused.values, strict=True):
            probe.take_over(old, new)
    RemoveUnusedNodesPass()(model)
    pack_products(graph, probe)
    fuse_activations(graph, probe)
    fuse_skips(graph, probe)
    RemoveUnusedNodesPass()(model)
    unread = [value for value in graph.inputs if not value.uses() and value.name == "position_ids"]
    for value in unread:
        graph.inputs.remove(value)


def _attentions(graph: ir.Graph, probe: Probe) -> list[Attention]:
    places = places_of(graph)
    return [find_attention(pair, probe, places) for pair in _layers(graph)]
