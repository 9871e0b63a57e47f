"""Passes 1 and 2: logits for the last positions alone, and the hidden states that they come from."""

import numpy as np
import onnx_ir as ir

from trimserve_export.serving.flow import Head, find_output
from trimserve_export.serving.nodes import NodeWriter, add_input

LENGTH = "logits_length"  # name of the sequence axis that logits_to_keep shortens
_TO_THE_END = np.iinfo(np.int64).max


def slice_before_head(graph: ir.Graph, head: Head) -> None:
    """Add the input `logits_to_keep` and the output `hidden_states`.

    ``logits_to_keep`` is a scalar int64: 0 keeps all positions, n the last n (transformers' name and
    meaning). The one slice ``hidden[:, -n:]`` does both, because -0 is the start.
    """
    keep = add_input(graph, "logits_to_keep", ir.DataType.INT64, [])
    writer = NodeWriter(graph, "last_logits")
    start = writer.op("Unsqueeze", [writer.op("Neg", [keep]), writer.constant([0])])
    operands = [head.hidden, start, writer.constant([_TO_THE_END]), writer.constant([1])]
    sliced = writer.op("Slice", operands, output="hidden_states")
    writer.insert_before(head.product)
    sliced.type = ir.TensorType(head.dtype)
    sliced.shape = ir.Shape(["batch_size", LENGTH, head.width])
    head.product.replace_input_with(0, sliced)
    graph.outputs.append(sliced)
    find_output(graph, "logits").shape = ir.Shape(["batch_size", LENGTH, head.rows])
