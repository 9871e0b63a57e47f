"""Write a fused int8 head as the operators that it was fused from: one form, which all later steps know.

ONNX Runtime's optimiser makes ``MatMulIntegerToFloat`` of ``Mul(Cast(MatMulInteger(q, W)), Mul(q's scale,
W's scales))`` and a bias, and ``DynamicQuantizeMatMul`` of that and the DynamicQuantizeLinear that gives q. A
session that opens the graph may fuse them again; either way the numbers are the same.
"""

import onnx_ir as ir

from trimserve_export.graphs.nodes import NodeWriter, take_over
from trimserve_export.graphs.values import find_output, is_constant

# Those of MatMulIntegerToFloat.
_MOST_INPUTS = 7


def unfuse_head(graph: ir.Graph) -> None:
    """Take the product behind `logits` apart, if it is a fused one whose activations are scaled a call.

    A MatMulIntegerToFloat whose activations have a constant scale stays: each position is computed by itself.
    """
    node = _fused_product(graph)
    if node is None:
        return
    writer = NodeWriter(graph, "unfused_head")
    inputs = [*node.inputs, *[None] * _MOST_INPUTS]  # those that are left out at the end
    if node.op_type == "DynamicQuantizeMatMul":
        hidden, *others = inputs
        integers, scale, middle = writer.ops("DynamicQuantizeLinear", [hidden], 3)
        inputs = [integers, others[0], scale, others[1], middle, *others[2:]]
    quantized, weight, factor, weight_factor, offset, zero, bias = inputs[:_MOST_INPUTS]
    sums = writer.op("MatMulInteger", [quantized, weight, offset, zero])
    floats = writer.op("Cast", [sums], to=int(ir.DataType.FLOAT))
    made = writer.op("Mul", [floats, writer.op("Mul", [factor, weight_factor])])
    if bias is not None:
        made = writer.op("Add", [made, bias])
    writer.insert_before(node)
    take_over(node.outputs[0], made)
    graph.remove(node, safe=True)


def _fused_product(graph: ir.Graph) -> ir.Node | None:
    """Go back from `logits` through what has one operand that is computed."""
    value: ir.Value | None = find_output(graph, "logits")
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DynamicQuantizeMatMul":
            return node
        if node.op_type == "MatMulIntegerToFloat":
            scale = node.inputs[2]
            return None if scale is None or is_constant(scale) else node
        computed = [operand for operand in node.inputs if operand is not None and not is_constant(operand)]
        value = computed[0] if len(computed) == 1 else None
    return None
