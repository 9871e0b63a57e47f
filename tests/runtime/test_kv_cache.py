"""KV caches against a run over all tokens at once: growing ones, and buffers that past and present share."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
from safetensors.numpy import save

from tests.support.folders import make_folder, make_vocab
from tests.support.rounding import assert_within, gamma
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.loop import GenerationLoop
from trimserve.decoding.request import Request
from trimserve.decoding.sampling import SamplingParams, choose
from trimserve.runtime import kv_cache as kv
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.session import open_session
from trimserve_export.serving.servable import make_servable

pytestmark = pytest.mark.export

V, H, HEAD = 37, 32, 16
KEPT = [0, 3, 4, 9, 12, 17, 20, 25, 30, 33, 36]
GROUP_QUERY_ATTENTION = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
gqa (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
     float[batch, 1, past, 16] "past_key_values.0.key", float[batch, 1, past, 16] "past_key_values.0.value")
 => (float[batch, sequence, ROWS] logits,
     float[batch, 1, total, 16] "present.0.key", float[batch, 1, total, 16] "present.0.value")
{
  x = Gather (table, input_ids)
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  axis = Constant <value_ints = [1]> ()
  one = Constant <value_int = 1> ()
  counted = ReduceSum <keepdims = 0> (attention_mask, axis)
  last = Sub (counted, one)
  seqlens = Cast <to = 6> (last)
  shape = Shape (attention_mask)
  length = Gather (shape, one)
  total_length = Cast <to = 6> (length)
  attended, "present.0.key", "present.0.value" = com.microsoft.GroupQueryAttention
      <num_heads = 2, kv_num_heads = 1, do_rotary = 1>
      (q, k, v, "past_key_values.0.key", "past_key_values.0.value", seqlens, total_length, cos, sin)
  projected = MatMul (attended, wo)
  hidden = Add (x, projected)
  columns = Transpose <perm = [1, 0]> (table)
  logits = MatMul (hidden, columns)
}
"""


def weights():
    rng = np.random.default_rng(3)
    angles = np.arange(64)[:, None] / 10.0 ** (np.arange(HEAD // 2) / 4)[None]
    made = {"table": rng.standard_normal((V, H)), "cos": np.cos(angles), "sin": np.sin(angles)}
    shapes = {"wq": (H, 2 * HEAD), "wk": (H, HEAD), "wv": (H, HEAD), "wo": (2 * HEAD, H)}
    made |= {name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: array.astype(np.float32) for name, array in made.items()}


def save_graph(folder, rows, changed=None):
    """A servable GQA decoder with the given embedding rows; the numbers of its weights `changed` a little."""
    model = ir.from_onnx_text(GROUP_QUERY_ATTENTION.replace("ROWS", str(len(rows))))
    for name, array in (weights() | {"table": weights()["table"][rows]}).items():
        array = array if changed is None else changed(array)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
    (folder / "source").mkdir(parents=True)
    ir.save(model, folder / "source" / "model.onnx")
    return make_servable(folder / "source" / "model.onnx", folder, rows=len(rows), has_head=True).path


@pytest.fixture(scope="module")
def full_graph(tmp_path_factory):
    return save_graph(tmp_path_factory.mktemp("full"), list(range(V)))


@pytest.fixture(scope="module")
def rounding(full_graph, tmp_path_factory):
    """How far another kernel's logits may lie from the graph's.

    As `tests.support.rounding.model_bound` has it: weights change by gamma_n with random signs, n being the
    longest sum, of two heads' values.
    """
    ids, signs = np.random.default_rng(1).integers(0, V, 20).tolist(), np.random.default_rng(2)

    def changed(array):
        return (array * (1 + gamma(2 * HEAD) * signs.choice([-1, 1], array.shape))).astype(np.float32)

    def logits(graph):
        decoder = Decoder(open_session(graph))
        return feed(decoder, decoder.empty_cache(1), ids)

    others = [save_graph(tmp_path_factory.mktemp("changed"), list(range(V)), changed) for _ in range(4)]
    return 4 * max(np.abs(logits(other) - logits(full_graph)).max() for other in others)


def feed(decoder, cache, ids):
    return decoder.step(cache, np.array([ids], np.int64), decoder.no_rows, keep=0).logits[0]


def test_the_graph_asks_for_shared_buffers(full_graph):
    decoder = Decoder(open_session(full_graph))
    assert isinstance(decoder.empty_cache(1), kv.SharedCache)
    assert not decoder.takes_batches


@pytest.mark.parametrize("shared", [True, False])
def test_steps_and_cuts_give_what_one_run_over_all_tokens_gives(full_graph, rounding, monkeypatch, shared):
    monkeypatch.setattr(kv, "_FIRST_CAPACITY", 4)  # the buffers have to grow, twice
    decoder = Decoder(open_session(full_graph))
    cache = decoder.empty_cache(1) if shared else kv.GrowingCache(decoder._layout, 1)
    rng = np.random.default_rng(0)
    fed: list[int] = []
    for count, drop in ((3, 0), (1, 1), (1, 0), (4, 2), (1, 1), (5, 0), (1, 0), (3, 3), (1, 0)):
        new = rng.integers(0, V, count).tolist()
        found = feed(decoder, cache, new)
        whole = feed(decoder, decoder.empty_cache(1), fed + new)
        # One position at a time takes another kernel than many. A wrong position or a lost token changes
        # logits by whole numbers here.
        assert rounding < 0.01
        assert_within(found, whole[len(fed) :], rounding, rows=-1)
        fed = (fed + new)[: len(fed) + count - drop]
        cache.cut(np.array([drop]))
        assert cache.lengths.tolist() == [len(fed)]


def test_beams_share_buffers(full_graph, rounding, monkeypatch):
    """Sequences of one length that are chosen anew at every step, each against a cache of its own."""
    monkeypatch.setattr(kv, "_FIRST_CAPACITY", 4)  # the buffers have to grow
    decoder, rng = Decoder(open_session(full_graph)), np.random.default_rng(3)
    cache = decoder.empty_cache(1)
    fed = [rng.integers(0, V, 3).tolist()]
    feed(decoder, cache, fed[0])
    for rows in ([0, 0, 0], [2, 0, 1], [1, 1], [0, 1]):
        cache.select(rows)
        fed = [fed[row] + [int(rng.integers(0, V))] for row in rows]
        found = decoder.step(cache, np.array([ids[-1:] for ids in fed]), decoder.no_rows).logits[:, 0]
        assert cache.lengths.tolist() == [len(fed[0])] * len(rows)
        whole = np.stack([feed(decoder, decoder.empty_cache(1), ids)[-1] for ids in fed])
        assert_within(found, whole, rounding, rows=-1)
    with pytest.raises(ValueError, match="one length"):
        cache.cut(np.array([1, 0]))


def test_exact_generation_with_shared_buffers_is_the_full_graphs(full_graph, tmp_path):
    from trimserve.exact.checker import ExactChecker
    from trimserve.folder.names import COLD_HEAD_NAME, COLD_MAX_NAME
    from trimserve.runtime.cold_head import ColdHead
    from trimserve_export.cold_head.writing import write_cold_head

    vocab = make_vocab(KEPT, V)
    made = tmp_path / "made"
    save_graph(made, KEPT)
    cold = save({"embedding": weights()["table"][vocab.cold_ids]}, {"tied": "true"})
    (made / "cold_rows.safetensors").write_bytes(cold)
    write_cold_head(made / "model.onnx", made / "cold_rows.safetensors")
    names = ("model.onnx", "model.onnx_data", COLD_HEAD_NAME, COLD_MAX_NAME)
    files = {name: (made / name).read_bytes() for name in names}
    folder = make_folder(tmp_path / "folder", KEPT, V, cold_rows=cold, files=files)
    decoder, full = Decoder(open_session(folder.file("model.onnx"))), Decoder(open_session(full_graph))
    produced_cold = 0
    for seed in range(12):
        params = SamplingParams(temperature=seed % 2 * 1.0, seed=seed)
        prompt = np.random.default_rng(seed).integers(0, V, 1 + seed % 5).astype(np.int32)
        request = Request(prompt, params, 20)
        checker = ExactChecker(ColdHead(folder), vocab)
        for _ in GenerationLoop(decoder, vocab, ColdRows(folder), checker).run([request]):
            pass
        assert request.output == full_output(full, prompt, params, 20)
        produced_cold += int((~vocab.is_kept(request.output)).sum())
    assert produced_cold > 20


def full_output(full, prompt, params, tokens):
    columns, output = Columns(np.arange(V, dtype=np.int32), V), []
    cache = full.empty_cache(1)
    logits = feed(full, cache, prompt.tolist())
    while len(output) < tokens:
        output.append(choose(logits[-1], columns, params, History(prompt, np.array(output, np.int32))))
        logits = feed(full, cache, output[-1:])
    return output


def test_a_growing_cache_cuts_and_selects_sequences_of_unequal_length():
    """Against a cache per sequence, position by position of the arrays themselves."""
    rng = np.random.default_rng(1)
    layout = kv.KVLayout(["past.k"], ["present.k"], [(2, 3)], np.dtype(np.float32), "cpu")
    lengths, width = np.array([5, 2, 7]), 7
    cache = kv.GrowingCache(layout, 3)
    values = rng.standard_normal((3, 2, width, 3)).astype(np.float32)
    cache.mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)
    cache.take([layout.to_device(values)])
    kept = [values[row, :, width - n :] for row, n in enumerate(lengths)]
    drop = np.array([1, 0, 4])
    cache.cut(drop)
    kept = [array[:, : array.shape[1] - n] for array, n in zip(kept, drop, strict=True)]
    assert cache.lengths.tolist() == [4, 2, 3]
    cache.select([2, 1])
    for row, array in enumerate([kept[2], kept[1]]):
        found = cache._values[0].numpy()[row]
        count = array.shape[1]
        assert np.array_equal(found[:, found.shape[1] - count :], array)
        assert cache.mask[row].tolist() == [0] * (found.shape[1] - count) + [1] * count
    assert cache.mask.shape == (2, 3)
