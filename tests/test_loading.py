"""Loading folders, with graphs made by hand: what a real exporter gives is in test_encoder.py."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from tests.support.folders import make_folder
from tests.support.tiny_tokenizers import KINDS
from trimserve.encoder.encoder import Encoder
from trimserve.errors import MismatchError, MissingExtraError, UnsupportedModelError, UsageError
from trimserve.folder.manifest import read_manifest
from trimserve.loading import load

pytestmark = pytest.mark.export

V, H = 37, 8  # of the wordpiece tokenizer
KEPT = [0, 1, 2, 3, 4, 5, 10, 18, 27, 33, 36]
COLD = np.setdiff1d(np.arange(V), KEPT)
ROWS = np.random.default_rng(0).normal(size=(V, H)).astype(np.float16)


def graph(id_type: int, *, extra: str | None = None, cold_rows: bool = True) -> bytes:
    """last_hidden_state = row of the token + its position + its type, in fp16; `extra` is one more input."""
    ids = [helper.make_tensor_value_info(name, id_type, ["B", "T"]) for name in INPUTS]
    rows = helper.make_tensor_value_info("cold_rows", TensorProto.FLOAT16, ["S", H])
    inputs = [*ids, *([rows] if cold_rows else [])]
    if extra:
        inputs.append(helper.make_tensor_value_info(extra, TensorProto.FLOAT, [1]))
    nodes = [helper.make_node("Concat", ["E", "cold_rows"], ["all"], axis=0)] if cold_rows else []
    nodes += [
        helper.make_node("Gather", ["all" if cold_rows else "E", "input_ids"], ["tokens"]),
        helper.make_node("Add", ["position_ids", "token_type_ids"], ["places"]),
        helper.make_node("Mul", ["places", "attention_mask"], ["seen"]),
        helper.make_node("Cast", ["seen"], ["halves"], to=TensorProto.FLOAT16),
        helper.make_node("Unsqueeze", ["halves", "last"], ["columns"]),
        helper.make_node("Add", ["tokens", "columns"], ["last_hidden_state"]),
    ]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT16, ["B", "T", H])
    weights = [
        numpy_helper.from_array(ROWS[KEPT], "E"),
        numpy_helper.from_array(np.array([-1], np.int64), "last"),
    ]
    made = helper.make_graph(nodes, "encoder", inputs, [output], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def make(path, model_folders, content=None, **options):
    settings = {
        "source": model_folders["wordpiece"],
        "cold_rows": save({"embedding": ROWS[COLD]}),
        "files": {"model.onnx": graph(TensorProto.INT32) if content is None else content},
        "graphs": {"model": "model.onnx"},
        "dtype": "fp16",
    }
    make_folder(path, KEPT, V, **settings | options)
    return path


@pytest.mark.parametrize("id_type", [TensorProto.INT32, TensorProto.INT64])
def test_a_graph_is_fed_in_its_own_types(tmp_path, model_folders, id_type):
    encoder = load(make(tmp_path / "folder", model_folders, graph(id_type)))
    assert isinstance(encoder, Encoder)
    texts = ["the cat sat on the mat", "dog!", ""]
    for text, output in zip(texts, encoder.forward(texts), strict=True):
        ids = KINDS["wordpiece"]().encode(text).ids[: output.shape[0]]
        expected = ROWS[ids] + np.arange(len(ids), dtype=np.float16)[:, None]
        np.testing.assert_array_equal(output, expected.astype(np.float32))
    assert encoder.dimension == H


def test_a_path_may_be_a_string(tmp_path, model_folders):
    assert load(str(make(tmp_path / "folder", model_folders)), threads=1).encode(["the"]).shape == (1, H)


@pytest.mark.optimum
def test_repr_says_what_was_loaded(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders)
    shown = f"{path}, feature-extraction, {len(KEPT)} of {V} rows kept, fp16"
    assert repr(load(path)) == f"<Encoder {shown}>"


@pytest.mark.optimum
def test_progress_counts_every_text_once(tmp_path, model_folders, monkeypatch):
    bars = []

    @contextlib.contextmanager
    def counting(total, *_, show):
        bars.append([total, show, 0])
        yield types.SimpleNamespace(update=lambda count: bars[-1].__setitem__(2, bars[-1][2] + count))

    monkeypatch.setattr("trimserve.encoder.encoder.progress", counting)
    encoder = load(make(tmp_path / "folder", model_folders))
    texts = ["the cat sat", "dog!"] * 4
    quiet = encoder.encode(texts, batch_size=3)
    np.testing.assert_array_equal(encoder.encode(texts, batch_size=3, show_progress_bar=True), quiet)
    assert bars == [[8, False, 8], [8, True, 8]]


HUB_CODE = """
import sys
import trimserve
try:
    model = trimserve.load(sys.argv[1], revision=sys.argv[2] or None)
    print(model.encode("the cat").shape)
except trimserve.TrimserveError as error:
    print(type(error).__name__, error)
"""


def load_from_hub(cache, name, revision="", *, hide=False):
    """What a process without a network prints; its hub cache is `cache`."""
    hiding = "import sys; sys.modules['huggingface_hub'] = None\n" if hide else ""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", hiding + HUB_CODE, name, revision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=cache)
    return done.stdout.strip()


@pytest.mark.optimum
def test_a_hub_id_is_loaded_from_the_hubs_cache(tmp_path, model_folders):
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "models--someone--tickets"
    made = make(tmp_path / "folder", model_folders)
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "c0ffee").mkdir(parents=True)
    for file in made.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (repo / "snapshots" / "c0ffee" / file.name).symlink_to(f"../../blobs/{file.name}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    assert load_from_hub(tmp_path, "someone/tickets") == f"(1, {H})"
    refused = load_from_hub(tmp_path, "someone/else")
    assert refused.startswith("UsageError someone/else is no local folder and could not be fetched")


@pytest.mark.optimum
def test_a_hub_id_needs_huggingface_hub_and_a_folder_has_no_revision(tmp_path, model_folders):
    make(tmp_path / "a" / "b", model_folders)
    assert "pip install 'trimserve[hub]'" in load_from_hub(tmp_path, "someone/tickets", hide=True)
    assert load_from_hub(tmp_path, "a/b", hide=True) == f"(1, {H})"
    assert "has no revisions" in load_from_hub(tmp_path, "a/b", "main", hide=True)


def test_a_folder_without_a_graph_says_what_to_do(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders, graphs={}, files={})
    with pytest.raises(UsageError, match=r"no ONNX graph \(--to safetensors or gguf\)"):
        load(path)


def test_what_this_runtime_does_not_run_is_refused(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders, layout="graph")
    with pytest.raises(UnsupportedModelError, match="graph"):
        load(path)


def test_a_graph_that_was_not_made_for_serving_is_refused(tmp_path, model_folders):
    path = make(tmp_path / "a", model_folders, graph(TensorProto.INT64, cold_rows=False))
    with pytest.raises(UnsupportedModelError, match="no input 'cold_rows'"):
        load(path)
    path = make(tmp_path / "b", model_folders, graph(TensorProto.INT64, extra="pixel_values"))
    with pytest.raises(UnsupportedModelError, match="takes pixel_values"):
        load(path)
    path = make(tmp_path / "c", model_folders, task="text-classification")
    with pytest.raises(UnsupportedModelError, match="lacks the output logits"):
        load(path)
    path = make(tmp_path / "d", model_folders, dtype="bf16")
    with pytest.raises(UnsupportedModelError, match="bf16"):
        load(path)


def test_cold_rows_of_another_width_are_refused(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders, cold_rows=save({"embedding": ROWS[COLD, :5]}))
    with pytest.raises(MismatchError, match="rows of 5 entries but the graph takes 8"):
        load(path)


def test_a_file_that_is_no_graph_is_refused(tmp_path, model_folders):
    with pytest.raises(MismatchError, match="cannot be loaded"):
        load(make(tmp_path / "folder", model_folders, b"no graph"))


def test_a_changed_or_lost_file_is_named(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders)
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(content[:-1] + b"\0")
    with pytest.raises(MismatchError, match=r"model\.onnx has changed"):
        load(path)
    (path / "model.onnx").unlink()
    with pytest.raises(MismatchError, match=r"model\.onnx is listed in trimserve\.json but missing"):
        load(path)


def test_an_unknown_device_is_refused(tmp_path, model_folders):
    with pytest.raises(UsageError, match="device should be one of cpu, cuda, found 'tpu'"):
        load(make(tmp_path / "folder", model_folders), device="tpu")


def test_without_onnxruntime_the_error_names_the_pip_command(tmp_path, model_folders, monkeypatch):
    path = make(tmp_path / "folder", model_folders)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[cpu\]'"):
        load(path)


def test_a_config_that_is_no_json_is_refused(tmp_path, model_folders):
    path = make(
        tmp_path / "folder",
        model_folders,
        files={"model.onnx": graph(TensorProto.INT64), "config.json": b"{"},
    )
    with pytest.raises(MismatchError, match=r"config\.json is not JSON"):
        load(path)


def test_a_graph_outside_the_manifest_is_refused(tmp_path, model_folders):
    path = make(tmp_path / "folder", model_folders)
    manifest = read_manifest(path)
    raw = json.loads(manifest.to_json())
    raw["graphs"] = {"model": "other.onnx"}
    (path / "trimserve.json").write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match=r"names the graph 'other\.onnx' and does not list it"):
        load(path)


def test_without_a_mask_texts_of_one_length_are_fed_together(tmp_path, model_folders):
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])
    rows = helper.make_tensor_value_info("cold_rows", TensorProto.FLOAT16, ["S", H])
    nodes = [
        helper.make_node("Concat", ["E", "cold_rows"], ["all"], axis=0),
        helper.make_node("Gather", ["all", "input_ids"], ["tokens"]),
        helper.make_node("ReduceMax", ["tokens"], ["largest"], axes=[1]),  # over padding too, were there any
        helper.make_node("Sub", ["tokens", "largest"], ["last_hidden_state"]),
    ]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT16, ["B", "T", H])
    table = numpy_helper.from_array(ROWS[KEPT] - np.float16(100), "E")  # padding is no kept row's maximum
    made = helper.make_graph(nodes, "encoder", [ids, rows], [output], [table])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    encoder = load(make(tmp_path / "folder", model_folders, model.SerializeToString()))
    texts = ["the cat sat on the mat", "dog", "the", "cat sat on"]
    for text, together in zip(texts, encoder.forward(texts), strict=True):
        np.testing.assert_array_equal(together, encoder.forward([text])[0])
