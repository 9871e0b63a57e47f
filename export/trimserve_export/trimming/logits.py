"""Follow the vocab axis back from `logits` to the products with the head's weight.

What stands between may scale, shift, bend or mask the logits of each token by itself. Softmax and its like
mix tokens, so they are refused.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.graphs.values import describe
from trimserve_export.graphs.vocab_flow import POINTWISE, SCALED, UNARY
from trimserve_export.trimming.plan import VocabPlan, constant, optional_input, replace_constant
from trimserve_export.trimming.products import PRODUCTS


def follow_logits(plan: VocabPlan, value: ir.Value) -> None:
    """Cut what a value with one entry a token along its last axis is made of.

    Args:
        plan: collects the cuts.
        value: the graph's output `logits`, or a value on the way to it.

    Raises:
        UnsupportedModelError: a node on the way is not understood.
    """
    if not plan.carry(value, -1):
        return
    node = value.producer()
    if node is None:
        raise UnsupportedModelError(f"{value.name} has one entry a token and is made by no node.")
    if node.op_type in PRODUCTS:
        PRODUCTS[node.op_type](plan, node)
    elif node.op_type in _WAYS:
        _WAYS[node.op_type](plan, node)
    elif node.op_type == "If":
        _both_branches(plan, node, list(node.outputs).index(value))
    else:
        raise UnsupportedModelError(
            f"{describe(node)} stands between the head and logits: expected a product with the head's "
            f"weight, or what changes each logit by itself ({', '.join(sorted(UNARY | POINTWISE))})."
        )


def _unary(plan: VocabPlan, node: ir.Node) -> None:
    follow_logits(plan, plan.operand(node, 0))


def _pointwise(plan: VocabPlan, node: ir.Node) -> None:
    """Cut each operand that has one entry a token; leave those that all tokens share."""
    for index, operand in enumerate(node.inputs):
        if operand is None:
            continue
        tensor = constant(operand)
        if tensor is None:
            if _has_tokens(operand):
                follow_logits(plan, plan.operand(node, index))
        elif tensor.size > 1 and tensor.shape[-1] != 1:
            plan.operand(node, index)
            plan.cut(operand, tensor, -1, node)


def _has_tokens(value: ir.Value) -> bool:
    """Whether a computed value has an entry a token, or one that all tokens share."""
    node = value.producer()
    if value.shape is not None and (len(value.shape) == 0 or value.shape[-1] == 1):
        return False
    if node is None:
        return True  # a graph input: following it names it
    if node.op_type == "DynamicQuantizeLinear":
        return value is node.outputs[0]  # then come a scale and a zero point
    if node.op_type not in UNARY | POINTWISE:
        return True
    operands = [operand for operand in node.inputs if operand is not None]
    return any(_entry_a_token(operand) for operand in operands)


def _entry_a_token(operand: ir.Value) -> bool:
    tensor = constant(operand)
    return _has_tokens(operand) if tensor is None else tensor.size > 1 and tensor.shape[-1] != 1


def _scaled(plan: VocabPlan, node: ir.Node) -> None:
    """Logits that are quantised, or were, by one scale for all tokens."""
    scale = constant(optional_input(node, 1))
    if scale is None or scale.size != 1:
        raise UnsupportedModelError(f"{describe(node)} scales logits by other than one constant number.")
    follow_logits(plan, plan.operand(node, 0))


def _reshape(plan: VocabPlan, node: ir.Node) -> None:
    """Logits of flattened positions get their batch axis back; the last axis stays."""
    _patch_last(plan, node, 1)
    follow_logits(plan, plan.operand(node, 0))


def _patch_last(plan: VocabPlan, node: ir.Node, index: int) -> None:
    """Change V to K at the end of a shape: a constant, or one that is put together when the graph runs."""
    shape = optional_input(node, index)
    tensor = constant(shape)
    if tensor is not None and tensor.numpy().reshape(-1)[-1:].tolist() == [plan.rows]:
        sizes = tensor.numpy().tolist()
        plan.edit(lambda vocab: replace_constant(node, index, np.array([*sizes[:-1], len(vocab)], np.int64)))
        return
    maker = None if shape is None else shape.producer()
    if maker is None or maker.op_type != "Concat" or len(list(maker.outputs[0].uses())) != 1:
        raise UnsupportedModelError(
            f"{describe(node)} reshapes logits: expected a shape that ends with {plan.rows:,}."
        )
    _patch_last(plan, maker, len(maker.inputs) - 1)


def _positions(plan: VocabPlan, node: ir.Node) -> None:
    """Gather or Slice that picks positions and leaves the last axis whole."""
    operand = plan.operand(node, 0)
    rank = None if operand.shape is None else len(operand.shape)
    if node.op_type == "Gather":
        axis = node.attributes.get("axis")
        axes = [0 if axis is None else axis.as_int()]
    else:
        tensor = constant(optional_input(node, 3))
        axes = [-1] if tensor is None else tensor.numpy().tolist()
    if rank is None or any(axis % rank == rank - 1 for axis in axes):
        raise UnsupportedModelError(f"{describe(node)} picks logits along axes {axes} of {operand.shape}.")
    follow_logits(plan, operand)


def _both_branches(plan: VocabPlan, node: ir.Node, index: int) -> None:
    """A merged decoder: each branch makes the logits, of weights outside of it."""
    for name in ("then_branch", "else_branch"):
        output = node.attributes[name].as_graph().outputs[index]
        plan.branch_output(output)
        follow_logits(plan, output)


_WAYS: dict[str, Callable[[VocabPlan, ir.Node], None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(SCALED, _scaled),
    "Reshape": _reshape,
    "Gather": _positions,
    "Slice": _positions,
}
