"""The way of a value through a graph, as a chain of regions with one way in and one way out each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trimserve_export.fusion.probing import Probe

# Operators that put numbers in other places and leave them as they are.
MOVES = frozenset(
    {
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
_NORMS = frozenset({"SimplifiedLayerNormalization", "LayerNormalization"})
_FACTORS = frozenset({"Mul", "Div"})
# Of one region: rotary positions take a dozen.
_MOST_NODES = 40


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes between two values that all data passes through.

    Attributes:
        entry: where the data comes in.
        exit: where it goes out.
        nodes: the nodes between, the last one first.
    """

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def node(self) -> ir.Node:
        """The last one."""
        return self.nodes[0]

    @property
    def moves(self) -> bool:
        """Whether the numbers are the same behind it, in other places."""
        return all(node.op_type in MOVES for node in self.nodes)

    @property
    def factor(self) -> float | None:
        """The constant number that it multiplies with, if that is all that it does."""
        if len(self.nodes) != 1 or self.node.op_type not in _FACTORS:
            return None
        numbers = [number_of(value) for value in self.node.inputs if value is not self.entry]
        if len(numbers) != 1 or numbers[0] is None:
            return None
        if self.node.op_type == "Mul":
            return numbers[0]
        return 1 / numbers[0] if self.node.inputs[0] is self.entry else None

    @property
    def is_norm(self) -> bool:
        """Whether it normalises."""
        return len(self.nodes) == 1 and self.node.op_type in _NORMS

    @property
    def is_cast(self) -> bool:
        """Whether it only changes the type."""
        return len(self.nodes) == 1 and self.node.op_type == "Cast"


def number_of(value: ir.Value | None) -> float | None:
    """The one number that a constant is."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def places_of(graph: ir.Graph) -> dict[ir.Node, int]:
    """The place of each node in the order of the graph."""
    return {node: place for place, node in enumerate(graph)}


def regions_behind(value: ir.Value, probe: Probe, places: Mapping[ir.Node, int]) -> Iterator[Region]:
    """Follow a value back to where its data comes from, one region after the other.

    The chain ends where two values meet that have no common source within reach: at a sum of two states, say,
    or where the past comes in.
    """
    while True:
        region = _region(value, probe, places)
        if region is None:
            return
        yield region
        value = region.entry


def _region(value: ir.Value, probe: Probe, places: Mapping[ir.Node, int]) -> Region | None:
    front: set[ir.Value] = {value}
    nodes: list[ir.Node] = []
    while not nodes or len(front) > 1:
        makers = {node for operand in front if (node := operand.producer()) is not None}
        if any(operand.producer() is None for operand in front) or len(nodes) == _MOST_NODES:
            return None  # the past, which nothing makes
        last = max(makers, key=lambda node: places.get(node, -1))
        nodes.append(last)
        front -= set(last.outputs)
        front |= {operand for operand in last.inputs if operand is not None and probe.is_data(operand)}
    return Region(front.pop(), value, tuple(nodes)) if front else None
