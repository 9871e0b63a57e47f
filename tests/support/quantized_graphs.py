"""What the products of a quantised graph multiply with, as floats."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from trimserve.files.quantized import dequantize
from trimserve_export.serving.quantize import scheme_of


def matrices(graph: ir.Graph) -> Iterator[tuple[ir.Node, np.ndarray]]:
    """Each MatMulNBits and the rows that it and the product beside it stand for, float32 (n, H)."""
    for node in graph:
        if node.op_type != "MatMulNBits":
            continue
        # Scales that are stored in float16 are cast.
        given = [
            value if value.producer() is None else value.producer().inputs[0] for value in node.inputs[1:]
        ]
        integers, scales, *zeros = (value.const_value.numpy() for value in given)
        scheme, scales = scheme_of(node), scales.reshape(integers.shape[:2]).astype(np.float32)
        zeros = [packed.reshape(len(integers), -1) for packed in zeros]
        width = node.attributes["K"].as_int()
        rows = dequantize(integers, scales, width, scheme, *zeros) + _added(node, scheme.block_size)
        yield node, rows + np.float32(0)  # no -0.0


def _added(product: ir.Node, size: int) -> np.ndarray | np.float32:
    """What a graph adds to the product of a matrix with minima, for each number of the matrix; else 0."""
    ((consumer, _),) = product.outputs[0].uses() if product.outputs[0].uses() else ((None, 0),)
    sums = None if consumer is None or consumer.op_type != "Add" else consumer.inputs[1].producer()
    if sums is None or sums.op_type != "MatMul":
        return np.float32(0)
    return np.repeat(_offsets(sums.inputs[1]), size, axis=1)


def _offsets(value: ir.Value) -> np.ndarray:
    """The offsets (n, blocks): a constant, turned, or a minimum and the scales that lead to the middle."""
    if value.producer() is None:
        return value.const_value.numpy().T
    minima, steps = value.producer().inputs[0].producer().inputs
    scales, middle = steps.producer().inputs
    halves = [one.producer().inputs[0].const_value.numpy().astype(np.float32) for one in (minima, scales)]
    return halves[0] + halves[1] * middle.const_value.numpy()
