"""The cold head of a vocab head in any layout: the graph's own nodes, cut to the cold ids.

Whatever makes the logits of the kept ids (dequantised blocks, integers, a Gemm) makes those of the cold ids
too, a tile of ids at a time: rows of a head do not depend on each other, so the logits are the full graph's.
The interface is that of `serving/cold_graph.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError
from trimserve.folder.names import COLD_HEAD_NAME, COLD_MAX_NAME, COLD_WEIGHTS_NAME
from trimserve.runtime.cold_head import PARTS_KEY
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export.cold_head.packed import store_packed
from trimserve_export.graphs.head import Head
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.values import find_output, tensor_of
from trimserve_export.graphs.writing import ALIGNMENT
from trimserve_export.serving.last_logits import QUANTIZED_EXTRA
from trimserve_export.trimming.cold_rows import FullGraph
from trimserve_export.trimming.rows import copy_nodes
from trimserve_export.trimming.trim import trim_graph

# A tile's logits of a block of steps stay in a core's cache.
_TILE_ROWS = 8192
_MIN_EXTERNAL_BYTES = 256


def write_graph_head(full: FullGraph, vocab: VocabMap, folder: Path) -> None:
    """Write `cold_head.onnx` (all cold logits), `cold_max.onnx` (the largest of each tile) and their weights.

    Args:
        full: the untrimmed graph; it has a vocab head.
        vocab: the kept ids.
        folder: the trimmed folder.

    Raises:
        UnsupportedModelError: the nodes from the hidden states to the logits depend on more than those.
    """
    if full.head is None:
        raise UnsupportedModelError("the graph has no vocab head.")
    cold_ids = vocab.head.cold_ids
    step = len(cold_ids) if _has_one_scale(full.head) else _TILE_ROWS
    tiles = [cold_ids[start : start + step] for start in range(0, len(cold_ids), step)]
    models = [_tile(full, full.head, ids, vocab.vocab_size, number) for number, ids in enumerate(tiles)]
    stored = [
        value
        for model in models
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and (tensor.nbytes >= _MIN_EXTERNAL_BYTES or isinstance(tensor, ir.ExternalTensor))
    ]
    placed = ir.external_data.convert_tensors_to_external(
        [value.const_value for value in stored if value.const_value is not None],
        folder,
        COLD_WEIGHTS_NAME,
        alignment=ALIGNMENT,
    )
    for value, tensor in zip(stored, placed, strict=True):
        value.const_value = tensor
    paths = [folder / COLD_HEAD_NAME, folder / COLD_MAX_NAME]
    for path, reduced in zip(paths, (False, True), strict=True):
        ir.save(_joined(full, full.head, models, [len(ids) for ids in tiles], reduced=reduced), path)
    parts = (
        ir.to_proto(_joined(full, full.head, [model], [len(ids)], reduced=False))
        for model, ids in zip(models, tiles, strict=True)
    )
    store_packed(paths, folder / COLD_WEIGHTS_NAME, parts)


def _has_one_scale(head: Head) -> bool:
    """Whether one number scales a weight that is dequantised before the product.

    ONNX Runtime makes MatMulNBits of such a product unless its scale is read by another, and then it rounds
    the hidden states, too. Tiles would share the scale, which the full graph's one product has for itself.
    """
    return head.product.op_type in ("MatMul", "FusedMatMul") and (
        head.scales is not None and tensor_of(head.scales).size == 1
    )


def _tile(full: FullGraph, head: Head, ids: Ids, rows: int, number: int) -> ir.Model:
    """Hidden states (1, steps, H) -> logits (1, steps, n) of some ids."""
    hidden = _fed(f"tile_{number}/hidden", head, [1, "steps", _width(head)])
    logits = find_output(full.model.graph, "logits")
    opsets = dict(full.model.graph.opset_imports)
    graph = ir.Graph([hidden], [], nodes=[], opset_imports=opsets, name=f"tile_{number}")
    given = _given_integers(graph, head, hidden) if head.is_dynamic else {head.hidden: hidden}
    if head.flatten is not None and (shape := head.flatten[1].inputs[1]) is not None:
        # In the graph the shape may be made of the input ids'.
        given[shape] = NodeWriter(graph, f"{graph.name}/unflatten").constant([1, -1, rows])
    copied, nodes, constants = copy_nodes(logits, given, f"tile_{number}/")
    graph.extend(nodes)
    for value in constants:
        graph.register_initializer(value)
    copied.name, copied.shape = "logits", ir.Shape([1, "steps", rows])
    graph.outputs.append(copied)
    model = ir.Model(graph, ir_version=10)
    trim_graph(model, VocabMap(ids, np.full(len(ids), Reason.EXPLICIT, np.uint8), rows), has_head=True)
    if head.is_dynamic:
        _subtract_zero_points(graph, hidden, head)
    _scale_each_token(graph, len(ids))
    return model


def _scale_each_token(graph: ir.Graph, count: int) -> None:
    """Give a tile scales and zero points of its own, an equal one for each token instead of one for all.

    ONNX Runtime shares equal numbers between tiles, and a product whose scale is shared is none that it makes
    MatMulNBits of: the full graph's is.
    """
    for node in graph:
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
        if scale is None or scale.const_value is None or scale.const_value.size != 1:
            continue
        matrix = node.inputs[0]
        if matrix is None or matrix.producer() is not None or matrix.shape is None or len(matrix.shape) != 2:
            continue
        node.attributes.add(ir.AttrInt64("axis", list(matrix.shape).index(count)))
        for index, value in enumerate(node.inputs[1:], 1):
            if value is not None and value.const_value is not None:
                numbers = np.full(count, value.const_value.numpy().reshape(()))
                name = f"tile/scale_{index}/{node.name}"
                node.replace_input_with(index, NodeWriter(graph, "tokens").array(name, numbers))


def _width(head: Head) -> int:
    return head.width + QUANTIZED_EXTRA if head.is_dynamic else head.width


def _fed(name: str, head: Head, shape: Sequence[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(head.dtype), shape=ir.Shape(shape))


def _given_integers(graph: ir.Graph, head: Head, hidden: ir.Value) -> dict[ir.Value, ir.Value]:
    """What stands for a DynamicQuantizeLinear: the integers and scale of each step by itself, no zero point.

    See `serving/last_logits.py` for what the hidden states hold.
    """
    if head.quantizer is None:
        return {}
    writer = NodeWriter(graph, f"{graph.name}/integers")
    axis = writer.constant([2])
    floats = writer.op("Slice", [hidden, writer.constant([0]), writer.constant([head.width]), axis])
    scale = writer.op(
        "Slice", [hidden, writer.constant([head.width]), writer.constant([head.width + 1]), axis]
    )
    integers = writer.op("Cast", [floats], to=int(ir.DataType.UINT8))
    scale.shape = ir.Shape([1, "steps", 1])  # not one a token
    nothing = writer.array("nothing", np.array(0, np.uint8))
    writer.append()
    return dict(zip(head.quantizer.outputs, (integers, scale, nothing), strict=True))


def _subtract_zero_points(graph: ir.Graph, hidden: ir.Value, head: Head) -> None:
    """``(q - z) W = q W - z (1 W)``: MatMulInteger takes one zero point for all steps, not each one's own."""
    product = next(node for node in graph if node.op_type == "MatMulInteger")
    whole = product.outputs[0]
    uses = tuple(whole.uses())
    writer = NodeWriter(graph, f"{graph.name}/zero_points")
    ends = [writer.constant([head.width + 1]), writer.constant([head.width + 2]), writer.constant([2])]
    zeros = writer.op("Cast", [writer.op("Slice", [hidden, *ends])], to=int(ir.DataType.INT32))
    ones = writer.array("ones", np.ones((1, 1, head.width), np.uint8))
    sums = writer.op("MatMulInteger", [ones, *product.inputs[1:]])
    rest = writer.op("Sub", [whole, writer.op("Mul", [zeros, sums])])
    writer.insert_after(product)
    for node, index in uses:
        node.replace_input_with(index, rest)


def _joined(
    full: FullGraph, head: Head, tiles: Sequence[ir.Model], sizes: Sequence[int], *, reduced: bool
) -> ir.Model:
    """Tiles side by side over one input: `logits` (rows, steps), or `maximum` and `row` (tiles, steps)."""
    hidden = _fed("hidden_states", head, ["steps", _width(head)])
    opsets = dict(full.model.graph.opset_imports)
    graph = ir.Graph([hidden], [], nodes=[], opset_imports=opsets, name="cold_head")
    writer = NodeWriter(graph, "cold_head")
    batch = writer.op("Reshape", [hidden, writer.constant([1, -1, _width(head)])])
    writer.append()
    parts: list[list[ir.Value]] = []
    starts = np.cumsum([0, *sizes]).tolist()
    for number, (tile, size) in enumerate(zip(tiles, sizes, strict=True)):
        logits, nodes, constants = copy_nodes(tile.graph.outputs[0], {tile.graph.inputs[0]: batch})
        logits.name = f"tile_{number}/logits"
        graph.extend(nodes)
        for value in constants:
            if value.name not in graph.initializers:
                graph.register_initializer(value)
        writer = NodeWriter(graph, f"tile_{number}")
        columns = writer.op("Reshape", [logits, writer.constant([-1, size])])
        turned = writer.op("Transpose", [columns])
        parts.append(_largest(writer, turned, starts[number]) if reduced else [turned])
        writer.append()
    writer = NodeWriter(graph, "joined")
    for name, values in zip(
        ("maximum", "row") if reduced else ("logits",), zip(*parts, strict=True), strict=True
    ):
        value = writer.op("Concat", values, output=name, axis=0)
        dtype = ir.DataType.INT64 if name == "row" else find_output(full.model.graph, "logits").dtype
        value.type, value.shape = ir.TensorType(dtype or head.dtype), ir.Shape([None, "steps"])
        graph.outputs.append(value)
    writer.append()
    rows = json.dumps([sum(sizes)])
    return ir.Model(graph, ir_version=10, producer_name="trimserve", metadata_props={PARTS_KEY: rows})


def _largest(writer: NodeWriter, logits: ir.Value, start: int) -> list[ir.Value]:
    """The largest logit of each step, the lowest row of equal ones, and its row among all cold ids."""
    value, place = writer.ops("TopK", [logits, writer.constant([1])], 2, axis=0)
    return [value, writer.op("Add", [place, writer.constant(start)])]
