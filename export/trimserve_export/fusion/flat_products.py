"""Products of flattened positions (Reshape, Gemm, Reshape) as products of states (B, T, H), and a sum."""

import onnx_ir as ir

from trimserve_export.fusion.probing import Probe
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.products import product_of
from trimserve_export.shapes.sizes import Sizes


def unflatten_products(graph: ir.Graph, probe: Probe) -> int:
    """Take the Reshapes around each Gemm of flattened positions away, in place; returns how many."""
    found = 0
    for node in list(graph):
        product = product_of(node) if node.op_type == "Gemm" else None
        flatten = None if product is None or node.inputs[0] is None else node.inputs[0].producer()
        unflatten = _only_reader(node.outputs[0]) if product is not None else None
        if product is None or flatten is None or unflatten is None or product.by_row:
            continue
        states, after = flatten.inputs[0], probe.sizes(unflatten.outputs[0])
        if states is None or {flatten.op_type, unflatten.op_type} != {"Reshape"}:
            continue
        writer = NodeWriter(graph, f"unflatten/{found}")
        fed = _states(states, after, int(product.rows.shape[1]), probe, writer)
        if fed is None:
            continue
        made = writer.op("MatMul", [fed, product.weight])
        if product.bias is not None:
            probe.declare(made, after or (), states.dtype)
            made = writer.op("Add", [made, product.bias])
        writer.insert_before(unflatten)
        probe.take_over(unflatten.outputs[0], made)
        found += 1
    return found


def _only_reader(value: ir.Value) -> ir.Node | None:
    users = {use.node for use in value.uses()}
    return users.pop() if len(users) == 1 else None


def _states(
    value: ir.Value, after: Sizes | None, inputs: int, probe: Probe, writer: NodeWriter
) -> ir.Value | None:
    """What is flattened, as (B, T, inputs): heads have an axis of their own before."""
    before = probe.sizes(value)
    if before is None or after is None or len(after) != 3 or before[:2] != after[:2]:
        return None
    if len(before) == 3 and before[-1] == inputs:
        return value
    if len(before) != 4 or before[2] * before[3] != inputs:
        return None
    states = writer.op("Reshape", [value, writer.constant([0, 0, inputs])])
    probe.declare(states, (*after[:2], inputs), value.dtype)
    return states
