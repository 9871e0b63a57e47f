"""Names of a traced graph's axes: the tracer has a symbol for each, and other exporters agreed on names."""

import re
from collections.abc import Callable, Sequence

import onnx_ir as ir

_SYMBOL = re.compile(r"\b[su]\d+\b")


def name_axes(graph: ir.Graph, names_of: Callable[[str], Sequence[str | None]]) -> None:
    """Replace the tracer's symbols in all shapes of a graph.

    Args:
        graph: the graph, its inputs named.
        names_of: of an input's name, the names of its axes; None leaves one as it is.
    """
    names = _axis_names(graph, names_of)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(axis, names) for axis in value.shape])


def _axis_names(graph: ir.Graph, names_of: Callable[[str], Sequence[str | None]]) -> dict[str, str]:
    """The tracer's symbol for each axis -> its name."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in zip(value.shape or (), names_of(str(value.name)), strict=False):
            if isinstance(axis, ir.SymbolicDim) and axis.value is not None and name is not None:
                names.setdefault(axis.value, name)
    return names


def _renamed(axis: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(axis, int) or axis.value is None:
        return axis if isinstance(axis, int) else None
    if axis.value.isdecimal():  # a constant that the tracer wrote as a symbol
        return int(axis.value)
    return _SYMBOL.sub(lambda found: names.get(found[0], found[0]), axis.value)


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *made]
