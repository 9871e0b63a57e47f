"""What can be proven of the shapes in a graph: of each value its sizes, of shape tensors their entries."""

import numpy as np
import onnx_ir as ir
import sympy

from trimserve_export.shapes.entry_rules import ENTRIES
from trimserve_export.shapes.rules import SIZES, Entries, split_sizes
from trimserve_export.shapes.sizes import Size, Sizes, plain, unknown_size

# Longer integer tensors are data, no shapes.
_MAX_ENTRIES = 64
_DOMAINS = ("", "com.microsoft")


class ShapeFacts:
    """The facts of one graph, which is not changed.

    The names of the dimensions of its inputs are taken at their word: one name, one size.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._sizes: dict[ir.Value, Sizes] = {}
        self._entries: dict[ir.Value, Entries] = {}
        self._symbols: dict[str, sympy.Symbol] = {}
        # There is at least one sequence and one position; the past may be empty.
        fed = [value.shape for value in graph.inputs if value.name == "input_ids" and value.shape is not None]
        self._at_least_one = {str(size) for shape in fed for size in shape}
        for value in graph.inputs:
            if value.shape is not None:
                self._sizes[value] = tuple(self._declared(size) for size in value.shape)
        for node in graph:
            if node.domain in _DOMAINS:
                self._learn(node)

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """The names of the dimensions of the inputs."""
        return frozenset(self._symbols.values())

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """The shape of a value, or None where not even its rank is known."""
        if value is None:
            return None
        if value not in self._sizes and (tensor := ir.convenience.get_const_tensor(value)) is not None:
            self._sizes[value] = tuple(int(size) for size in tensor.shape.numpy())
        return self._sizes.get(value)

    def declared(self, value: ir.Value) -> Sizes | None:
        """The shape that the exporter wrote beside a value, which nothing here proves."""
        return None if value.shape is None else tuple(map(self._declared, value.shape))

    def entries(self, value: ir.Value | None) -> Entries | None:
        """The entries of a short int64 tensor, an object array of `Size` in its shape."""
        if value is None:
            return None
        tensor = ir.convenience.get_const_tensor(value) if value not in self._entries else None
        if tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.size <= _MAX_ENTRIES:
            self._entries[value] = tensor.numpy().astype(object)
        return self._entries.get(value)

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The entries of a value, flat, if all are numbers."""
        found = self.entries(value)
        if found is None or not all(type(entry) is int for entry in found.flat):
            return None
        return list(found.flat)

    def _declared(self, size: int | ir.SymbolicDim) -> Size:
        if isinstance(size, int):
            return size
        if size.value is None:
            return unknown_size()
        return plain(sympy.Add(*map(self._symbol, size.value.split(" + "))))

    def _symbol(self, name: str) -> sympy.Symbol:
        if name not in self._symbols:
            sign = "positive" if name in self._at_least_one else "nonnegative"
            self._symbols[name] = sympy.Symbol(name, integer=True, **{sign: True})
        return self._symbols[name]

    def _learn(self, node: ir.Node) -> None:
        sizes = SIZES[node.op_type](self, node) if node.op_type in SIZES else None
        if sizes is not None:
            self._sizes[node.outputs[0]] = tuple(map(plain, sizes))
        if node.op_type == "Split":
            self._sizes.update(zip(node.outputs, split_sizes(self, node) or (), strict=False))
        entries = ENTRIES[node.op_type](self, node) if node.op_type in ENTRIES else None
        if entries is not None and entries.size <= _MAX_ENTRIES:
            self._entries[node.outputs[0]] = _plain_entries(entries)
            self._sizes[node.outputs[0]] = entries.shape


def _plain_entries(entries: Entries) -> Entries:
    out = np.empty(entries.shape, object)
    for place, entry in np.ndenumerate(entries):
        out[place] = entry if entry is None or isinstance(entry, bool) else plain(entry)
    return out
