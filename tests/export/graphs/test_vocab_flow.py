"""What token ids may pass on their way to a table, asked of both who follow them: serving and trimming."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tests.support.exports import open_graph
from tests.support.folders import make_vocab
from tests.support.graphs import run
from trimserve_export.graphs import vocab_flow
from trimserve_export.graphs.embeddings import find_embeddings
from trimserve_export.serving.servable import make_servable
from trimserve_export.trimming.products import PRODUCTS
from trimserve_export.trimming.trim import trim_graph

pytestmark = pytest.mark.export

V, H = 11, 3
TABLE = np.random.default_rng(0).standard_normal((V, H), np.float32)
CONSTANTS = {
    "table": TABLE,
    "one": np.array([1], np.int64),
    "end": np.array([99], np.int64),
    "last": np.array([-1], np.int64),
    "twice": np.array([1, 2], np.int64),
    "wide": np.array([2, 3], np.int64),
}
WAYS = {
    "Slice(input_ids, one, end, one)": lambda ids: ids[:, 1:],
    "Transpose<perm = [1, 0]>(input_ids)": lambda ids: ids.T,
    "Tile(input_ids, twice)": lambda ids: np.tile(ids, (1, 2)),
    "Expand(input_ids, wide)": lambda ids: ids,
    "Gather<axis = 1>(input_ids, last)": lambda ids: ids[:, -1:],
    "Cast<to = 6>(input_ids)": lambda ids: ids,
    "Identity(input_ids)": lambda ids: ids,
}
IDS = np.array([[0, 3, 7], [2, 7, 1]])


def parse(way: str) -> ir.Model:
    body = f"ids = {way}\n rows = Gather(table, ids)\n x = Identity(rows)"
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    model (int64[batch, seq] input_ids) => (float[n, m, k] x) {{ {body} }}"""
    tensors = [ir.tensor(array, name=name) for name, array in CONSTANTS.items() if name in text]
    return ir.from_onnx_text(text, initializers=tensors)


@pytest.mark.parametrize("way", WAYS)
def test_served_ids_take_their_own_rows_behind_each_operator(tmp_path, way):
    (tmp_path / "out").mkdir()
    model = parse(way)
    model.graph.initializers["table"].const_value = ir.tensor(TABLE[:6], name="table")
    ir.save(model, tmp_path / "model.onnx")
    path = make_servable(tmp_path / "model.onnx", tmp_path / "out", rows=6, has_head=False).path
    feeds = {"input_ids": IDS, "cold_rows": TABLE[6:]}  # ids from 6 on are slots
    np.testing.assert_array_equal(open_graph(path).run(None, feeds)[0], TABLE[WAYS[way](IDS)])


def test_rows_that_are_the_graphs_output_come_from_slots_too(tmp_path):
    (tmp_path / "out").mkdir()
    text = """<ir_version: 8, opset_import: ["" : 18]>
    model (int64[batch, seq] input_ids) => (float[n, m, k] x) { x = Gather(table, input_ids) }"""
    ir.save(
        ir.from_onnx_text(text, initializers=[ir.tensor(TABLE[:6], name="table")]), tmp_path / "model.onnx"
    )
    path = make_servable(tmp_path / "model.onnx", tmp_path / "out", rows=6, has_head=False).path
    session = open_graph(path)
    assert [output.name for output in session.get_outputs()] == ["x"]
    found = session.run(None, {"input_ids": IDS, "cold_rows": TABLE[6:]})[0]
    np.testing.assert_array_equal(found, TABLE[IDS])


@pytest.mark.parametrize("way", WAYS)
def test_trimmed_tables_give_the_same_rows_behind_each_operator(way):
    model, vocab = parse(way), make_vocab([0, 1, 2, 3, 7], V)
    trim_graph(model, vocab, has_head=False)
    found = run(model, {"input_ids": vocab.to_compact(IDS)})[0]
    np.testing.assert_array_equal(found, TABLE[WAYS[way](IDS)])


def test_ids_that_become_floats_are_no_ids_any_more():
    with pytest.raises(Exception, match="Cast"):
        find_embeddings(parse("Cast<to = 1>(input_ids)").graph)


def test_serving_passes_no_operator_that_trimming_does_not():
    assert vocab_flow.REPEATED <= vocab_flow.UNARY | vocab_flow.POINTWISE | vocab_flow.SCALED
    assert set(PRODUCTS) == vocab_flow.PRODUCTS
