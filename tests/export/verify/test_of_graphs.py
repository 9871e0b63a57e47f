"""`verify` of folders made of ONNX graphs: it passes, and fails where a row was shifted."""

import pytest

pytest.importorskip("torch")

import onnx_ir as ir

from tests.support.graph_folders import accept_files, save_graph, shift_rows, vocab_of
from trimserve.files.tensors import read_header
from trimserve.folder.manifest import read_manifest
from trimserve.folder.names import COLD_NAME
from trimserve.folder.opening import open_folder
from trimserve_export import export
from trimserve_export.verify import verify

pytestmark = pytest.mark.export
TEXTS = ["the cat sat on the mat", "Grüße, Welt! 🎉"]


def make(root, family, kind):
    source = save_graph(root, family, kind, tokenizer="byte_level_bpe", hidden_size=64, intermediate_size=96)
    export(source, vocab_of(source), root / "trimmed")
    return root / "trimmed"


@pytest.mark.parametrize(("family", "kind"), [("llama", "int4"), ("llama_tied", "fp32")])
def test_shifted_rows_are_found(tmp_path, family, kind):
    folder = make(tmp_path, family, kind)
    result = verify(folder, texts=TEXTS)
    assert result.ok, result.to_dict()
    kept = read_manifest(folder).kept
    graph = ir.load(folder / "model.onnx").graph
    tables = [value.const_value for value in graph.initializers.values()]
    table = next(tensor for tensor in tables if tuple(tensor.shape) == (kept, 64))
    shift_rows(folder / "model.onnx_data", table.offset or 0, 256, kept)
    accept_files(folder)
    assert set(verify(folder, texts=TEXTS).failed) >= {"kept-rows", "hidden-states"}


@pytest.mark.parametrize("kind", ["int8", "qdq"])
def test_heads_by_the_graphs_own_nodes(tmp_path, kind):
    folder = make(tmp_path, "llama", kind)
    result = verify(folder, texts=TEXTS)
    assert result.ok, result.to_dict()
    graph = ir.load(folder / "cold_head.onnx").graph
    tensors = [value.const_value for value in graph.initializers.values()]
    weight = max((tensor for tensor in tensors if tensor is not None), key=lambda tensor: tensor.nbytes)
    shift_rows(folder / "cold_head.onnx_weights", weight.offset or 0, 8, weight.nbytes // 8)
    accept_files(folder)
    assert set(verify(folder, texts=TEXTS).failed) >= {"kept-rows", "generated-ids"}


def test_shifted_cold_rows_are_found(tmp_path):
    folder = make(tmp_path, "llama", "int4")
    spec = read_header(folder / COLD_NAME)[0]["embedding"]
    shift_rows(folder / COLD_NAME, spec.offset, 256, spec.shape[0])
    accept_files(folder)
    assert set(verify(folder, texts=TEXTS).failed) >= {"kept-rows", "cold-slots"}


def test_shifted_head_blocks_are_found(tmp_path):
    folder = make(tmp_path, "llama", "int4")
    kept = read_manifest(folder).kept
    graph = ir.load(folder / "model.onnx").graph
    tables = [value.const_value for value in graph.initializers.values()]
    blocks = next(tensor for tensor in tables if tuple(tensor.shape) == (kept, 2, 16))
    shift_rows(folder / "model.onnx_data", blocks.offset or 0, 32, kept)
    accept_files(folder)
    assert set(verify(folder, texts=TEXTS).failed) >= {"kept-rows", "kept-logits"}


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_other_layouts(tmp_path, layout):
    source = save_graph(tmp_path, "llama", "int4", tokenizer="byte_level_bpe", hidden_size=64)
    export(source, vocab_of(source), tmp_path / "trimmed", layout=layout)
    result = verify(tmp_path / "trimmed", texts=TEXTS)
    assert result.ok, result.to_dict()
    graph = ir.load(tmp_path / "trimmed" / "model.onnx").graph
    rows = (len(open_folder(tmp_path / "trimmed").vocab), 64)
    tables = [value.const_value for value in graph.initializers.values()]
    table = next(tensor for tensor in tables if tuple(tensor.shape) == rows)
    shift_rows(tmp_path / "trimmed" / "model.onnx_data", table.offset or 0, 256, rows[0])
    accept_files(tmp_path / "trimmed")
    assert set(verify(tmp_path / "trimmed", texts=TEXTS).failed) >= {"kept-rows", "layout-outputs"}
