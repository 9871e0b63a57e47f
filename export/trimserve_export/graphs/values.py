"""Values and nodes of a graph: what they are called, and what a value is behind Identity and Transpose."""

from collections.abc import Sequence

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError

# The first in which Unsqueeze takes its axes as an input, and Min takes int64.
OLDEST_OPSET = 13


def describe(node: ir.Node) -> str:
    """Name a node for an error message."""
    return f"{node.op_type} {node.name!r}"


def check_opset(model: ir.Model) -> None:
    """Refuse a graph of operators that are older than those which are added to it.

    Raises:
        UnsupportedModelError: its opset is below `OLDEST_OPSET`.
    """
    found = model.opset_imports.get("", OLDEST_OPSET)
    if found < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"the graph has opset {found}, and {OLDEST_OPSET} is the oldest that nodes can be added to: "
            "convert it with onnx.version_converter."
        )


def find_input(graph: ir.Graph, name: str) -> ir.Value:
    """Return a graph input by its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    return _named(graph.inputs, name, "input")


def find_output(graph: ir.Graph, name: str) -> ir.Value:
    """Return a graph output by its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    return _named(graph.outputs, name, "output")


def _named(values: Sequence[ir.Value], name: str, kind: str) -> ir.Value:
    for value in values:
        if value.name == name:
            return value
    names = ", ".join(str(value.name) for value in values)
    raise UnsupportedModelError(f"the graph has no {kind} {name}: it has {names}.")


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor that a value is.

    Raises:
        UnsupportedModelError: it is computed, or an input.
    """
    if value.const_value is None:
        raise UnsupportedModelError(f"{value.name} is no constant of the graph.")
    return value.const_value


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    return tuple(tensor_of(value).shape.numpy())


def is_set(node: ir.Node, name: str) -> bool:
    """Whether a flag among a node's attributes is set."""
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def matrix_behind(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The matrix that a value is, perhaps through Identity and Transpose, and whether it is transposed."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Identity", "Transpose"):
            return None
        transposed ^= node.op_type == "Transpose" and swaps_axes(node)
        value = node.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value, transposed


def swaps_axes(transpose: ir.Node) -> bool:
    """Whether a Transpose swaps the axes of a matrix."""
    perm = transpose.attributes.get("perm")
    return perm is None or tuple(perm.as_ints()) == (1, 0)


def is_constant(value: ir.Value) -> bool:
    """Whether a value depends on no input of the graph."""
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None:
        return False  # a graph input
    return all(operand is None or is_constant(operand) for operand in node.inputs)
