"""Find the vocab head of a graph by following the data back from `logits`, in every layout that is served.

Never by a dimension that equals the vocab size: linear layers can have that, too.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve_export.graphs.values import (
    describe,
    find_output,
    is_constant,
    is_set,
    matrix_behind,
    shape_of,
    swaps_axes,
    tensor_of,
)
from trimserve_export.graphs.vocab_flow import PRODUCTS, REPEATED

# Found by the scales behind it; and what `unfuse_head` takes apart.
_UNSERVED = frozenset({"MatMulInteger", "DynamicQuantizeMatMul"})
# Products of integers with a constant scale for activations: which inputs are weight, its scales, a bias.
STATIC_PRODUCTS = {"QLinearMatMul": (3, 4, None), "MatMulIntegerToFloat": (1, 3, 6)}


@dataclass(frozen=True, slots=True)
class Head:
    """The vocab head of a graph: ``logits = pointwise(product(hidden, weight))``.

    Attributes:
        product: the MatMul, FusedMatMul or MatMulNBits node.
        hidden: its first input, (B, T, H).
        weight: the constant behind its second input, (K, H) if `by_row`, else (H, K); of a quantised head
            the integers, (K, blocks, bytes of a block).
        by_row: whether a token's weights are a row of the stored constant.
        after: the operators from the product to `logits`, in order, each with its constant: a number, or
            None where it has none or one a token (a bias). Gemma 2's soft cap is
            ``(("Div", 30.0), ("Tanh", None), ("Mul", 30.0))``.
        scales: of a weight that the graph makes of integers, in a layout other than MatMulNBits', what they
            are scaled by.
        flatten: the Reshape before a Gemm, which takes positions without a batch axis, and the one after it.
        quantizer: what makes integers of the hidden states: DynamicQuantizeLinear, with one scale for all
            positions of a call, or QuantizeLinear, with one for all calls.
    """

    product: ir.Node
    hidden: ir.Value
    weight: ir.Value
    by_row: bool
    after: tuple[tuple[str, float | None], ...] = ()
    scales: ir.Value | None = None
    flatten: tuple[ir.Node, ir.Node] | None = None
    quantizer: ir.Node | None = None

    @property
    def rows(self) -> int:
        """K."""
        if self.product.op_type == "MatMulBnb4":
            return self.product.attributes["N"].as_int()
        return shape_of(self.weight)[0 if self.by_row else 1]

    @property
    def width(self) -> int:
        """H."""
        if self.product.op_type in ("MatMulNBits", "MatMulBnb4"):
            return self.product.attributes["K"].as_int()  # the last block of a row may be padded
        return shape_of(self.weight)[1 if self.by_row else 0]

    @property
    def dtype(self) -> ir.DataType:
        """Type of the weight (of its scales, if quantised), and so of the hidden states."""
        scales = self.product.inputs[2] if self.is_quantized else self.scales
        return tensor_of(self.weight if scales is None else scales).dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in blocks of integers."""
        return self.product.op_type == "MatMulNBits"

    @property
    def is_dynamic(self) -> bool:
        """Whether the hidden states are quantised by a scale that all positions of a call share."""
        return self.quantizer is not None and self.quantizer.op_type == "DynamicQuantizeLinear"

    @property
    def is_plain(self) -> bool:
        """Whether it is one product with rows or columns of floats, or with the blocks of MatMulNBits."""
        return self.scales is None and self.flatten is None


def find_head(graph: ir.Graph) -> Head:
    """Go back from `logits` to the product with the head's weight.

    Raises:
        UnsupportedModelError: an operator on the way is not understood; the message names it.
    """
    value = find_output(graph, "logits")
    if value.shape is None or len(value.shape) != 3:
        raise UnsupportedModelError(f"logits should be (batch, positions, tokens), found {value.shape}.")
    after: list[tuple[str, float | None]] = []
    unflatten: ir.Node | None = None
    while (node := value.producer()) is not None:
        if node.op_type in PRODUCTS - _UNSERVED:
            return _head(node, tuple(reversed(after)), unflatten)
        if node.op_type == "Reshape" and unflatten is None and node.inputs[0] is not None:
            unflatten, value = node, node.inputs[0]
            continue
        if (integers := _integer_head(node, tuple(reversed(after)))) is not None:
            return integers
        operands = [operand for operand in node.inputs if operand is not None and not is_constant(operand)]
        if node.op_type not in REPEATED or len(operands) != 1 or _is_reversed(node, operands[0]):
            raise UnsupportedModelError(
                f"{describe(node)} stands between the head and logits: not understood."
            )
        after += reversed(_steps(node))
        value = operands[0]
    raise UnsupportedModelError("logits do not come from a product with a weight: the graph has no head.")


def _is_reversed(node: ir.Node, operand: ir.Value) -> bool:
    return node.op_type in ("Sub", "Div") and node.inputs[0] is not operand


def _steps(node: ir.Node) -> list[tuple[str, float | None]]:
    """What a pointwise node does, as entries of `Head.after`."""
    if node.op_type in ("Identity", "Cast"):
        return []
    if node.op_type == "QuantizeLinear":
        return _rounding(node, 1)
    if node.op_type == "DequantizeLinear":
        scale, zero = _scale_and_zero(node, 1)
        return [("Sub", float(zero)), ("Mul", scale)]
    return [(node.op_type, _number_in(node))]


def _rounding(node: ir.Node, index: int) -> list[tuple[str, float | None]]:
    """Make integers by a scale, which is an input of the node, and the zero point behind it."""
    scale, zero = _scale_and_zero(node, index)
    limits = np.iinfo(zero.dtype)
    bounds = [("Max", float(limits.min)), ("Min", float(limits.max))]
    return [("Div", scale), ("Round", None), ("Add", float(zero)), *bounds]


def _scale_and_zero(node: ir.Node, index: int) -> tuple[float, np.ndarray]:
    """One number for all tokens each; a zero point that is left out is 0 of the type of bytes.

    Raises:
        UnsupportedModelError: there are several, or none.
    """
    tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs]
    scale, zero = (*tensors, None)[index : index + 2]
    if scale is None or any(tensor is not None and tensor.size != 1 for tensor in (scale, zero)):
        raise UnsupportedModelError(
            f"{describe(node)} scales logits by other than one constant number: not understood."
        )
    middle = np.zeros((), np.uint8) if zero is None else zero.numpy().reshape(())
    return float(scale.numpy().item()), middle


def _number_in(node: ir.Node) -> float | None:
    """The one number among a node's inputs, if it has one."""
    tensors = [ir.convenience.get_const_tensor(value) for value in node.inputs if value is not None]
    numbers = [float(tensor.numpy().item()) for tensor in tensors if tensor is not None and tensor.size == 1]
    return numbers[0] if numbers else None


def _head(
    node: ir.Node, after: tuple[tuple[str, float | None], ...], unflatten: ir.Node | None = None
) -> Head:
    hidden, operand = node.inputs[0], node.inputs[1]
    if node.op_type == "Gemm":
        return _flattened_head(node, after, unflatten)
    if node.op_type in STATIC_PRODUCTS:
        return _static_head(node, after)
    if unflatten is not None:
        raise UnsupportedModelError(
            f"{describe(unflatten)} reshapes the logits: expected a Gemm of flattened positions before it."
        )
    if node.op_type == "MatMulNBits" and hidden is not None and operand is not None:
        return Head(node, hidden, operand, by_row=True, after=_with_bias(node, 5, after))
    if node.op_type == "MatMulBnb4" and hidden is not None and operand is not None:
        return Head(node, hidden, operand, by_row=True, after=after, scales=node.inputs[2])
    found, scales = matrix_behind(operand), None
    if found is None:
        found, scales = _integers_behind(operand)
    if hidden is None or found is None or is_set(node, "transA"):
        raise UnsupportedModelError(f"{describe(node)} makes the logits without a constant weight.")
    weight, transposed = found
    return Head(node, hidden, weight, transposed != is_set(node, "transB"), after, scales)


def _with_bias(
    node: ir.Node, index: int, after: tuple[tuple[str, float | None], ...]
) -> tuple[tuple[str, float | None], ...]:
    """A product's own bias is added first."""
    has_bias = len(node.inputs) > index and node.inputs[index] is not None
    return (("Add", None), *after) if has_bias else after


def _flattened_head(
    node: ir.Node, after: tuple[tuple[str, float | None], ...], unflatten: ir.Node | None
) -> Head:
    """Gemm takes no batch axis: positions are flattened before it, and get their axes back after it."""
    flatten = None if node.inputs[0] is None else node.inputs[0].producer()
    found = matrix_behind(node.inputs[1])
    hidden = None if flatten is None or flatten.op_type != "Reshape" else flatten.inputs[0]
    shape = None if hidden is None or flatten is None else flatten.inputs[1]
    sizes = None if shape is None else ir.convenience.get_const_tensor(shape)
    plain = sizes is not None and sizes.numpy().reshape(-1)[:-1].tolist() == [-1]
    if flatten is None or hidden is None or not plain or unflatten is None or found is None:
        raise UnsupportedModelError(
            f"{describe(node)} makes the logits: expected hidden states reshaped to (-1, width), a constant "
            "weight, and a Reshape of what it gives."
        )
    if is_set(node, "transA"):
        raise UnsupportedModelError(f"{describe(node)} makes the logits of transposed hidden states.")
    weight, transposed = found
    by_row = transposed != is_set(node, "transB")
    return Head(node, hidden, weight, by_row, _with_bias(node, 2, after), flatten=(flatten, unflatten))


def _static_head(node: ir.Node, after: tuple[tuple[str, float | None], ...]) -> Head:
    """A product of integers whose activations have one constant scale."""
    weight_index, scale_index, bias_index = STATIC_PRODUCTS[node.op_type]
    quantizer = _behind_slice(node.inputs[0])
    weight, scales = node.inputs[weight_index], node.inputs[scale_index]
    if (
        quantizer is None
        or quantizer.op_type != "QuantizeLinear"
        or quantizer.inputs[0] is None
        or weight is None
        or weight.const_value is None
        or scales is None
    ):
        raise UnsupportedModelError(
            f"{describe(node)} makes the logits: expected the integers of a QuantizeLinear or "
            "DynamicQuantizeLinear, and a constant weight."
        )
    if node.op_type == "QLinearMatMul":
        after = (*_rounding(node, 6), *after)
    if bias_index is not None:
        after = _with_bias(node, bias_index, after)
    return Head(
        node, quantizer.inputs[0], weight, by_row=False, after=after, scales=scales, quantizer=quantizer
    )


def _behind_slice(value: ir.Value | None) -> ir.Node | None:
    """What makes a value, or what the last positions of a servable graph are taken of."""
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "Slice" and maker.inputs[0] is not None:
        return maker.inputs[0].producer()
    return maker


def _integers_behind(value: ir.Value | None) -> tuple[tuple[ir.Value, bool] | None, ir.Value | None]:
    """The integers, and whether they are transposed, and the scales of a weight that is dequantised."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            found = matrix_behind(node.inputs[0])
            return (None if found is None else (found[0], found[1] != transposed)), node.inputs[1]
        if node.op_type not in ("Identity", "Transpose"):
            break
        transposed ^= node.op_type == "Transpose" and swaps_axes(node)
        value = node.inputs[0]
    return None, None


def _integer_head(node: ir.Node, after: tuple[tuple[str, float | None], ...]) -> Head | None:
    """``Mul(Cast(MatMulInteger(q, W, ...)), Mul(q's scale, W's scales))``, q from DynamicQuantizeLinear."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return None
    makers = [None if value is None else value.producer() for value in node.inputs]
    cast = next((maker for maker in makers if maker is not None and maker.op_type == "Cast"), None)
    both = next((maker for maker in makers if maker is not None and maker.op_type == "Mul"), None)
    product = None if cast is None or cast.inputs[0] is None else cast.inputs[0].producer()
    if both is None or product is None or product.op_type != "MatMulInteger" or product.inputs[0] is None:
        return None
    quantizer = _behind_slice(product.inputs[0])
    scales = next((value for value in both.inputs if value is not None and is_constant(value)), None)
    weight = product.inputs[1]
    if (
        quantizer is None
        or quantizer.op_type != "DynamicQuantizeLinear"
        or quantizer.outputs[1] not in both.inputs
        or quantizer.inputs[0] is None
        or scales is None
        or weight is None
        or weight.const_value is None
    ):
        return None
    hidden = quantizer.inputs[0]
    return Head(product, hidden, weight, by_row=False, after=after, scales=scales, quantizer=quantizer)
