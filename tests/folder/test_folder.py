import dataclasses
import json

import pytest

from tests.support.folders import make_folder
from trimserve.errors import MismatchError, UsageError
from trimserve.folder.manifest import (
    CutTensor,
    FileEntry,
    Manifest,
    Source,
    is_trimmed,
    read_manifest,
    stored_weight_bytes,
    with_verification,
    write_manifest,
)
from trimserve.folder.names import check_plain_name
from trimserve.folder.opening import list_files, open_folder

MANIFEST = Manifest(
    source=Source("owner/model", "main", {"model.safetensors": "a" * 64}),
    tokenizer_sha256="b" * 64,
    vocab_size=37,
    kept=11,
    task="fill-mask",
    layout="runtime",
    dtype="fp32",
    graphs={"model": "model.onnx"},
    cut=(CutTensor("embedding", 0, 37, 11, "F32"),),
    selection={"coverage": 0.5},
    exporter={"name": "optimum"},
    created="2026-01-01T00:00:00+00:00",
    files={"model.onnx": FileEntry(3, "c" * 64)},
)


def test_manifest_comes_back_equal_and_the_same_bytes():
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    assert Manifest.from_json(text).to_json() == text
    assert text.endswith("}\n")
    earlier = json.loads(MANIFEST.to_json()) | {"pooling": None}
    assert Manifest.from_json(json.dumps(earlier)) == MANIFEST


def test_verification_joins_the_manifest():
    assert with_verification(MANIFEST, {"ok": True}).verification == {"ok": True}
    assert MANIFEST.verification is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema 2, this trimserve reads 1"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"a": {"bytes": 1}}}, "sha256"),
        ({"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}, "plain name"),
        ({"files": {"a": {"bytes": -1, "sha256": "0" * 64}}}, "bytes"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 64, "more": 1}}}, "more"),
        ({"files": {"a": {"bytes": 1, "sha256": "G" * 64}}}, "sha256"),
        ({"graphs": {"Model": "model.onnx"}}, "graphs"),
        ({"graphs": {"model": "other.onnx"}}, "does not list it"),
        ({"tokenizer": {"file": "../tokenizer.json"}}, "does not list it"),
        ({"tokenizer": {"settings": {"clean_up": "no"}}}, "clean_up"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"quantization": {"bits": 3}}, "3 bits"),
        ({"quantization": {"bits": 4, "block_size": 1 << 40}}, "4 bits in blocks"),
        ({"quantization": {"rows": {"bits": 8}, "body": {"bits": 3}}}, "3 bits"),
        ({"quantization": {"rows": {"bits": 8}}}, "body"),
        ({"quantization": {"rows": {"bits": 8}, "body": {"bits": 4, "more": 1}}}, "more"),
        ({"quantization": {"rows": {"bits": 8}, "body": {"bits": 4}, "head": {}}}, "head"),
        ({"quantization": {"rows": None, "body": {"bits": 4}}}, "rows"),
        ({"quantization": {"bits": 4, "scales": "luck"}}, "luck"),
        ({"graphs": {"model": "/tmp/model.onnx"}}, "plain name"),
        ({"source": None}, "export the folder again"),
        ({"cut": 3}, "export the folder again"),
        ({"kept": "many"}, "kept"),
        ({"kept": True}, "kept"),
        ({"selection": None}, "selection"),
        ({"layout": "cut"}, "'cut' - at `.*layout"),
        ({"task": "speech-recognition"}, "'speech-recognition' - at `.*task"),
        ({"graphs": {"model": 3}}, "export the folder again"),
        ({"files": {"model.onnx": {"bytes": None, "sha256": ""}}}, "bytes"),
        ({"pooling": {"mode": "cls"}}, "earlier trimserve, which kept the pooling there"),
    ],
)
def test_manifests_that_are_not_understood_are_refused(change, message):
    raw = json.loads(MANIFEST.to_json()) | change
    raw = {key: value for key, value in raw.items() if value is not ...}
    with pytest.raises(MismatchError, match=message):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}"])
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(MismatchError, match=r"not a manifest|is not JSON"):
        Manifest.from_json(text)


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "trimserve.json").write_bytes(b"\xff\xfe")
    with pytest.raises(MismatchError, match=r"is not JSON .*utf-8"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/b", "a\\b", "..\\a", "C:\\a", "C:a", "a/", "a\0b"])
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(MismatchError, match="plain name"):
        check_plain_name(name, "trimserve.json")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "...", "日本.txt", "-rf", "a b"])
def test_plain_names_pass(name):
    check_plain_name(name, "trimserve.json")


@pytest.fixture
def trimmed(tmp_path, model_folders):
    return make_folder(
        tmp_path / "out", [0, 3, 36], 37, source=model_folders["wordpiece"], files={"model.onnx": b"graph"}
    )


def test_opened_folder_lists_its_files(trimmed):
    assert is_trimmed(trimmed.path)
    assert trimmed.vocab.kept_ids.tolist() == [0, 3, 36]
    assert trimmed.file("model.onnx").read_bytes() == b"graph"
    assert not trimmed.has_cold
    with pytest.raises(MismatchError, match=r"no other\.onnx in its manifest"):
        trimmed.file("other.onnx")
    assert "trimserve.json" not in list_files(trimmed.path)


def test_a_folder_that_is_not_ours_is_a_usage_error(tmp_path):
    for name in (".", "nowhere"):
        with pytest.raises(UsageError, match="not a trimmed folder"):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "vocab_map.safetensors", "tokenizer.json"])
def test_missing_shorter_and_changed_files_are_noticed(trimmed, name):
    file = trimmed.path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(MismatchError, match=f"{name} should have {len(content):,} bytes"):
        open_folder(trimmed.path)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(MismatchError, match=f"{name} has changed"):
        open_folder(trimmed.path)
    file.unlink()
    with pytest.raises(MismatchError, match=f"{name} is listed .* but missing"):
        open_folder(trimmed.path)


def test_vocab_and_manifest_must_agree(trimmed):
    write_manifest(trimmed.path, dataclasses.replace(trimmed.manifest, kept=4))
    with pytest.raises(MismatchError, match="keeps 3 of 37 ids, the manifest says 4 of 37"):
        open_folder(trimmed.path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("model.onnx", "model.onnx_data"), 11),
        # Encoder-decoders share one file of weights.
        (("encoder_model.onnx", "decoder_model.onnx", "model.onnx_data"), 111),
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), 11),
    ],
)
def test_stored_weights_are_graphs_and_their_data_without_cold_files(names, expected):
    beside = (
        "cold_rows.safetensors",
        "cold_head.onnx",
        "cold_sketch.onnx_data",
        "vocab_map.safetensors",
        "a.json",
    )
    sizes = {name: 10**place for place, name in enumerate(names)} | dict.fromkeys(beside, 7)
    assert stored_weight_bytes({name: FileEntry(size, "") for name, size in sizes.items()}) == expected
