"""Passes 1 and 2: logits for the last positions alone, and the hidden states that they come from."""

import numpy as np
import onnx_ir as ir

from trimserve_export.graphs.head import Head
from trimserve_export.graphs.nodes import NodeWriter, add_input
from trimserve_export.graphs.values import find_output

LENGTH = "logits_length"  # name of the sequence axis that logits_to_keep shortens
# Scale and zero point of a position, behind its integers.
QUANTIZED_EXTRA = 2
_TO_THE_END = np.iinfo(np.int64).max


def slice_before_head(graph: ir.Graph, head: Head) -> None:
    """Add the input `logits_to_keep` and the output `hidden_states`.

    ``logits_to_keep`` is a scalar int64: 0 keeps all positions, n the last n (transformers' name and
    meaning). The one slice ``hidden[:, -n:]`` does both, because -0 is the start.
    """
    keep = add_input(graph, "logits_to_keep", ir.DataType.INT64, [])
    writer = NodeWriter(graph, "last_logits")
    start = writer.op("Unsqueeze", [writer.op("Neg", [keep]), writer.constant([0])])
    ends = [start, writer.constant([_TO_THE_END]), writer.constant([1])]
    if head.quantizer is None:
        sliced, width = writer.op("Slice", [head.hidden, *ends], output="hidden_states"), head.width
        entry = head.product if head.flatten is None else head.flatten[0]
        writer.insert_before(entry)
        entry.replace_input_with(0, sliced)
        if head.flatten is not None:
            _unflatten(graph, sliced, head.flatten[1])
    elif head.is_dynamic:
        sliced, width = _slice_integers(writer, head, ends), head.width + QUANTIZED_EXTRA
    else:
        sliced, width = _slice_rounded(writer, head, head.quantizer, ends), head.width
    sliced.type = ir.TensorType(head.dtype)
    sliced.shape = ir.Shape(["batch_size", LENGTH, width])
    graph.outputs.append(sliced)
    find_output(graph, "logits").shape = ir.Shape(["batch_size", LENGTH, head.rows])


def _unflatten(graph: ir.Graph, sliced: ir.Value, reshape: ir.Node) -> None:
    """Give a Gemm's logits the batch and position axes of the sliced hidden states."""
    writer = NodeWriter(graph, "last_logits/unflatten")
    lengths = writer.op("Slice", [writer.op("Shape", [sliced]), writer.constant([0]), writer.constant([2])])
    shape = writer.op("Concat", [lengths, writer.constant([-1])], axis=0)
    writer.insert_before(reshape)
    reshape.replace_input_with(1, shape)


def _slice_rounded(writer: NodeWriter, head: Head, quantizer: ir.Node, ends: list[ir.Value]) -> ir.Value:
    """Slice integers of one constant scale; `hidden_states` are what they stand for.

    Quantised again, as the cold head does, they are the same integers.
    """
    sliced = writer.op("Slice", [quantizer.outputs[0], *ends])
    rounded = writer.op("DequantizeLinear", [sliced, *quantizer.inputs[1:]], output="hidden_states")
    writer.insert_before(head.product)
    head.product.replace_input_with(0, sliced)
    return rounded


def _slice_integers(writer: NodeWriter, head: Head, ends: list[ir.Value]) -> ir.Value:
    """Slice a head's integers, not what they are made of: one scale of all positions stays the full graph's.

    `hidden_states` then has the integers as floats, and each position's scale and zero point behind them.
    """
    quantizer = head.quantizer
    if quantizer is None:
        raise ValueError("the head's input is not quantised")
    integers, scale, zero = quantizer.outputs
    sliced = writer.op("Slice", [integers, *ends])
    floats = writer.op("Cast", [sliced], to=int(ir.DataType.FLOAT))
    first = writer.op("Slice", [floats, writer.constant([0]), writer.constant([1]), writer.constant([2])])
    nothing = writer.op("Sub", [first, first])
    zeros = writer.op("Cast", [zero], to=int(ir.DataType.FLOAT))
    parts = [floats, writer.op("Add", [nothing, scale]), writer.op("Add", [nothing, zeros])]
    packed = writer.op("Concat", parts, output="hidden_states", axis=2)
    writer.insert_before(head.product)
    head.product.replace_input_with(0, sliced)
    return packed
