"""Find sizes that a graph was traced with: a batch, a length or a past that is a number and not a name.

Such a graph takes one shape of input. The numbers stand in the inputs, or only inside: in the shape of a
Reshape, or in a constant that is added to activations of any length.
"""

from collections.abc import Iterator

import onnx_ir as ir
import sympy

from trimserve.runtime.contract import PAST
from trimserve_export.graphs.values import describe
from trimserve_export.shapes.facts import ShapeFacts
from trimserve_export.shapes.rules import BROADCAST
from trimserve_export.shapes.sizes import Size, Sizes, product, quotient

_IDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")
_AXES = {0: "batch", 1: "length"}
_PAST_AXES = {0: "batch", 2: "past length"}
# A tensor of fewer axes has no batch beside its positions and their numbers.
_ACTIVATION_AXES = 3


def fixed_size(graph: ir.Graph) -> str | None:
    """Say which size of a graph is fixed, and where; None where none is found.

    Args:
        graph: as an exporter wrote it. What is inside is only looked at as far as sizes can be proven.
    """
    return next(_of_inputs(graph), None) or next(_of_nodes(graph), None)


def _of_inputs(graph: ir.Graph) -> Iterator[str]:
    for value in graph.inputs:
        name = str(value.name)
        axes = _PAST_AXES if name.startswith(PAST) else _AXES if name in _IDS else {}
        for axis, size in enumerate(value.shape or ()):
            number = size if isinstance(size, int) else size.value
            if axis in axes and str(number).isdecimal():
                yield f"the {axes[axis]} of its input {name} is fixed to {number}"


def _of_nodes(graph: ir.Graph) -> Iterator[str]:
    facts = ShapeFacts(graph)
    symbols = facts.symbols
    fed = next((facts.sizes(value) for value in graph.inputs if value.name == "input_ids"), None)
    batch = fed[0] if fed else None
    for node in graph:
        if node.op_type == "Reshape" and node.domain == "":
            yield from _of_reshape(facts, node, symbols, batch)
        elif node.op_type in BROADCAST and node.domain == "":
            yield from _of_broadcast(facts, node, symbols)


def _of_reshape(
    facts: ShapeFacts, node: ir.Node, symbols: frozenset[sympy.Symbol], batch: Size | None
) -> Iterator[str]:
    before, target = facts.sizes(node.inputs[0]), facts.integers(node.inputs[1])
    if before is None or target is None or not _is_named(product(before), symbols):
        return
    left = product([size for axis, size in enumerate(before) if axis >= len(target) or target[axis] != 0])
    numbers = product([size for size in target if size > 0])
    rest = quotient(left, numbers)
    told = f"{describe(node)} reshapes to {target}"
    if -1 not in target:
        if not isinstance(left, int):
            yield f"{told}, whatever the batch and the length are"
    elif not _is_named(rest, symbols) and not isinstance(rest, int):
        yield f"{told}, which fits one length alone"
    elif len(before) >= _ACTIVATION_AXES <= len(target) and (before[0], target[0]) == (batch, 1):
        yield f"{told}, which takes the texts of a batch for one"


def _of_broadcast(facts: ShapeFacts, node: ir.Node, symbols: frozenset[sympy.Symbol]) -> Iterator[str]:
    shapes = [sizes for value in node.inputs if (sizes := facts.sizes(value)) is not None]
    rank = max(map(len, shapes), default=0)
    for sizes in zip(*(_padded(shape, rank) for shape in shapes), strict=True):
        numbers = {size for size in sizes if isinstance(size, int) and size != 1}
        if numbers and any(not isinstance(size, int) and _is_named(size, symbols) for size in sizes):
            yield f"{describe(node)} fits a size of {min(numbers)} alone, whatever the length is"


def _padded(shape: Sizes, rank: int) -> Sizes:
    return (1,) * (rank - len(shape)) + shape


def _is_named(size: Size, symbols: frozenset[sympy.Symbol]) -> bool:
    """Whether a size is made of the names of the inputs' dimensions, and of nothing unknown."""
    return not isinstance(size, int) and bool(size.free_symbols) and size.free_symbols <= symbols
