"""Find the embedding and the head of a graph by following the data: from `input_ids`, and back from `logits`.

Never by a dimension that equals the vocab size: position tables and linear layers can have that, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError

# The first in which Unsqueeze takes its axes as an input, and Min takes int64.
OLDEST_OPSET = 13
# Operators whose output holds the same ids in another shape or integer type.
_SAME_IDS = frozenset({"Identity", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"})
# Operators that look at ids without caring which row they stand for. Equal compares with a special
# token (RoBERTa's pad): compact ids of special tokens are constants of the graph, cold slots equal none.
_BLIND = frozenset({"Shape", "Size", "Equal"})
# What may stand between the head's product and `logits`, a position and a token at a time.
_POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulBnb4"})


@dataclass(frozen=True, slots=True)
class Embedding:
    """The token embedding of a graph.

    Attributes:
        gather: the node ``Gather(table, ids)`` or ``GatherBlockQuantized(table, ids, ...)``.
        ids: its second input, in the shape that the graph made of `input_ids`.
        table: the constant (K, H); of a quantised embedding the integers, K rows of some shape.
        output: the rows that were looked up, as floats: the node's own output, or that of the
            DequantizeLinear behind it.
        width: H.
        dtype: type of `output`.
    """

    gather: ir.Node
    ids: ir.Value
    table: ir.Value
    output: ir.Value
    width: int
    dtype: ir.DataType

    @property
    def rows(self) -> int:
        """K."""
        return _shape(self.table)[0]


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
        quantizer: the DynamicQuantizeLinear before a MatMulInteger: one scale for all positions of a call.
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
        return _shape(self.weight)[0 if self.by_row else 1]

    @property
    def width(self) -> int:
        """H."""
        if self.product.op_type in ("MatMulNBits", "MatMulBnb4"):
            return self.product.attributes["K"].as_int()  # the last block of a row may be padded
        return _shape(self.weight)[1 if self.by_row else 0]

    @property
    def dtype(self) -> ir.DataType:
        """Type of the weight (of its scales, if quantised), and so of the hidden states."""
        scales = self.product.inputs[2] if self.is_quantized else self.scales
        return _tensor(self.weight if scales is None else scales).dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in blocks of integers."""
        return self.product.op_type == "MatMulNBits"

    @property
    def is_plain(self) -> bool:
        """Whether it is one product with rows or columns of floats, or with the blocks of MatMulNBits."""
        return self.scales is None and self.flatten is None


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise UnsupportedModelError(f"{value.name} is no constant of the graph.")
    return value.const_value


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


def describe(node: ir.Node) -> str:
    """Name a node for an error message."""
    return f"{node.op_type} {node.name!r}"


def check_opset(model: ir.Model) -> None:
    """Refuse a graph of operators that are older than those which are added to it.

    Raises:
        UnsupportedModelError: its opset is below `OLDEST_OPSET`.
    """
    found = model.opset_imports.get("", OLDEST_OPSET)
    if found < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"the graph has opset {found}, and {OLDEST_OPSET} is the oldest that nodes can be added to: "
            "convert it with onnx.version_converter."
        )


def find_input(graph: ir.Graph, name: str) -> ir.Value:
    """Return a graph input by its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    for value in graph.inputs:
        if value.name == name:
            return value
    names = ", ".join(str(value.name) for value in graph.inputs)
    raise UnsupportedModelError(f"the graph has no input {name}: it has {names}.")


def find_output(graph: ir.Graph, name: str) -> ir.Value:
    """Return a graph output by its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    for value in graph.outputs:
        if value.name == name:
            return value
    names = ", ".join(str(value.name) for value in graph.outputs)
    raise UnsupportedModelError(f"the graph has no output {name}: it has {names}.")


def find_embedding(graph: ir.Graph) -> Embedding:
    """Follow `input_ids` to the one table that it is looked up in.

    Raises:
        UnsupportedModelError: no table, more than one, or a node that computes with the ids themselves.
    """
    found = []
    for node, ids in _uses_of_ids(find_input(graph, "input_ids")):
        embedding = _looked_up(node, ids) if node.graph is graph else None
        if embedding is not None:
            found.append(embedding)
        elif node.op_type not in _BLIND:
            raise UnsupportedModelError(
                f"{describe(node)} depends on the token ids themselves: compact ids would change its result."
            )
    if len(found) != 1:
        nodes = ", ".join(describe(embedding.gather) for embedding in found) or "none"
        raise UnsupportedModelError(
            f"expected one table that input_ids is looked up in, found {len(found)} ({nodes})."
        )
    return found[0]


def _uses_of_ids(ids: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in ids.consumers():
        if node.op_type in _SAME_IDS and node.inputs[0] is ids:
            yield from _uses_of_ids(node.outputs[0])
        else:
            yield node, ids


def _looked_up(node: ir.Node, ids: ir.Value) -> Embedding | None:
    if len(node.inputs) < 2 or node.inputs[1] is not ids:
        return None
    if node.op_type == "GatherBlockQuantized":
        return _looked_up_in_blocks(node, ids)
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or (axis is not None and axis.as_int() != 0):
        return None
    output = node.outputs[0]
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if before is not None and before.op_type == "DequantizeLinear":
        found, scale = _constant_behind(before.inputs[0]), before.inputs[1]
    else:
        found, scale = _constant_behind(node.inputs[0]), None
    if found is None or found[1]:
        return None
    table = found[0]
    after = [user for user in output.consumers() if user.op_type == "DequantizeLinear"]
    if scale is None and len(after) == 1 and len(list(output.uses())) == 1:
        output, scale = after[0].outputs[0], after[0].inputs[1]
    return Embedding(node, ids, table, output, _shape(table)[1], _tensor(scale or table).dtype)


def _looked_up_in_blocks(node: ir.Node, ids: ir.Value) -> Embedding | None:
    """Integers of fewer than 8 bits lie in bytes (uint8), or have a type of their own (int4, uint4)."""
    value, scales = node.inputs[0], node.inputs[2]
    reshape = None if value is None else value.producer()
    if reshape is not None and reshape.op_type == "Reshape":
        shape = ir.convenience.get_const_tensor(reshape.inputs[1]) if reshape.inputs[1] else None
        value = reshape.inputs[0]
    else:
        shape = None
    if value is None or value.const_value is None or scales is None or (reshape and shape is None):
        return None
    columns = int(_shape(value)[-1] if shape is None else shape.numpy()[-1])
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    packed = 8 // bits if _tensor(value).dtype == ir.DataType.UINT8 else 1
    return Embedding(node, ids, value, node.outputs[0], columns * packed, _tensor(scales).dtype)


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
        if node.op_type in _PRODUCTS:
            return _head(node, tuple(reversed(after)), unflatten)
        if node.op_type == "Reshape" and unflatten is None and node.inputs[0] is not None:
            unflatten, value = node, node.inputs[0]
            continue
        if (integers := _integer_head(node, tuple(reversed(after)))) is not None:
            return integers
        operands = [operand for operand in node.inputs if operand is not None and not _is_constant(operand)]
        if node.op_type not in _POINTWISE or len(operands) != 1 or _is_reversed(node, operands[0]):
            raise UnsupportedModelError(
                f"{describe(node)} stands between the head and logits: not understood."
            )
        if node.op_type not in ("Identity", "Cast"):
            after.append((node.op_type, _number_in(node)))
        value = operands[0]
    raise UnsupportedModelError("logits do not come from a product with a weight: the graph has no head.")


def _is_reversed(node: ir.Node, operand: ir.Value) -> bool:
    return node.op_type in ("Sub", "Div") and node.inputs[0] is not operand


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
    if unflatten is not None:
        raise UnsupportedModelError(
            f"{describe(unflatten)} reshapes the logits: expected a Gemm of flattened positions before it."
        )
    if node.op_type == "MatMulNBits" and hidden is not None and operand is not None:
        return Head(node, hidden, operand, by_row=True, after=_with_bias(node, 5, after))
    if node.op_type == "MatMulBnb4" and hidden is not None and operand is not None:
        return Head(node, hidden, operand, by_row=True, after=after, scales=node.inputs[2])
    found, scales = _constant_behind(operand), None
    if found is None:
        found, scales = _integers_behind(operand)
    if hidden is None or found is None or _flag(node, "transA"):
        raise UnsupportedModelError(f"{describe(node)} makes the logits without a constant weight.")
    weight, transposed = found
    return Head(node, hidden, weight, transposed != _flag(node, "transB"), after, scales)


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
    found = _constant_behind(node.inputs[1])
    hidden = None if flatten is None or flatten.op_type != "Reshape" else flatten.inputs[0]
    shape = None if hidden is None or flatten is None else flatten.inputs[1]
    sizes = None if shape is None else ir.convenience.get_const_tensor(shape)
    plain = sizes is not None and sizes.numpy().reshape(-1)[:-1].tolist() == [-1]
    if flatten is None or hidden is None or not plain or unflatten is None or found is None:
        raise UnsupportedModelError(
            f"{describe(node)} makes the logits: expected hidden states reshaped to (-1, width), a constant "
            "weight, and a Reshape of what it gives."
        )
    if _flag(node, "transA"):
        raise UnsupportedModelError(f"{describe(node)} makes the logits of transposed hidden states.")
    weight, transposed = found
    by_row = transposed != _flag(node, "transB")
    return Head(node, hidden, weight, by_row, _with_bias(node, 2, after), flatten=(flatten, unflatten))


def _integers_behind(value: ir.Value | None) -> tuple[tuple[ir.Value, bool] | None, ir.Value | None]:
    """The integers, and whether they are transposed, and the scales of a weight that is dequantised."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            found = _constant_behind(node.inputs[0])
            return (None if found is None else (found[0], found[1] != transposed)), node.inputs[1]
        if node.op_type not in ("Identity", "Transpose"):
            break
        transposed ^= node.op_type == "Transpose" and _swaps(node)
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
    quantizer = product.inputs[0].producer()
    if quantizer is not None and quantizer.op_type == "Slice" and quantizer.inputs[0] is not None:
        quantizer = quantizer.inputs[0].producer()  # the last positions of a servable graph
    scales = next((value for value in both.inputs if value is not None and _is_constant(value)), None)
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


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _constant_behind(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The matrix that a value is, perhaps through Identity and Transpose, and whether it is transposed."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Identity", "Transpose"):
            return None
        transposed ^= node.op_type == "Transpose" and _swaps(node)
        value = node.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value, transposed


def _swaps(transpose: ir.Node) -> bool:
    perm = transpose.attributes.get("perm")
    return perm is None or tuple(perm.as_ints()) == (1, 0)


def _is_constant(value: ir.Value) -> bool:
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None:
        return False  # a graph input
    return all(operand is None or _is_constant(operand) for operand in node.inputs)
