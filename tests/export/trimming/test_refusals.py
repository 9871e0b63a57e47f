"""Graphs that are not understood are refused by the name of the node, before anything is changed."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tests.support.folders import make_vocab
from tests.support.graphs import CONTRIB, EMBEDDINGS, HEADS, GraphText, middle, sketch
from trimserve.errors import UnsupportedModelError
from trimserve_export.trimming import trim_graph

pytestmark = pytest.mark.export

V = 37
VOCAB = make_vocab((0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36), V)


def refuse(made: GraphText, match: str, outputs: str | None = None, *, has_head: bool = True) -> None:
    model = made.model(outputs)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(UnsupportedModelError, match=match):
        trim_graph(model, VOCAB, has_head=has_head)
    assert ir.to_proto(model).SerializeToString() == before


def with_line(line: str, **tensors: np.ndarray) -> GraphText:
    made = sketch("plain", "matmul")
    made.add(line, **tensors)
    return made


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("x = Add(input_ids, one)", "Add .* computes with token ids"),
        ("x = Cast<to = 1>(input_ids)", "Cast .* computes with token ids"),
        ("x = Cast<to = 9>(input_ids)", "Cast .* computes with token ids"),
        ("x = Equal(input_ids, input_ids)", "Equal .* no constant"),
        ("x = ReduceMean(table)", "ReduceMean .* also reads table"),
        ("x = ArgMax<axis = -1>(logits)", "ArgMax .* also reads logits"),
        ("x = Identity(product)", "Identity .* also reads product"),
        ("x = MatMul(across, square)\n across = Transpose(head)", "also reads head"),
    ],
)
def test_other_uses(line, match):
    made = with_line("\n".join(reversed(line.split("\n "))), one=np.array(1))
    refuse(made, match, f"float[batch, seq, {V}] logits, float[n] x")


def test_id_that_is_not_kept():
    model = with_line("x = Equal(input_ids, image)", image=np.array(21)).model()
    with pytest.raises(
        UnsupportedModelError, match=r"with 21, which this vocab does not keep.*--keep-ids 21"
    ):
        trim_graph(model, VOCAB, has_head=True)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("logits = Softmax(product)", "Softmax .* stands between"),
        ("logits = MatMul(product, wide)", "wide to have 37 entries along axis 1"),
        ("small = MatMul(product, narrow)\nlogits = Identity(small)", "found shape .37, 5"),
        ("logits = Add(product, product)", None),
        ("other = Softmax(product)\nlogits = Add(product, other)", "Softmax .* stands between"),
        ("logits = Reshape(product, minus)", "reshapes logits"),
        ("logits = Add(product, five)", "five to have 37 entries"),
    ],
)
def test_ways_to_the_logits(line, match):
    made = GraphText()
    EMBEDDINGS["plain"](made)
    middle(made)
    HEADS["matmul"](made)
    narrow, wide = made.floats(V, 5), made.floats(V, 40)
    made.add(line, narrow=narrow, wide=wide, minus=np.array([1, -1, 1]), five=made.floats(5))
    if match is None:
        trim_graph(made.model(), VOCAB, has_head=True)
    else:
        refuse(made, match)


def test_weight_that_is_no_constant():
    made = GraphText()
    EMBEDDINGS["plain"](made)
    made.add("wide = Softmax(table)\nlogits = MatMul(rows, wide)")
    refuse(made, "Softmax .* makes the table of MatMul")


def test_table_for_two_axes():
    made = GraphText(V=V, H=V)
    EMBEDDINGS["plain"](made)
    made.add("logits = MatMul(rows, table)")
    refuse(made, "along axis 0 for one node and along axis 1 for another")


def test_other_rows_than_the_vocab():
    refuse(
        sketch("plain", "matmul", V=40), "expected table to have 37 entries along axis 0, found shape .40, 16"
    )


@pytest.mark.parametrize(
    ("attribute", "value", "head", "match"),
    [
        ("weight_prepacked", 1, "nbits_4", "packed order"),
        ("N", 30, "nbits_4", "makes 30 logits: expected 37"),
        ("bits", 8, "nbits_4", "expected data to hold 16 entries"),
        ("block_size", 32, "bnb4", "belongs to several tokens"),
        ("block_size", 16, "qdq_by_token", "blocks of several tokens"),
        ("transBatchB", 1, "fused", "transBatchB"),
        ("quantize_axis", 0, "blocks", "quantised in blocks"),
    ],
)
def test_attributes(attribute, value, head, match):
    made = sketch("blocks_int4", "matmul") if head == "blocks" else sketch("plain", head)
    model = made.model()
    operators = ("MatMulNBits", "MatMulBnb4", "DequantizeLinear", "FusedMatMul", "GatherBlockQuantized")
    node = next(node for node in model.graph if node.op_type in operators)
    node.attributes.add(ir.AttrInt64(attribute, value))
    with pytest.raises(UnsupportedModelError, match=match):
        trim_graph(model, VOCAB, has_head=True)


def test_nothing_to_trim():
    made = GraphText()
    made.add("x = Shape(input_ids)")
    refuse(made, "nothing to trim", "int64[n] x", has_head=False)
    refuse(made, "no output logits", "int64[n] x")


def test_operator_of_another_domain():
    made = GraphText()
    EMBEDDINGS["plain"](made)
    made.add(f"logits = {CONTRIB}.QMoE(rows)")
    refuse(made, "QMoE")
