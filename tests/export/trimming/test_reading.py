"""Graphs of other tools as they lie on disk, and tensors that are cut while they are written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import ml_dtypes
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.folders import make_vocab
from tests.support.graphs import run, sketch
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve_export.graphs.kept_tensors import Cut, KeptEntries
from trimserve_export.trimming import load_graph, trim_graph

pytestmark = pytest.mark.export

V = 37
KEPT = (0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36)
VOCAB = make_vocab(KEPT, V)
FEEDS = {"input_ids": np.arange(len(KEPT))[None]}


def save(folder: Path, **options) -> ir.Model:
    folder.mkdir(parents=True, exist_ok=True)
    model = sketch("blocks_reshaped", "qdq_int4").model()
    ir.save(model, folder / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0, **options)
    return model


def trimmed_logits(path: Path) -> np.ndarray:
    model = load_graph(path, turned=False)
    trim_graph(model, VOCAB, has_head=True)
    return run(model_in_memory(model), FEEDS)[0]


def model_in_memory(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(ir.external_data.load_to_model(model)))


@pytest.fixture
def expected() -> np.ndarray:
    model = sketch("blocks_reshaped", "qdq_int4").model()
    return run(model, {"input_ids": np.array([KEPT])})[0][..., list(KEPT)]


def test_external_data(tmp_path, expected):
    save(tmp_path)
    np.testing.assert_array_equal(trimmed_logits(tmp_path / "model.onnx"), expected)


def test_external_data_in_many_files(tmp_path, expected):
    save(tmp_path, max_shard_size_bytes=600)
    assert len(list(tmp_path.glob("model.*_data"))) > 2 or len(list(tmp_path.iterdir())) > 3
    np.testing.assert_array_equal(trimmed_logits(tmp_path / "model.onnx"), expected)


def test_links_of_a_hub_cache_are_followed(tmp_path, expected):
    save(tmp_path / "saved")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, blob in (("model.onnx", "aa11"), ("model.onnx_data", "bb22")):
        shutil.copy(tmp_path / "saved" / name, blobs / blob)
        (snapshot / name).symlink_to(blobs / blob)
    np.testing.assert_array_equal(trimmed_logits(snapshot / "model.onnx"), expected)


def test_hard_links_are_followed(tmp_path, expected):
    save(tmp_path / "saved")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "saved").iterdir():
        os.link(file, tmp_path / "linked" / file.name)
    np.testing.assert_array_equal(trimmed_logits(tmp_path / "linked" / "model.onnx"), expected)


def test_missing_data_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(MismatchError, match=r"model\.onnx_data is missing"):
        load_graph(tmp_path / "model.onnx")


def test_data_that_was_cut_off_is_refused(tmp_path):
    save(tmp_path)
    os.truncate(tmp_path / "model.onnx_data", 100)
    with pytest.raises(MismatchError, match=r"should have 296 bytes from 0 on for table but has 100"):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret"])
def test_data_outside_the_folder_is_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(10_000))
    model = save(tmp_path / "model")
    value = model.graph.initializers["table"]
    value.const_value = ir.ExternalTensor(
        location, 0, None, ir.DataType.UINT8, shape=ir.Shape([V, 1, 8]), name="table"
    )
    ir.save(model, tmp_path / "model" / "model.onnx")
    with pytest.raises(MismatchError, match=r"names the file .* not a plain name"):
        load_graph(tmp_path / "model" / "model.onnx")


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(MismatchError, match="cannot be read as an ONNX graph"):
        load_graph(tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=r"use the \.onnx it was made from"):
        load_graph(tmp_path / "model.ort")


def test_compiled_parts_are_refused(tmp_path):
    made = sketch("plain", "matmul")
    made.add("x = com.microsoft.EPContext<main_context = 1>(hidden)")
    ir.save(made.model(), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=r"EPContext .* compiled for one device"):
        load_graph(tmp_path / "model.onnx")


DTYPES = [np.float32, np.uint8, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.uint2]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_kept_entries_are_those_of_numpy(data, tmp_path_factory):
    dtype = data.draw(st.sampled_from(DTYPES))
    sizes = [data.draw(st.integers(1, 9)) for _ in range(data.draw(st.integers(1, 3)))]
    axis = data.draw(st.integers(0, len(sizes) - 1))
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, sizes[axis] - 1), min_size=1))), np.int32)
    values = np.random.default_rng(0).integers(0, 4, sizes).astype(dtype)
    source = ir.tensor(values, name="source")
    if data.draw(st.booleans()):
        path = tmp_path_factory.mktemp("tensors") / "data"
        path.write_bytes(b"before" + source.tobytes() + b"after")
        source = ir.ExternalTensor(
            path, 6, source.nbytes, source.dtype, shape=source.shape, name="source", base_dir=""
        )
    cut = Cut(axis, int(np.prod(sizes[:axis])), int(np.prod(sizes[axis + 1 :])))
    found = KeptEntries(source, cut, sizes[axis], kept)
    expected = np.take(values, kept, axis=axis)
    assert tuple(found.shape) == expected.shape
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.tobytes() == ir.tensor(expected).tobytes()
    assert found.nbytes == len(found.tobytes())


def test_blocks_of_entries_are_joined(monkeypatch):
    monkeypatch.setattr("trimserve_export.graphs.kept_tensors._BLOCK_BYTES", 16)
    for dtype in DTYPES:
        for axis, shape in ((0, (V, 5)), (1, (9, V)), (1, (17, V, 3))):
            values = np.random.default_rng(0).integers(0, 4, shape).astype(dtype)
            cut = Cut(axis, int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :])))
            found = KeptEntries(ir.tensor(values), cut, V, VOCAB.kept_ids)
            np.testing.assert_array_equal(found.numpy(), np.take(values, KEPT, axis=axis))
