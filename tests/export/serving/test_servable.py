"""The serving passes on graphs of a few lines: what they find, change and refuse."""

import json

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tests.support.exports import open_graph
from tests.support.rounding import assert_within, chain_bound
from trimserve.errors import UnsupportedModelError
from trimserve.runtime.after_head import AFTER_HEAD_KEY
from trimserve_export.graphs.embeddings import find_embeddings
from trimserve_export.graphs.head import find_head
from trimserve_export.serving.servable import make_servable

pytestmark = pytest.mark.export

# As many positions and hidden units as rows: a search for "a dimension equal to K" would be lost.
K = H = 11
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "table": RANDOM.standard_normal((K, H), np.float32),
    "positions": RANDOM.standard_normal((K, H), np.float32),
    "square": RANDOM.standard_normal((H, H), np.float32),
    "head": RANDOM.standard_normal((H, K), np.float32),
    "bias": RANDOM.standard_normal(K, np.float32),
    "thirty": np.array(30, np.float32),
    "pad": np.array(5, np.int64),
    "flat": np.array([1, -1], np.int64),
}
HIDDEN = """
    token = Gather(table, input_ids)
    position = Gather(positions, position_ids)
    sum = Add(token, position)
    hidden = MatMul(sum, square)
"""
LOGITS = "float[batch, seq, 11] logits"


def parse(body: str, outputs: str = LOGITS, **weights: np.ndarray) -> "ir.Model":
    text = f"""<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
    model (int64[batch, seq] input_ids, int64[batch, seq] position_ids) => ({outputs}) {{ {body} }}"""
    tensors = [ir.tensor(array, name=name) for name, array in (WEIGHTS | weights).items()]
    return ir.from_onnx_text(text, initializers=[tensor for tensor in tensors if tensor.name in body])


def serve(tmp_path, body: str, outputs: str = LOGITS, *, rows: int = K, head: bool = True, **weights):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    ir.save(parse(body, outputs, **weights), tmp_path / "in" / "model.onnx")
    return make_servable(tmp_path / "in" / "model.onnx", tmp_path / "out", rows=rows, has_head=head)


def run(path, ids, cold_rows=None, keep: int = 0) -> dict[str, np.ndarray]:
    session = open_graph(path)
    known = {
        "input_ids": np.array(ids, np.int64),
        "position_ids": np.tile(np.arange(np.shape(ids)[1]), (np.shape(ids)[0], 1)),
        "cold_rows": np.zeros((1, H), np.float32) if cold_rows is None else cold_rows,
        "logits_to_keep": np.array(keep, np.int64),
    }
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {value.name: known[value.name] for value in session.get_inputs()})
    return dict(zip(names, values, strict=True))


def reference(ids, cold_rows=None) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of the graph above, by NumPy."""
    hidden = sums(ids, cold_rows) @ WEIGHTS["square"]
    return hidden, hidden @ WEIGHTS["head"]


def sums(ids, cold_rows=None) -> np.ndarray:
    """Rows and positions added: (B, T, H)."""
    table = WEIGHTS["table"] if cold_rows is None else np.concatenate([WEIGHTS["table"], cold_rows])
    ids = np.array(ids)
    return table[ids] + WEIGHTS["positions"][np.arange(ids.shape[1])]


def rounding(ids, cold_rows=None, head: str = "head") -> tuple[np.ndarray, np.ndarray]:
    """How far hidden states and logits of the graph above may lie from `reference`."""
    rows, square = sums(ids, cold_rows), WEIGHTS["square"]
    turned = WEIGHTS[head] if head == "head" else WEIGHTS[head].T
    return chain_bound(rows, square), chain_bound(rows, square, turned)


def test_served_graph_computes_what_the_graph_computed(tmp_path):
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, head)")
    ids = [[0, 3, 10], [7, 7, 1]]
    found, (hidden, logits), bounds = run(served.path, ids), reference(ids), rounding(ids)
    assert_within(found["hidden_states"], hidden, bounds[0], rows=1)
    assert_within(found["logits"], logits, bounds[1], rows=2)
    assert not served.tied


def test_slots_take_their_rows_from_the_input(tmp_path):
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, head)")
    cold_rows = np.random.default_rng(1).standard_normal((3, H), np.float32)
    ids = [[K, 3, K + 2], [10, K + 1, K]]
    (hidden, logits), bounds = reference(ids, cold_rows), rounding(ids, cold_rows)
    found = run(served.path, ids, cold_rows)
    assert_within(found["hidden_states"], hidden, bounds[0], rows=1)
    assert_within(found["logits"], logits, bounds[1], rows=2)


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 9])
def test_logits_to_keep_is_transformers_slice(tmp_path, keep):
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, head)")
    ids = [[0, 3, 10], [7, 7, 1]]
    found, (hidden, _) = run(served.path, ids, keep=keep), reference(ids)
    expected = hidden[:, slice(-keep, None), :]  # as in transformers' CausalLM classes
    assert found["logits"].shape == (*expected.shape[:2], K)
    bound = rounding(ids)[0][:, slice(-keep, None)]
    assert_within(found["hidden_states"], expected, bound, rows=1)


def test_ids_are_followed_through_reshape_and_cast(tmp_path):
    body = """
        flat_ids = Reshape(input_ids, flat)
        small = Cast<to = 6>(flat_ids)
        token = Gather(table, small)
        logits = MatMul(token, head)
    """
    served = serve(tmp_path, body)
    found = run(served.path, [[2, K, 4]], np.ones((1, H), np.float32))
    expected = np.stack([WEIGHTS["table"][2], np.ones(H, np.float32), WEIGHTS["table"][4]])
    np.testing.assert_array_equal(found["hidden_states"][0], expected)


def test_pad_comparison_keeps_seeing_the_ids(tmp_path):
    body = """
        is_pad = Equal(input_ids, pad)
        other = Not(is_pad)
        count = Cast<to = 7>(other)
        token = Gather(table, input_ids)
        position = Gather(positions, count)
        hidden = Add(token, position)
        logits = MatMul(hidden, head)
    """
    served = serve(tmp_path, body)
    model = ir.load(served.path)
    equal = next(node for node in model.graph if node.op_type == "Equal")
    assert equal.inputs[0] is model.graph.inputs[0]
    found = run(served.path, [[5, K]], np.zeros((1, H), np.float32))["hidden_states"][0]
    np.testing.assert_array_equal(found[0], WEIGHTS["table"][5] + WEIGHTS["positions"][0])
    np.testing.assert_array_equal(found[1], WEIGHTS["positions"][1])


@pytest.mark.parametrize(
    "head",
    [
        "turned = Transpose(table)\n logits = MatMul(hidden, turned)",
        "same = Identity(table)\n turned = Transpose<perm = [1, 0]>(same)\n logits = MatMul(hidden, turned)",
        "logits = com.microsoft.FusedMatMul<transB = 1>(hidden, table)",
    ],
)
def test_tied_head_reads_the_embedding(tmp_path, head):
    served = serve(tmp_path, HIDDEN + head)
    model = ir.load(served.path)
    assert served.tied
    assert [node.op_type for node in model.graph].count("FusedMatMul") == 1
    assert "Transpose" not in [node.op_type for node in model.graph]
    hidden, _ = reference([[1, 2]])
    logits = run(served.path, [[1, 2]])["logits"]
    assert_within(logits, hidden @ WEIGHTS["table"].T, rounding([[1, 2]], head="table")[1], rows=2)


def test_stored_copy_of_the_embedding_is_tied_again(tmp_path):
    copy = np.ascontiguousarray(WEIGHTS["table"].T)
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, copy)", copy=copy)
    assert served.tied
    assert "copy" not in ir.load(served.path).graph.initializers


def test_head_that_differs_by_one_bit_is_not_tied(tmp_path):
    table = WEIGHTS["table"].copy()
    table[4, 4] = 0.0
    copy = np.ascontiguousarray(table.T)
    copy[4, 4] = -0.0  # equal as a number, another as bits
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, copy)", table=table, copy=copy)
    assert not served.tied


def test_what_follows_the_head_is_recorded(tmp_path):
    body = """
        product = MatMul(hidden, head)
        biased = Add(bias, product)
        small = Div(biased, thirty)
        bent = Tanh(small)
        logits = Mul(bent, thirty)
    """
    served = serve(tmp_path, HIDDEN + body)
    recorded = open_graph(served.path).get_modelmeta().custom_metadata_map[AFTER_HEAD_KEY]
    assert json.loads(recorded) == [["Add", None], ["Div", 30.0], ["Tanh", None], ["Mul", 30.0]]


def test_graph_without_a_vocab_head_gets_slots_alone(tmp_path):
    served = serve(tmp_path, HIDDEN + "last = Identity(hidden)", "float[batch, seq, 11] last", head=False)
    session = open_graph(served.path)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "position_ids", "cold_rows"]
    assert [value.name for value in session.get_outputs()] == ["last"]


REFUSED_EMBEDDINGS = {
    "x = Gather(positions, position_ids)": "found 0",
    "doubled = Add(input_ids, pad)\n x = Gather(table, doubled)": "Add",
    "token = Gather(table, input_ids)\n below = Less(input_ids, pad)\n x = Identity(token)": "Less",
    "x = Gather<axis = 1>(table, input_ids)": "Gather",
    "turned = Transpose(table)\n x = Gather(turned, input_ids)": "Gather",
}


@pytest.mark.parametrize("body", REFUSED_EMBEDDINGS)
def test_graph_whose_ids_mean_something_else_is_refused(body):
    with pytest.raises(UnsupportedModelError, match=REFUSED_EMBEDDINGS[body]):
        find_embeddings(parse(body, "float[batch, seq, 11] x").graph)


REFUSED_HEADS = {
    "logits = Softmax(hidden)": "Softmax",
    "other = Gather(table, position_ids)\n logits = Mul(hidden, other)": "Mul",
    "logits = MatMul(hidden, hidden)": "without a constant weight",
    "product = MatMul(hidden, head)\n logits = Sub(bias, product)": "Sub",
    "logits = Identity(input_ids)": "no head",
}


@pytest.mark.parametrize("body", REFUSED_HEADS)
def test_head_that_is_not_understood_is_refused_by_name(body):
    with pytest.raises(UnsupportedModelError, match=REFUSED_HEADS[body]):
        find_head(parse(HIDDEN + body).graph)


def test_flattened_head_is_refused():
    body = "lines = Reshape(hidden, flat)\n product = Gemm(lines, head)\n logits = Identity(product)"
    with pytest.raises(UnsupportedModelError, match="Gemm"):
        find_head(parse(HIDDEN + body).graph)
    with pytest.raises(UnsupportedModelError, match="batch, positions, tokens"):
        find_head(parse(HIDDEN + body, "float[lines, 11] logits").graph)


def test_table_with_other_rows_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UnsupportedModelError, match="11 rows where 12 were expected"):
        serve(tmp_path, HIDDEN + "logits = MatMul(hidden, head)", rows=12)
    assert not any((tmp_path / "out").iterdir())


def test_input_that_the_runtime_does_not_feed_is_refused(tmp_path):
    body = HIDDEN.replace("position_ids", "global_mask") + "logits = MatMul(hidden, head)"
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    model (int64[batch, seq] input_ids, int64[batch, seq] global_mask) => ({LOGITS}) {{ {body} }}"""
    tensors = [ir.tensor(array, name=name) for name, array in WEIGHTS.items() if name in body]
    ir.save(ir.from_onnx_text(text, initializers=tensors), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="input global_mask, which the runtime does not feed"):
        make_servable(tmp_path / "model.onnx", tmp_path, rows=K, has_head=True)


def test_servable_graph_is_not_made_servable_twice(tmp_path):
    served = serve(tmp_path, HIDDEN + "logits = MatMul(hidden, head)")
    (tmp_path / "twice").mkdir()
    with pytest.raises(UnsupportedModelError, match="made servable before"):
        make_servable(served.path, tmp_path / "twice", rows=K, has_head=True)


def test_constants_in_external_data_are_kept(tmp_path):
    # What torch writes for a graph over 2 GB.
    onnx = pytest.importorskip("onnx")
    body = HIDDEN.replace("MatMul(sum, square)", "MatMul(sum, constant)")
    model = parse(body + "logits = MatMul(hidden, head)")
    constant = ir.Node(
        "", "Constant", [], [ir.AttrTensor("value", ir.tensor(WEIGHTS["square"], name="constant"))]
    )
    constant.outputs[0].name = "constant"
    sums = next(node for node in model.graph if node.op_type == "MatMul")
    model.graph.insert_before(sums, constant)
    proto = ir.to_proto(model)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save_model(
        proto, path, save_as_external_data=True, location="weights", size_threshold=0, convert_attribute=True
    )
    served = make_servable(path, tmp_path / "out", rows=K, has_head=True)
    (tmp_path / "in" / "weights").unlink()
    ids = [[3, 1, 10]]
    assert_within(run(served.path, ids)["logits"], reference(ids)[1], rounding(ids)[1], rows=2)
