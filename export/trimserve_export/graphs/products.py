"""Products of a graph with a constant matrix: what is quantised, and what calibration looks at."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.values import describe

Matrix = npt.NDArray[Any]


def products_of(graph: ir.Graph, *, has_head: bool) -> tuple[dict[ir.Node, "Product"], ir.Node | None]:
    """All products of a servable graph with a constant matrix, and which of them is the vocab head.

    Raises:
        UnsupportedModelError: the head, or all of the body, has no product that can be quantised.
    """
    head = find_head(graph).product if has_head else None
    products = {node: found for node in graph if (found := product_of(node)) is not None}
    if head is not None and head not in products:
        raise UnsupportedModelError(
            f"{describe(head)}, the vocab head, cannot be quantised: export without it."
        )
    if not products.keys() - {head}:
        raise UnsupportedModelError("the graph has no product with a constant matrix: nothing to quantise.")
    return products, head


@dataclass(frozen=True, slots=True)
class Product:
    """``x @ rows.T (+ bias)``: `weight` holds the rows, or the columns unless `by_row`."""

    weight: ir.Value
    by_row: bool
    bias: ir.Value | None = None

    @property
    def rows(self) -> Matrix:
        """The matrix with a row an output (outputs, inputs)."""
        if self.weight.const_value is None:
            raise UnsupportedModelError(f"{self.weight.name} is no constant of the graph.")
        values = self.weight.const_value.numpy()
        return values if self.by_row else values.T


def product_of(node: ir.Node) -> Product | None:
    """What a node multiplies with, if that is a constant matrix and nothing else is done."""
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    by_row = bool(attributes.pop("transB", 0))
    # transA, transBatchA and transBatchB are flags, alpha and beta factors: set, they make another product.
    plain = all(value == (1 if name in ("alpha", "beta") else 0) for name, value in attributes.items())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Product(weight, by_row, bias) if plain else None
