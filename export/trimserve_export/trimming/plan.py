"""What trimming a graph will change: collected first, checked, then applied at once or not at all."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.kept_tensors import Cut, KeptEntries
from trimserve_export.graphs.values import describe


@dataclass(frozen=True, slots=True)
class Lookup:
    """A node that looks token ids up in a table.

    Attributes:
        node: Gather, GatherBlockQuantized or EmbedLayerNormalization.
        ids: which of its inputs are the token ids.
    """

    node: ir.Node
    ids: int


class VocabPlan:
    """The changes that one graph needs, found by following its vocab axis.

    Attributes:
        rows: V.
        cuts: constant -> where its vocab axis is.
        lookups: the nodes that look token ids up, in the order found.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.cuts: dict[ir.Value, Cut] = {}
        self.lookups: list[Lookup] = []
        # Axis of every value that has one entry a token; constants included.
        self._carriers: dict[ir.Value, int] = {}
        self._followed: set[tuple[ir.Node, int]] = set()
        self._outputs: set[ir.Value] = set()
        self._edits: list[Callable[[VocabMap], None]] = []
        # Rows of tables that have none for the last ids.
        self._shorter: dict[ir.Value, int] = {}

    def operand(self, node: ir.Node, index: int) -> ir.Value:
        """An input of a node; from now on it is known what the node does with it.

        Raises:
            UnsupportedModelError: the node has no such input.
        """
        value = optional_input(node, index)
        if value is None:
            raise UnsupportedModelError(f"{describe(node)} has no input {index}: the graph is damaged.")
        self._followed.add((node, index))
        return value

    def shorten(self, value: ir.Value, rows: int) -> None:
        """Note that a constant has entries for the first `rows` ids alone, of which there are V at most."""
        if rows < self.rows:
            self._shorter[value] = rows

    def rows_of(self, value: ir.Value) -> int:
        """How many ids a constant has entries for."""
        return self._shorter.get(value, self.rows)

    def kept(self, value: ir.Value, kept: int) -> int:
        """How many of `kept` ids a constant has entries for, once it is cut."""
        tensor = value.const_value if value in self._shorter else None
        return kept if tensor is None else int(tensor.shape.numpy()[self.cuts[value].axis])

    def carry(self, value: ir.Value, axis: int) -> bool:
        """Note that a value has one entry a token along `axis`; tell whether that is news.

        Raises:
            UnsupportedModelError: it was found to have them along another axis.
        """
        known = self._carriers.get(value)
        if known is None:
            self._carriers[value] = axis
        elif known != axis:
            raise UnsupportedModelError(
                f"{value.name} has tokens along axis {known} for one node and along axis {axis} for another."
            )
        return known is None

    def branch_output(self, value: ir.Value) -> None:
        """Note that the output of an If's branch is followed."""
        self._outputs.add(value)

    def cut(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int, owner: ir.Node) -> None:
        """Cut a constant along an axis that must have V entries.

        Raises:
            UnsupportedModelError: it has another number of entries.
        """
        shape, rows = tuple(tensor.shape.numpy()), self.rows_of(value)
        if not -len(shape) <= axis < len(shape) or shape[axis] != rows:
            raise UnsupportedModelError(
                f"{describe(owner)}: expected {value.name} to have {rows:,} entries along axis {axis}, "
                f"found shape {shape}."
            )
        axis %= len(shape)
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        self._add(value, Cut(axis, outer, inner))

    def cut_rows(self, value: ir.Value, tensor: ir.TensorProtocol, entries: int, owner: ir.Node) -> None:
        """Cut a constant that holds `entries` entries a token, one token after the other, in any shape.

        Raises:
            UnsupportedModelError: it holds another number of entries.
        """
        shape = tuple(tensor.shape.numpy())
        by_token = bool(shape) and shape[0] in (self.rows, self.rows * entries)
        if tensor.size != self.rows * entries or not by_token:
            raise UnsupportedModelError(
                f"{describe(owner)}: expected {value.name} to hold {entries:,} entries for each of "
                f"{self.rows:,} tokens, found shape {shape}."
            )
        self._add(value, Cut(0, 1, entries))

    def _add(self, value: ir.Value, cut: Cut) -> None:
        if self.cuts.setdefault(value, cut) != cut:
            raise UnsupportedModelError(f"{value.name} is a table of tokens in two different ways.")
        self._carriers.setdefault(value, cut.axis)

    def edit(self, change: Callable[[VocabMap], None]) -> None:
        """Note a change for `apply` to make: an attribute, a constant of one node."""
        self._edits.append(change)

    def check(self, output: ir.Value | None) -> None:
        """Refuse a graph that uses a table, or the logits, in a way that was not followed.

        Args:
            output: the graph output that may have one entry a token.

        Raises:
            UnsupportedModelError: see above; the message names the node.
        """
        for value in self._carriers:
            for node, index in value.uses():
                if (node, index) not in self._followed:
                    raise UnsupportedModelError(
                        f"{describe(node)} also reads {value.name}, which has one entry a token: not "
                        "understood, so this graph is not trimmed."
                    )
            if value.is_graph_output() and value is not output and value not in self._outputs:
                raise UnsupportedModelError(
                    f"the output {value.name} has one entry a token: of outputs only logits can be trimmed."
                )

    def apply(self, vocab: VocabMap) -> None:
        """Change the graph in place."""
        for value, cut in self.cuts.items():
            if value.const_value is not None:
                rows = self.rows_of(value)
                ids = vocab.kept_ids[vocab.kept_ids < rows]
                kept = KeptEntries(value.const_value, cut, rows, ids)
                value.const_value, value.shape = kept, ir.Shape(kept.shape.numpy())
        for value, axis in self._carriers.items():
            if value not in self.cuts:
                _resize(value, axis, self.rows, len(vocab))
        for change in self._edits:
            change(vocab)


def _resize(value: ir.Value, axis: int, rows: int, kept: int) -> None:
    if value.shape is not None and -len(value.shape) <= axis < len(value.shape) and value.shape[axis] == rows:
        dims = list(value.shape)
        dims[axis] = kept
        value.shape = ir.Shape(dims)


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value always is (Constant nodes were made initializers when the graph was loaded)."""
    return None if value is None else value.const_value


def replace_constant(node: ir.Node, index: int, array: np.ndarray) -> None:
    """Give one node a constant of its own; exporters share small constants between unrelated nodes."""
    old = node.inputs[index]
    graph = node.graph
    if old is None or not isinstance(graph, ir.Graph):
        raise UnsupportedModelError(f"{describe(node)} has no constant at input {index}.")
    name = f"trimserve/{old.name}/{len(graph.initializers)}"
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.tensor(array).dtype),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    node.replace_input_with(index, value)
