"""Activations in one node, found by what they give: exporters spell GELU in eight nodes, and SiLU in two."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import erf, pi, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve_export.fusion.chains import Region, places_of, regions_behind
from trimserve_export.fusion.probing import Probe
from trimserve_export.graphs.nodes import NodeWriter

Curve = npt.NDArray[np.float64]
_ANCHORS = frozenset({"Sigmoid", "Tanh", "Erf"})
_POINTWISE = frozenset(
    {"Add", "Cast", "Div", "Erf", "Identity", "Mul", "Neg", "Pow", "Sigmoid", "Sub", "Tanh"}
)
# From the anchor to the product that ends an activation.
_STEPS = 5
_GRID = np.linspace(-6, 6, 97)
_TOLERANCE = {ir.DataType.FLOAT16: 1e-2}


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator, and its curve."""

    curve: Callable[[Curve], Curve]
    op_type: str
    domain: str = "com.microsoft"
    attributes: dict[str, Any] = field(default_factory=dict)


def _sigmoid(x: Curve) -> Curve:
    return np.asarray(1 / (1 + np.exp(-x)))


# GELU and its approximations, by a hyperbolic tangent and by a sigmoid: Hendrycks and Gimpel 2016, section 2.
_OPERATORS = (
    _Operator(lambda x: x * _sigmoid(x), "QuickGelu", attributes={"alpha": 1.0}),
    _Operator(lambda x: x * _sigmoid(1.702 * x), "QuickGelu", attributes={"alpha": 1.702}),
    _Operator(lambda x: x / 2 * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), "FastGelu"),
    _Operator(lambda x: x / 2 * (1 + np.vectorize(erf)(x / sqrt(2))), "Gelu"),
)


def fuse_activations(graph: ir.Graph, probe: Probe) -> int:
    """Write each activation as one node, in place; returns how many."""
    places, found = places_of(graph), 0
    for anchor in [node for node in graph if node.op_type in _ANCHORS and probe.is_data(node.outputs[0])]:
        for value in _onward(anchor.outputs[0]):
            region = _back_to(anchor, value, probe, places)
            operator = None if region is None else _operator_of(region, probe)
            if region is None or operator is None:
                continue
            writer = NodeWriter(graph, f"activation/{found}")
            fed, attributes = [region.entry], operator.attributes
            made = writer.op(operator.op_type, fed, domain=operator.domain, **attributes)
            writer.insert_before(region.node)
            probe.take_over(value, made)
            found += 1
            break
    return found


def _onward(value: ir.Value) -> Iterator[ir.Value]:
    for _ in range(_STEPS):
        users = {use.node for use in value.uses()}
        if len(users) != 1:
            return
        value = users.pop().outputs[0]
        yield value


def _back_to(anchor: ir.Node, value: ir.Value, probe: Probe, places: Mapping[ir.Node, int]) -> Region | None:
    """All that is between a value and where the data of an anchor comes in, if it works number by number."""
    nodes: list[ir.Node] = []
    for region in regions_behind(value, probe, places):
        nodes += region.nodes
        if any(node.op_type not in _POINTWISE for node in region.nodes):
            return None
        if anchor in region.nodes:
            return Region(region.entry, value, tuple(nodes))
    return None


def _operator_of(region: Region, probe: Probe) -> _Operator | None:
    """The operator that gives what a region gives on a grid."""
    dtype = region.entry.dtype or ir.DataType.FLOAT
    fed = _GRID.astype(dtype.numpy())
    (found,) = probe.run([region.exit], {region.entry: fed[None, None]}, new=1, past=0)
    tolerance = _TOLERANCE.get(dtype, 1e-5)
    for operator in _OPERATORS:
        expected = operator.curve(fed.astype(np.float64))
        if found.size == expected.size and np.allclose(found.reshape(-1), expected, rtol=0, atol=tolerance):
            return operator
    return None
