"""What the vocab's data flow may pass: token ids on their way to the tables, logits on theirs from the head.

The one list of operators. Trimming follows all of them, and cuts or moves what it meets
(`trimming/lookups.py`, `trimming/logits.py`); serving finds tables and head by the same steps
(`embeddings.py`, `head.py`), and refuses what the runtime could not do for cold ids. A new operator is added
here first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

# First input: ids; output: the same ids, or some of them, in another shape or integer type. Gather of ids
# picks positions, such as the last one.
SAME_IDS = frozenset(
    {
        "Identity",
        "Reshape",
        "Cast",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Transpose",
        "Slice",
        "Expand",
        "Tile",
        "Gather",
    }
)
# Operators that look at the shape alone.
BLIND = frozenset({"Shape", "Size"})
BOUNDS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
COMPARISONS = frozenset({"Equal", *BOUNDS})
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})

# Logits: one input that counts; the output's last axis is the input's.
UNARY = frozenset(
    {"Identity", "Cast", "Tanh", "Sigmoid", "Neg", "Abs", "Relu", "Exp", "Log", "Sqrt", "Dropout"}
)
# Operands broadcast against each other.
POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Where", "Sum", "PRelu", "Clip"})
# By one number for all tokens.
SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Those that the runtime repeats for the logits of cold ids (`Head.after`).
REPEATED = frozenset({"Identity", "Cast", "Tanh", "Add", "Sub", "Mul", "Div"}) | SCALED
# What makes logits of hidden states; serving takes a fused product apart first (`unfuse_head`), and knows
# MatMulInteger by the scales behind it.
PRODUCTS = frozenset(
    {
        "MatMul",
        "FusedMatMul",
        "Gemm",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QLinearMatMul",
    }
)


@dataclass(frozen=True, slots=True)
class IdUse:
    """A node that does something with token ids.

    Attributes:
        node: the node.
        index: which of its inputs the ids are.
        ids: that input: what the graph was fed, perhaps in another shape or integer type.
        choice: the last use on the way that replaced some of the ids (``Where(condition, ids, id)``), if any.
    """

    node: ir.Node
    index: int
    ids: ir.Value
    choice: "IdUse | None" = None

    @property
    def is_choice(self) -> bool:
        """Whether the node gives the ids on, some of them replaced."""
        return self.node.op_type == "Where" and self.index > 0

    @property
    def is_comparison(self) -> bool:
        """Whether the node compares the ids with others."""
        return self.node.op_type in COMPARISONS


def uses_of_ids(ids: ir.Value, choice: IdUse | None = None) -> Iterator[IdUse]:
    """Follow token ids to every node that does more with them than to give them on, depth first.

    A node that replaces some of them is given, and then what is done with the outcome.

    Args:
        ids: the graph's input, or a value that holds the same ids.
        choice: what replaced some of them already.
    """
    for node, index in ids.uses():
        use = IdUse(node, index, ids, choice)
        if _gives_on(node, index):
            yield from uses_of_ids(node.outputs[0], choice)
        elif use.is_choice:
            yield use
            yield from uses_of_ids(node.outputs[0], use)
        elif node.op_type not in BLIND:
            yield use


def _gives_on(node: ir.Node, index: int) -> bool:
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() in _INTEGERS
    return index == 0 and node.op_type in SAME_IDS
