"""Graphs that look token ids up in several tables (per-layer embeddings): each is cut, and fed cold rows."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir

import trimserve
from tests.support import graphs
from tests.support.exports import open_graph, read_float32
from tests.support.folders import make_vocab
from tests.support.generators import FullSampler, open_generator
from tests.support.graph_folders import TEXTS, accept_files, save_graph, shift_rows, vocab_of
from tests.support.graphs import CONTRIB, EMBEDDINGS, HEADS, GraphText
from tests.support.rounding import assert_within
from trimserve.decoding.sampling import SamplingParams
from trimserve.errors import UnsupportedModelError
from trimserve.files.tensors import read_header
from trimserve.folder.names import COLD_NAME
from trimserve.model.resolve import resolve_model
from trimserve_export import export
from trimserve_export.from_graph.trimmed import serve_full, trim_to_folder
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.verify import verify

pytestmark = pytest.mark.export

V, H, WIDTH, SHORTER = 37, 16, 6, 30
KEPT = (0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36)
VOCAB = make_vocab(KEPT, V)
IDS = np.array([[0, 3, 5, 36, 34, 3, 20, 19, 1]])


def second(s: GraphText) -> None:
    s.add("layered = Gather(large, input_ids)", large=s.floats(V, WIDTH))


def second_by_column(s: GraphText) -> None:
    s.add("turned = Transpose<perm = [1, 0]>(large)", large=s.floats(WIDTH, V))
    s.add("layered = Gather(turned, input_ids)")


def second_int8(s: GraphText) -> None:
    s.add("bytes = Gather(large, input_ids)", large=s.bytes(V, WIDTH))
    s.add("layered = DequantizeLinear(bytes, step, mid)", step=np.float32(0.5), mid=np.uint8(99))


def second_blocks(s: GraphText) -> None:
    """Blocks of 16 numbers, of which the graph goes on with the first."""
    s.add("", large=s.bytes(V, 16), large_scales=s.scales(V, 1), large_zeros=s.bytes(V, 1))
    attributes = "gather_axis = 0, quantize_axis = 1, bits = 8, block_size = 16"
    operands = "large, input_ids, large_scales, large_zeros"
    s.add(f"whole = {CONTRIB}.GatherBlockQuantized<{attributes}>({operands})")
    s.add("layered = Slice(whole, start, stop, last)")
    s.add("", start=np.array([0]), stop=np.array([WIDTH]), last=np.array([-1]))


def _guard(s: GraphText, other: str) -> None:
    s.add("above = GreaterOrEqual(input_ids, lowest)\nbelow = Less(input_ids, end)")
    s.add(f"inside = And(above, below)\nsafe = Where(inside, input_ids, {other})")
    s.add("", lowest=np.array(0), end=np.array(SHORTER))


def guarded(s: GraphText) -> None:
    """Gemma 3n's second table has no rows for the last ids; here they read that of another id."""
    _guard(s, "seven")
    s.add("layered = Gather(large, safe)", large=s.floats(SHORTER, WIDTH), seven=np.array(7))


def guarded_by_expand(s: GraphText) -> None:
    s.add("shape = Shape(input_ids)\nfilled = Expand(seven, shape)", seven=np.array(7))
    _guard(s, "filled")
    s.add("layered = Gather(large, safe)", large=s.floats(SHORTER, WIDTH))


def guarded_by_zeros(s: GraphText) -> None:
    s.add("shape = Shape(input_ids)\nfilled = ConstantOfShape<value = int64[1] {0}>(shape)")
    _guard(s, "filled")
    s.add("layered = Gather(large, safe)", large=s.floats(V, WIDTH))


def guarded_int8(s: GraphText) -> None:
    _guard(s, "seven")
    s.add("bytes = Gather(large, safe)", large=s.bytes(SHORTER, WIDTH), seven=np.array(7))
    s.add("layered = DequantizeLinear(bytes, step, mid)", step=np.float32(0.5), mid=np.uint8(99))


SECOND = {
    made.__name__: made
    for made in (
        second,
        second_by_column,
        second_int8,
        second_blocks,
        guarded,
        guarded_by_expand,
        guarded_by_zeros,
        guarded_int8,
    )
}


def several(kind: str, embedding: str = "plain", head: str = "matmul") -> GraphText:
    made = GraphText()
    SECOND[kind](made)  # the first in the graph, and not the embedding
    EMBEDDINGS[embedding](made)
    made.add("up = MatMul(layered, widen)\nhidden = Add(rows, up)", widen=made.floats(WIDTH, H))
    HEADS[head](made)
    made.add("logits = Identity(product)")
    return made


def tied(kind: str) -> GraphText:
    made = several(kind)
    made.lines[-2:] = [
        "across = Transpose(table)\nproduct = MatMul(hidden, across)",
        "logits = Identity(product)",
    ]
    return made


def save(made: GraphText, folder):
    folder.mkdir()
    ir.save(made.model(), folder / "model.onnx", external_data="weights.data", size_threshold_bytes=64)
    (folder / "config.json").write_text(json.dumps({"vocab_size": V}))
    return resolve_model(folder)


def trimmed_beside_full(made: GraphText, root):
    """Export, feed kept and cold ids, compare with the graph as it was; returns the cold rows."""
    source = save(made, root / "model")
    (root / "trimmed").mkdir()
    trim_to_folder(source, VOCAB, root / "trimmed", task="fill-mask")
    cold = read_float32(root / "trimmed" / COLD_NAME)
    slotted = VOCAB.with_slots(IDS)
    places = np.searchsorted(VOCAB.cold_ids, slotted.cold_ids)
    session = open_graph(root / "trimmed" / "model.onnx")
    names = [value.name for value in session.get_inputs() if value.name.startswith("cold_rows")]
    assert names == ["cold_rows", "cold_rows.1"]
    feeds = {name: cold[name.replace("cold_rows", "embedding")][places] for name in names}
    feeds |= {"input_ids": slotted.ids, "logits_to_keep": np.array(0)}
    (found,) = session.run(["logits"], feeds)
    (full,) = graphs.run(root / "model" / "model.onnx", {"input_ids": IDS})
    np.testing.assert_array_equal(found, full[..., KEPT])
    return cold


@pytest.mark.parametrize("kind", SECOND)
def test_every_table_has_cold_slots(tmp_path, kind):
    trimmed_beside_full(several(kind), tmp_path)


@pytest.mark.parametrize("embedding", ["transposed", "blocks_uint4", "dequantized_after"])
def test_beside_any_embedding(tmp_path, embedding):
    trimmed_beside_full(several("second", embedding, "nbits_4"), tmp_path)


@pytest.mark.parametrize("kind", ["second", "guarded"])
def test_the_heads_table_is_the_embedding(tmp_path, kind):
    cold = trimmed_beside_full(tied(kind), tmp_path)
    assert {name: rows.shape[1] for name, rows in cold.items()} == {"embedding": H, "embedding.1": WIDTH}


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("kind", SECOND)
def test_drop_in(tmp_path, kind, cold):
    source = save(several(kind), tmp_path / "model")
    (tmp_path / "out").mkdir()
    trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask", layout="graph", cold=cold)
    ids = IDS if cold else np.array([KEPT])
    (full,) = graphs.run(tmp_path / "model" / "model.onnx", {"input_ids": ids})
    (found,) = graphs.run(tmp_path / "out" / "model.onnx", {"input_ids": ids})
    np.testing.assert_array_equal(found[..., KEPT], full[..., KEPT])
    assert np.isneginf(found[..., VOCAB.cold_ids]).all()


@pytest.mark.parametrize("kind", SECOND)
def test_compact_ids_alone(tmp_path, kind):
    source = save(several(kind), tmp_path / "model")
    (tmp_path / "out").mkdir()
    made = trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask", layout="tokenizer", cold=False)
    (full,) = graphs.run(tmp_path / "model" / "model.onnx", {"input_ids": np.array([KEPT])})
    (found,) = graphs.run(tmp_path / "out" / "model.onnx", {"input_ids": np.arange(len(KEPT))[None]})
    np.testing.assert_array_equal(found, full[..., KEPT])
    if "guarded" in kind and kind != "guarded_by_zeros":
        cut = next(cut for cut in made.cut if cut.name == "large")
        assert (cut.rows_before, cut.rows_after) == (SHORTER, sum(id_ < SHORTER for id_ in KEPT))


def test_another_type_of_rows_is_refused(tmp_path):
    made = several("second")
    made.lines[0] = "half = Gather(large, input_ids)\nlayered = Cast<to = 1>(half)"
    made.add("", large=made.floats(V, WIDTH, dtype=np.float16))
    source = save(made, tmp_path / "model")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"one type in all tables.*--layout tokenizer"):
        trim_to_folder(source, VOCAB, tmp_path / "out", task="fill-mask")


def save_with_second_table(root):
    """A decoder with a second table, narrower than the embedding and without rows for the last ids."""
    source = save_graph(root, "llama", "fp32", tokenizer="byte_level_bpe", seed=1, hidden_size=64)
    path = source.graph
    assert path is not None
    model = ir.load(path)
    rows = source.vocab_size - 9
    random = np.random.default_rng(0)
    writer = NodeWriter(model.graph, "layers")
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    embedding = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[1] is ids)
    inside = writer.op("Less", [ids, writer.constant(rows)])
    safe = writer.op("Where", [inside, ids, writer.constant(0)])
    table = writer.array("per_layer", random.standard_normal((rows, 24)).astype(np.float32))
    wide = writer.array("widen", random.standard_normal((24, 64)).astype(np.float32))
    added = writer.op("MatMul", [writer.op("Gather", [table, safe], axis=0), wide])
    uses = tuple(embedding.outputs[0].uses())
    total = writer.op("Add", [embedding.outputs[0], added])
    for node, index in uses:
        node.replace_input_with(index, total)
    writer.insert_after(embedding)
    beside = path.with_name("edited.onnx")
    ir.save(model, beside)
    beside.rename(path)
    return resolve_model(root / "onnx")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    source = save_with_second_table(root)
    export(source, vocab_of(source), root / "trimmed")
    return source, root / "trimmed"


def test_exact_mode_gives_the_untrimmed_graphs_tokens(decoder, tmp_path):
    source, folder = decoder
    full = FullSampler(serve_full(source, tmp_path, task="text-generation-with-past"), source.vocab_size)
    generator = open_generator(folder)
    cold = 0
    for seed, text in enumerate(TEXTS):
        (ids,) = generator.codec.encode([text])
        for options in ({}, {"temperature": 1.0}):
            (result,) = generator.generate(text, max_new_tokens=30, seed=seed, **options)
            params = SamplingParams(seed=seed, **options)
            assert list(result.ids) == full.run(ids, params, 30, generator.stop_ids)
            cold += int((~generator.folder.vocab.is_kept(np.array(result.ids))).sum())
    assert cold > 0, "no cold token was produced: this test would not see a broken check"


def test_batches_beams_and_scores(decoder, tmp_path):
    source, folder = decoder
    full = FullSampler(serve_full(source, tmp_path, task="text-generation-with-past"), source.vocab_size)
    generator = open_generator(folder)
    texts = TEXTS[:3]
    alone = [generator.generate(text, max_new_tokens=8)[0].ids for text in texts]
    assert [result.ids for result in generator.generate(texts, max_new_tokens=8)] == alone
    (score,) = generator.score([TEXTS[2]])
    logits = full.logits(generator.codec.encode([TEXTS[2]])[0]).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = logits[np.arange(len(score.ids) - 1), score.ids[1:]]
    # A log-probability is a logit less a mean of logits of a kind: both may be off.
    assert_within(score.log_probs, expected, 2 * full.rounding(score.ids), rows=0)


def test_a_folder_without_cold_rows(decoder, tmp_path):
    source, _ = decoder
    export(source, vocab_of(source), tmp_path / "trimmed", cold=False)
    generator = trimserve.load(tmp_path / "trimmed")
    assert generator.generate("the cat sat", max_new_tokens=5, mode="compact")[0].ids


@pytest.mark.parametrize("table", ["embedding", "embedding.1"])
def test_verify_finds_shifted_cold_rows(decoder, tmp_path, table):
    _, made = decoder
    folder = tmp_path / "trimmed"
    shutil.copytree(made, folder)
    result = verify(folder, texts=TEXTS[:2], store=False)
    assert result.ok, result.to_dict()
    spec = read_header(folder / COLD_NAME)[0][table]
    shift_rows(folder / COLD_NAME, spec.offset, spec.nbytes // spec.shape[0], spec.shape[0])
    accept_files(folder)
    assert set(verify(folder, texts=TEXTS[:2]).failed) >= {"kept-rows", "cold-slots"}
