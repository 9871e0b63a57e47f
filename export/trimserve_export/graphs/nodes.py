"""Write new nodes into a graph with names that cannot meet the exporter's."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir


class NodeWriter:
    """Collects nodes for one place of a graph.

    Args:
        graph: the graph to write into.
        scope: name of the pass; nodes and constants are called ``trimserve/<scope>/...``.
    """

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        self._graph = graph
        self._scope = f"trimserve/{scope}"
        self._nodes: list[ir.Node] = []

    def constant(self, value: int | Sequence[int]) -> ir.Value:
        """Add an int64 constant and return its value."""
        return self.array(f"constant_{len(self._graph.initializers)}", np.array(value, np.int64))

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        """Add a constant of an array's own dtype and return its value."""
        return self.tensor(ir.tensor(array, name=f"{self._scope}/{name}"))

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a constant, with the name that it has, and return its value."""
        constant = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._graph.register_initializer(constant)
        return constant

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        output: str | None = None,
        domain: str = "",
        **attributes: float | Sequence[int],
    ) -> ir.Value:
        """Add a node and return its output, called `output` if that is given."""
        name = f"{self._scope}/{op_type}_{len(self._nodes)}"
        result = ir.Value(name=output or f"{name}_output")
        self._nodes.append(
            ir.Node(
                domain,
                op_type,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=[result],
                name=name,
            )
        )
        return result

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        count: int,
        *,
        domain: str = "",
        **attributes: float,
    ) -> list[ir.Value]:
        """Add a node with several outputs and return them."""
        name = f"{self._scope}/{op_type}_{len(self._nodes)}"
        results = [ir.Value(name=f"{name}_output_{index}") for index in range(count)]
        made = ir.convenience.convert_attributes(attributes)
        self._nodes.append(ir.Node(domain, op_type, inputs, made, outputs=results, name=name))
        return results

    def append(self) -> None:
        """Put the collected nodes at the end of the graph."""
        self._graph.extend(self._nodes)

    def insert_before(self, node: ir.Node) -> None:
        """Put the collected nodes in front of a node of the graph."""
        self._graph.insert_before(node, self._nodes)

    def insert_after(self, node: ir.Node) -> None:
        """Put the collected nodes behind a node of the graph."""
        self._graph.insert_after(node, self._nodes)


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
    """Add a graph input and return its value."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def give_instead(value: ir.Value, made: ir.Value, uses: Iterable[tuple[ir.Node, int]]) -> None:
    """Give the readers of a value, and the graph's output if it is one, what was made of it.

    Args:
        value: what the graph has read so far.
        made: computed of `value`.
        uses: who read `value` before `made` was.
    """
    for node, index in uses:
        node.replace_input_with(index, made)
    if value.is_graph_output():
        makers = tuple(value.uses())
        take_over(value, made)
        for node, index in makers:
            node.replace_input_with(index, value)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Put a value in the place of another, which may be a graph output with its name."""
    name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{name}/replaced"
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
