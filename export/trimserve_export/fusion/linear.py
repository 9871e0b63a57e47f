"""Products of one input with several constant matrices, made one product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve_export.fusion.heads import Columns
from trimserve_export.fusion.probing import Probe
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.products import Product, product_of

Matrix = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Linear:
    """``output = fed @ matrix + bias``, of which some columns count.

    Attributes:
        fed: the input, (..., inputs).
        product: what it is multiplied with.
        bias: constant (outputs,), or None.
        columns: which outputs count, in which order; None for all as they are.
    """

    fed: ir.Value
    product: Product
    bias: ir.Value | None
    columns: Columns | None = None

    @property
    def width(self) -> int:
        """How many outputs count."""
        tensor = self.product.weight.const_value
        if self.columns is not None or tensor is None:
            return 0 if self.columns is None else len(self.columns)
        return int(tensor.shape.numpy()[0 if self.product.by_row else 1])

    def matrix(self) -> Matrix:
        """(inputs, outputs that count)."""
        matrix: Matrix = self.product.rows.T
        return matrix if self.columns is None else matrix[:, self.columns]

    def offsets(self) -> Matrix | None:
        """The bias of the outputs that count."""
        if self.bias is None or self.bias.const_value is None:
            return None
        found: Matrix = self.bias.const_value.numpy()
        return found if self.columns is None else found[self.columns]


def linear_of(value: ir.Value) -> Linear | None:
    """The product, and the bias, that a value is."""
    node = value.producer()
    bias: ir.Value | None = None
    if node is not None and node.op_type == "Add":
        constants = [operand for operand in node.inputs if operand is not None and _is_row(operand)]
        others = [operand for operand in node.inputs if operand is not None and operand not in constants]
        if len(constants) != 1 or len(others) != 1 or len(list(others[0].uses())) != 1:
            return None
        bias, node = constants[0], others[0].producer()
    product = None if node is None else product_of(node)
    if node is None or product is None or product.bias is not None or node.inputs[0] is None:
        return None
    return Linear(node.inputs[0], product, bias)


def _is_row(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) == 1


def choose(linear: Linear, columns: Columns) -> Linear:
    """Some outputs of a product alone, in a given order."""
    if np.array_equal(columns, np.arange(linear.width)):
        return linear
    return replace(linear, columns=columns)


def packed(parts: Sequence[Linear], writer: NodeWriter, name: str) -> ir.Value:
    """Write one product for several of one input; it gives their outputs side by side."""
    weight = parts[0].product.weight
    tensor = weight.const_value
    if tensor is None:
        raise ValueError("a product without a constant matrix")
    inputs = int(tensor.shape.numpy()[1 if parts[0].product.by_row else 0])
    outputs = sum(part.width for part in parts)

    def matrix() -> ir.TensorProtocol:
        return ir.Tensor(
            np.ascontiguousarray(np.concatenate([part.matrix() for part in parts], axis=1)),
            name=f"{name}/weight",
        )

    # Made when it is written: two copies of all weights need not be in memory.
    lazy = ir.LazyTensor(matrix, tensor.dtype, ir.Shape([inputs, outputs]), name=f"{name}/weight")
    made = writer.op("MatMul", [parts[0].fed, writer.tensor(lazy)])
    if all(part.bias is None for part in parts):
        return made
    dtype = tensor.dtype.numpy()
    offsets = [part.offsets() for part in parts]
    whole = [
        np.zeros(part.width, dtype) if found is None else found
        for part, found in zip(parts, offsets, strict=True)
    ]
    return writer.op("Add", [made, writer.array(f"{name}/bias", np.concatenate(whole))])


def pack_products(graph: ir.Graph, probe: Probe) -> int:
    """Make one product of those that read one input, and split what it gives, in place; returns how many."""
    groups = list(_groups(graph))
    for number, outputs in enumerate(groups):
        parts = [linear for value in outputs if (linear := linear_of(value)) is not None]
        writer = NodeWriter(graph, f"packed/{number}")
        together = packed(parts, writer, str(outputs[0].name))
        widths = writer.constant([part.width for part in parts])
        pieces = writer.ops("Split", [together, widths], len(parts), axis=-1)
        writer.insert_before(_first_of(graph, parts[0].fed, outputs))
        for old, new in zip(outputs, pieces, strict=True):
            probe.take_over(old, new)
    return len(groups)


def _groups(graph: ir.Graph) -> Iterator[list[ir.Value]]:
    """The outputs of each group of products with one input, with their biases."""
    known: dict[ir.Value, list[ir.Value]] = {}
    for node in graph:
        if product_of(node) is None or node.inputs[0] is None or node.outputs[0].is_graph_output():
            continue
        value = _with_bias(node.outputs[0])
        if (linear := linear_of(value)) is not None and value.uses():
            known.setdefault(linear.fed, []).append(value)
    yield from (outputs for outputs in known.values() if len(outputs) > 1)


def _with_bias(value: ir.Value) -> ir.Value:
    users = {use.node for use in value.uses()}
    if len(users) == 1 and (node := users.pop()).op_type == "Add" and any(map(_is_row_or_none, node.inputs)):
        return node.outputs[0]
    return value


def _is_row_or_none(value: ir.Value | None) -> bool:
    return value is not None and _is_row(value)


def _first_of(graph: ir.Graph, fed: ir.Value, outputs: Sequence[ir.Value]) -> ir.Node:
    """The first node of a group: what reads its outputs comes after it."""
    users = {use.node for use in fed.uses()}
    makers = {value.producer() for value in outputs}
    return next(node for node in graph if node in users and (product_of(node) or node in makers))
