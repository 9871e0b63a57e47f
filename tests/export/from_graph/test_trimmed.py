"""From ONNX graphs to servable folders: cold slots and cold rows of every layout, against the full graph."""

import functools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import graphs
from tests.support.exports import open_graph, read_float32
from tests.support.folders import make_vocab
from tests.support.graphs import EMBEDDINGS, HEADS, GraphText, middle, nbits, save, sketch, sketch_tied
from tests.support.rounding import assert_within, gamma, product_bound
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.files.quantized import BlockScheme, Quantization, block_specs, dequantize
from trimserve.files.tensors import map_tensor
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_NAME, COLD_WEIGHTS_NAME
from trimserve.model.resolve import resolve_model
from trimserve.runtime.after_head import AFTER_HEAD_KEY, apply_after_head
from trimserve_export.cold_head import graph as cold_graph
from trimserve_export.from_graph import cold_head as graph_head
from trimserve_export.from_graph.trimmed import serve_full, trim_to_folder, write_generation_config
from trimserve_export.trimming.facts import infer_task

pytestmark = pytest.mark.export
V = 37
KEPT = (0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36)
VOCAB = make_vocab(KEPT, V)
IDS = np.array([[0, 3, 5, 36, 34, 3, 20, 19, 1]])


def run(path: Path, ids: np.ndarray, cold_rows: np.ndarray) -> dict[str, np.ndarray]:
    session = open_graph(path)
    feeds = {"input_ids": ids, "cold_rows": cold_rows, "logits_to_keep": np.array(0)}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_serves(made: GraphText, root: Path, task: str = "fill-mask") -> dict[str, np.ndarray]:
    """Export a graph, feed kept and cold ids, compare with the full graph; returns the cold rows."""
    source = resolve_model(save(made, root / "model"))
    for name in ("trimmed", "full"):
        (root / name).mkdir()
    trim_to_folder(source, VOCAB, root / "trimmed", task=task)
    full = run(serve_full(source, root / "full", task=task), IDS, np.zeros((1, made.H), np.float32))
    cold = read_float32(root / "trimmed" / COLD_NAME)
    slotted = VOCAB.with_slots(IDS)
    rows = cold["embedding"][np.searchsorted(VOCAB.cold_ids, slotted.cold_ids)]
    found = run(root / "trimmed" / "model.onnx", slotted.ids, rows)
    np.testing.assert_array_equal(found["hidden_states"], full["hidden_states"])
    np.testing.assert_array_equal(found["logits"], full["logits"][..., KEPT])
    return cold


BLOCKED = ["blocks_int4", "blocks_uint4", "blocks_uint8", "blocks_reshaped"]
SERVED = ["plain", "transposed", "second_axis", "layer_norm", "dequantized_after", "dequantized_before"]


@pytest.mark.parametrize("embedding", [*SERVED, *BLOCKED])
@pytest.mark.parametrize("head", ["matmul", "nbits_4"])
def test_cold_rows_are_what_the_graph_reads(tmp_path, embedding, head):
    assert_serves(sketch(embedding, head), tmp_path)


@pytest.mark.parametrize("kind", ["tied", "tied_fused", "tied_transposed"])
def test_tied_rows_are_stored_once(tmp_path, kind):
    assert set(assert_serves(sketch_tied(kind), tmp_path)) == {"embedding"}


def test_tied_blocks(tmp_path):
    assert_serves(sketch_tied("tied_blocks"), tmp_path)


def test_cold_head_and_bias_rows(tmp_path):
    made = sketch("plain", "matmul", "biased")
    cold = assert_serves(made, tmp_path)
    head, bias = made.tensors["head"].numpy(), made.tensors["bias"].numpy()
    np.testing.assert_array_equal(cold["head"], head.T[VOCAB.cold_ids])
    np.testing.assert_array_equal(cold["head_bias"], bias.reshape(-1)[VOCAB.cold_ids])


BLOCKS = ("nbits_4", "nbits_4_flat", "nbits_8", "nbits_8_symmetric")
# Their sums are of integers, so no order of adding them changes a bit.
INTEGERS = (
    *("integer", "integer_by_token", "integer_fused", "integer_fused_scalar", "integer_to_float"),
    *("static_integer", "static_to_float"),
)
BY_GRAPH = (
    *("nbits_2", "nbits_4_float_zeros", "nbits_4_bias", "nbits_4_g_idx", "bnb4", "gemm", "gemm_by_column"),
    *("qdq_int4", "qdq_uint4", "qdq_by_token", "qdq_one_scale", *INTEGERS),
)


@pytest.mark.parametrize(
    ("head", "real"),
    [
        *((head, False) for head in (*BLOCKS, "matmul", "fused", *BY_GRAPH)),
        *((head, True) for head in INTEGERS),
    ],
)
def test_cold_head_gives_the_full_graphs_logits(tmp_path, monkeypatch, head, real):
    monkeypatch.setattr(graph_head, "_TILE_ROWS", 11)
    monkeypatch.setattr(cold_graph, "_BLOCK_TILE_ROWS", 16)
    made = GraphText(H=48, real=real)
    EMBEDDINGS["blocks_int4"](made)
    middle(made)
    {**HEADS, "nbits_8_symmetric": partial(nbits, bits=8)}[head](made)
    made.add("logits = Identity(product)")
    source = resolve_model(save(made, tmp_path / "model"))
    for name in ("trimmed", "full"):
        (tmp_path / name).mkdir()
    result = trim_to_folder(source, VOCAB, tmp_path / "trimmed", task="text-generation-with-past")
    # As the runtime opens it: ONNX Runtime makes MatMulNBits of some layouts, which rounds activations.
    (expected,) = open_graph(tmp_path / "model" / "model.onnx").run(["logits"], {"input_ids": IDS})
    full = run(serve_full(source, tmp_path / "full", task="fill-mask"), IDS, np.zeros((1, 48), np.float32))
    np.testing.assert_array_equal(full["logits"], expected)
    hidden = full["hidden_states"][0]
    (cold,) = open_graph(tmp_path / "trimmed" / "cold_head.onnx").run(["logits"], {"hidden_states": hidden})
    rounded = head.startswith("qdq")
    # Of those ONNX Runtime makes MatMulNBits, whose kernel adds the last few columns in another order.
    bound = 2 * gamma(48 + 8) * Sums.of(tmp_path / "trimmed", hidden, rounded=True).sizes if rounded else 0
    assert_within(cold.T, expected[0][:, VOCAB.cold_ids], bound, rows=1)
    largest = open_graph(tmp_path / "trimmed" / "cold_max.onnx").run(None, {"hidden_states": hidden})
    np.testing.assert_array_equal(largest[0].max(axis=0), cold.max(axis=0))
    best = largest[1][largest[0].argmax(axis=0), np.arange(hidden.shape[0])]
    np.testing.assert_array_equal(best, cold.argmax(axis=0))
    if head in BLOCKS:
        scheme = Quantization.from_dict(result.quantization).rows
        assert scheme is not None
        rows = stored_head(tmp_path / "trimmed" / COLD_BLOCKS_NAME, len(VOCAB.cold_ids), 48, scheme)
        np.testing.assert_array_equal(hidden @ rows.T, cold.T)
    if head in BY_GRAPH and (head not in INTEGERS or integer_products_are_exact()):
        sums = Sums.of(tmp_path / "trimmed", hidden, rounded=rounded)
        assert_rows_give(sums, cold.T, roundings=8 if head in INTEGERS else 48 + 8)


@functools.cache
def integer_products_are_exact():
    """Whether ONNX Runtime adds products of uint8 and int8 exactly: without VNNI a pair is cut to 16 bits."""
    made = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        "g (uint8[1, 64] a, int8[64, 32] b) => (int32[1, 32] y) { y = MatMulInteger(a, b) }"
    )
    session = onnxruntime.InferenceSession(made.SerializeToString())
    largest = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 32), 127, np.int8)}
    return bool((session.run(None, largest)[0] == 64 * 255 * 127).all())


@pytest.mark.parametrize("own_scale", [False, True])
def test_tied_integers_are_multiplied_as_the_graph_does(tmp_path, own_scale):
    """As floats if the lookup scales by the same number; else ONNX Runtime rounds the hidden states, too."""
    made = sketch_tied("tied_int8", H=48)
    if own_scale:
        made.lines[-3] = made.lines[-3].replace("scale", "own")
        made.add("", own=np.float32(0.125))
    assert ("own" in " ".join(made.lines)) == own_scale
    source = resolve_model(save(made, tmp_path / "model"))
    (tmp_path / "trimmed").mkdir()
    trim_to_folder(source, VOCAB, tmp_path / "trimmed", task="text-generation-with-past")
    assert (tmp_path / "trimmed" / COLD_WEIGHTS_NAME).exists() == own_scale
    graph = tmp_path / "trimmed" / "cold_head.onnx"
    (expected,) = open_graph(tmp_path / "model" / "model.onnx").run(["logits"], {"input_ids": IDS})
    slotted = VOCAB.with_slots(IDS)
    rows = read_float32(tmp_path / "trimmed" / COLD_NAME)["embedding"]
    rows = rows[np.searchsorted(VOCAB.cold_ids, slotted.cold_ids)]
    found = run(tmp_path / "trimmed" / "model.onnx", slotted.ids, rows)
    hidden = found["hidden_states"][0]
    # Of its own scale ONNX Runtime makes a kernel that adds the last, incomplete tile in another order.
    table = (made.tensors["table"].numpy().astype(np.float32) - 120) / 4  # the larger one of two scales
    bound = product_bound(hidden, table.T, after=8) if own_scale else np.zeros((1, V))
    assert_within(found["logits"][0], expected[0][:, KEPT], bound[:, KEPT], rows=1)
    (cold,) = open_graph(graph).run(["logits"], {"hidden_states": hidden})
    assert_within(cold.T, expected[0][:, VOCAB.cold_ids], bound[:, VOCAB.cold_ids], rows=1)


@dataclass(frozen=True)
class Sums:
    """The products of a folder's cold head as exact sums of hidden states times the stored rows."""

    products: np.ndarray
    sizes: np.ndarray  # sum |a||b|, the bias being one of them
    rounded: np.ndarray  # what 8-bit activations may add
    bias: np.ndarray
    after_head: list

    @staticmethod
    def of(folder: Path, hidden: np.ndarray, *, rounded: bool) -> "Sums":
        stored = read_float32(folder / COLD_NAME)
        rows = stored["head"].astype(np.float64)
        bias = stored.get("head_bias", np.zeros(len(rows), np.float32))
        hidden = hidden.astype(np.float64)
        if hidden.shape[1] > 48:  # integers, scale and zero point
            hidden = (hidden[:, :48] - hidden[:, 49:]) * hidden[:, 48:49]
        # Half a step of 8 bits: the largest number of a block is 127 steps.
        step = np.abs(hidden).max(axis=1, keepdims=True) / 254 * rounded
        lost = step * np.abs(rows).sum(axis=1)
        after_head = json.loads(ir.load(folder / "model.onnx").metadata_props[AFTER_HEAD_KEY])
        sizes = np.abs(hidden) @ np.abs(rows).T + lost + np.abs(bias)
        return Sums(hidden @ rows.T, sizes, lost, bias, after_head)


def assert_rows_give(sums: Sums, logits: np.ndarray, *, roundings: int) -> None:
    """The rows that slots are multiplied with: what the head's integers stand for.

    What follows the product never falls where the product rises: so its ends are the ends of the logits.
    """
    off = gamma(roundings) * sums.sizes + sums.rounded
    low, high = (apply_after_head(sums.products + side * off, sums.bias, sums.after_head) for side in (-1, 1))
    least = gamma(8) * (np.abs(low) + np.abs(sums.bias))
    assert_within(logits, (low + high) / 2, (high - low) / 2 + least, rows=1)


def stored_head(path: Path, count: int, width: int, scheme: BlockScheme) -> np.ndarray:
    """The rows that a file of blocks stands for."""
    specs = block_specs(path, count, width, scheme, "F32")
    zeros = None if specs.zero_points is None else map_tensor(specs.zero_points)
    return dequantize(map_tensor(specs.integers), map_tensor(specs.scales), width, scheme, zeros)


@pytest.mark.parametrize(("embedding", "head"), [("scaled_rows", "matmul")])
def test_refusal_names_the_layouts_that_are_left(tmp_path, embedding, head):
    source = resolve_model(save(sketch(embedding, head), tmp_path / "model"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match="--layout graph or --layout tokenizer"):
        trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask")
    trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask", layout="tokenizer")


def test_old_operators_are_refused(tmp_path):
    folder = save(sketch("plain", "matmul"), tmp_path / "model")
    model = ir.load(folder / "model.onnx")
    model.graph.opset_imports[""] = 11
    ir.save(model, folder / "model.onnx")
    (tmp_path / "out").mkdir()
    for layout in ("runtime", "graph"):
        with pytest.raises(UnsupportedModelError, match="opset 11"):
            trim_to_folder(
                resolve_model(folder), VOCAB, tmp_path / "out", task="fill-mask", layout=layout, cold=False
            )


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_cold_logits_of_any_sizes(data, tmp_path_factory):
    """Cold rows, served graph and cold head together are the full graph, whatever its sizes and layout."""
    block = data.draw(st.sampled_from([16, 32]))
    V = data.draw(st.integers(9, 70))
    sizes = {
        "V": V,
        "H": block * data.draw(st.integers(1, 3)),
        "block": block,
        "seed": data.draw(st.integers(0, 9)),
    }
    after = data.draw(st.sampled_from(["bare", "capped"]))
    exact = [head for head in (*BLOCKS, *BY_GRAPH) if not head.startswith("qdq") and head in HEADS]
    made = sketch(data.draw(st.sampled_from(SERVED)), data.draw(st.sampled_from(exact)), after, **sizes)
    kept = sorted(data.draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=V - 1)))
    root = tmp_path_factory.mktemp("sizes")
    source, vocab = resolve_model(save(made, root / "model")), make_vocab(kept, V)
    (root / "trimmed").mkdir()
    trim_to_folder(source, vocab, root / "trimmed", task="text-generation-with-past")
    ids = np.random.default_rng(1).integers(0, V, (1, 5))
    (full,) = open_graph(root / "model" / "model.onnx").run(["logits"], {"input_ids": ids})
    slotted = vocab.with_slots(ids)
    places = np.searchsorted(vocab.cold_ids, slotted.cold_ids)
    rows = read_float32(root / "trimmed" / COLD_NAME)["embedding"][places]
    rows = rows if len(rows) else np.zeros((1, made.H), np.float32)
    found = run(root / "trimmed" / "model.onnx", slotted.ids, rows)
    hidden = {"hidden_states": found["hidden_states"][0]}
    (cold,) = open_graph(root / "trimmed" / "cold_head.onnx").run(["logits"], hidden)
    np.testing.assert_array_equal(found["logits"], full[..., kept])
    np.testing.assert_array_equal(cold.T, full[0][:, vocab.cold_ids])


def test_weights_are_hashed_by_name(tmp_path):
    source = resolve_model(save(sketch("plain", "matmul"), tmp_path / "model"))
    (tmp_path / "out").mkdir()
    made = trim_to_folder(source, VOCAB, tmp_path / "out", task="auto")
    assert set(made.weights) == {"model.onnx", "weights.data"}
    assert {(cut.name, cut.axis, cut.rows_after) for cut in made.cut} == {("table", 0, 11), ("head", 1, 11)}
    assert made.bytes_before == 4 * (2 * V * 16 + 16 * 16)
    assert made.dtype == "fp32"


def test_task_by_outputs():
    def graph(outputs: str) -> ir.Graph:
        made = GraphText()
        made.add(f"{outputs.split()[-1]} = Identity(x)")
        return made.model(outputs, "int64[b, s] input_ids, float[b, s, n] x").graph

    assert infer_task(graph("float[b, s, 8] last_hidden_state"), V) == "feature-extraction"
    assert infer_task(graph("float[b, 8] logits"), V) == "text-classification"
    assert infer_task(graph("float[b, s, 8] logits"), V) == "token-classification"
    assert infer_task(graph("float[b, s, 37] logits"), V) == "fill-mask"
    decoder = graph("float[b, s, 37] logits")
    decoder.inputs[1].name = "past_key_values.0.key"
    assert infer_task(decoder, V) == "text-generation-with-past"
    with pytest.raises(UnsupportedModelError, match="outputs scores: expected logits"):
        infer_task(graph("float[b, s, 8] scores"), V)


def test_graphs_are_found(tmp_path):
    made = sketch("plain", "matmul")
    assert resolve_model(save(made, tmp_path / "a")).graph == tmp_path / "a" / "model.onnx"
    root = tmp_path / "b"
    save(made, root, "onnx/model.onnx")
    save(made, root, "onnx/model_q4.onnx")
    (root / "tokenizer.json").write_text("{}")
    assert resolve_model(root).graph == root / "onnx" / "model.onnx"
    named = resolve_model(root / "onnx" / "model_q4.onnx")
    assert (named.path, named.graph) == (root, root / "onnx" / "model_q4.onnx")
    assert [path.name for path in named.weight_files] == ["model_q4.onnx"]
    genai = save(made, tmp_path / "c", "decoder.onnx")
    (genai / "other.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"several graphs \(decoder\.onnx, other\.onnx\)"):
        _ = resolve_model(genai).graph
    (genai / "config.json").unlink()
    section = {"vocab_size": V, "eos_token_id": [1, 2], "decoder": {"filename": "decoder.onnx"}}
    (genai / "genai_config.json").write_text(json.dumps({"model": section}))
    found = resolve_model(genai)
    assert (found.graph, found.vocab_size) == (genai / "decoder.onnx", V)
    write_generation_config(found, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert resolve_model(tmp_path).graph is None


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("head", ["matmul", "gemm", "nbits_2", "qdq_int4", "integer_by_token", "bnb4"])
@pytest.mark.parametrize("embedding", ["plain", "dequantized_after", "blocks_reshaped"])
def test_drop_in_of_any_head(tmp_path, embedding, head, cold):
    made = sketch(embedding, head)
    source = resolve_model(save(made, tmp_path / "model"))
    (tmp_path / "out").mkdir()
    trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask", layout="graph", cold=cold)
    ids = IDS if cold else np.array([KEPT])
    (full,) = graphs.run(tmp_path / "model" / "model.onnx", {"input_ids": ids})
    (found,) = graphs.run(tmp_path / "out" / "model.onnx", {"input_ids": ids})
    np.testing.assert_array_equal(found[..., KEPT], full[..., KEPT])
    assert np.isneginf(found[..., VOCAB.cold_ids]).all()


def test_graph_for_a_cut_tokenizer(tmp_path):
    source = resolve_model(save(sketch("blocks_uint4", "qdq_int4"), tmp_path / "model"))
    (tmp_path / "out").mkdir()
    trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask", layout="tokenizer", cold=False)
    (full,) = graphs.run(tmp_path / "model" / "model.onnx", {"input_ids": np.array([KEPT])})
    compact = np.arange(len(KEPT))[None]
    (found,) = graphs.run(tmp_path / "out" / "model.onnx", {"input_ids": compact})
    np.testing.assert_array_equal(found, full[..., KEPT])
