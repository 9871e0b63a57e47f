"""Graphs by other tools: a onnxruntime-genai Llama through export, verify and runtime; GPT-2 and LFM2 cut."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir

import trimserve
from tests.support.exports import open_graph
from tests.support.folders import make_vocab
from tests.support.generators import FullSampler
from tests.support.rounding import assert_within
from trimserve.folder.opening import open_folder
from trimserve.model.resolve import resolve_model
from trimserve.selection.select_ids import select
from trimserve_export import export
from trimserve_export.from_graph.trimmed import serve_full
from trimserve_export.trimming import load_graph, trim_graph
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, pytest.mark.realdata]

GRAPHS = {
    "llama-32k-fp16-extdata/model.onnx": 32000,
    "tiny-random-gpt2-fp32/past.onnx": 1000,
    "tiny-random-lfm2-fp32/decoder.onnx": 1000,
}
_NUMBERS = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def run(path, ids: np.ndarray) -> list[np.ndarray]:
    """Run a decoder on an empty cache."""
    session = open_graph(path)
    feeds = {}
    for value in session.get_inputs():
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
        }
        sizes = [size if isinstance(size, int) else int("batch" in size) for size in value.shape]
        feeds[value.name] = known.get(value.name, np.zeros(sizes)).astype(_NUMBERS[value.type])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_equal_the_full_graphs(data_dir, tmp_path, name):
    path, rows = data_dir / "models" / "onnx-layouts" / name, GRAPHS[name]
    kept = np.unique(np.random.default_rng(0).integers(0, rows, rows // 7))
    model = load_graph(path, turned=False)
    trim_graph(model, make_vocab(kept, rows), has_head=True)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx_data")
    compact = np.random.default_rng(1).integers(0, len(kept), (1, 12))
    full, found = run(path, kept[compact]), run(tmp_path / "model.onnx", compact)
    np.testing.assert_array_equal(found[0], full[0][..., kept])
    for other, expected in zip(found[1:], full[1:], strict=True):
        np.testing.assert_array_equal(other, expected)


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_genai_config_follows_the_layout(data_dir, tmp_path, layout):
    source = data_dir / "models" / "onnx-layouts" / "llama-32k-fp16-extdata"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, 1 2 3.", "utf-8")
    found = trimserve.profile([text], source)
    result = export(source, select([found], model=source), tmp_path / "trimmed", layout=layout, profile=found)
    written = json.loads((tmp_path / "trimmed" / "genai_config.json").read_text("utf-8"))["model"]
    assert written["vocab_size"] == (result.kept if layout == "tokenizer" else 32000)
    assert written["decoder"]["filename"] == "model.onnx"
    assert written["eos_token_id"] == 1  # special ids come first, so they stay
    ids = np.array([[1, 3, 5, 7]])
    kept = open_folder(tmp_path / "trimmed").vocab
    logits = run(tmp_path / "trimmed" / "model.onnx", ids)[0]
    full = run(source / "model.onnx", kept.to_original(ids) if layout == "tokenizer" else ids)[0]
    columns = slice(None) if layout == "tokenizer" else kept.kept_ids
    bound = 0.0
    if layout == "graph":
        # On a CPU fp16 is rounded where ONNX Runtime casts, which a node behind the head moves.
        (tmp_path / "full").mkdir()
        served = serve_full(resolve_model(source), tmp_path / "full", task="text-generation-with-past")
        bound = FullSampler(served, 32000).rounding(ids[0], "fp16")
    assert_within(logits[..., columns], full[..., kept.kept_ids], bound, rows=1)


def test_genai_folder_from_end_to_end(data_dir, tmp_path):
    source = data_dir / "models" / "onnx-layouts" / "llama-32k-fp16-extdata"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, 1 2 3.", "utf-8")
    vocab = select([trimserve.profile([text], source)], model=source)
    export(source, vocab, tmp_path / "trimmed")
    assert verify(tmp_path / "trimmed").ok
    (result,) = trimserve.load(tmp_path / "trimmed").generate("Zebras 数学 eat", max_new_tokens=8)
    assert result.ids
