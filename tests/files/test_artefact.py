import errno
import hashlib
import json
import os
import stat
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from trimserve.errors import MismatchError, UsageError
from trimserve.files import tensors as tensorfile
from trimserve.files.artefact import check_output, load_artefact, save_artefact
from trimserve.files.atomic import atomic_path
from trimserve.files.hashes import sha256_file
from trimserve.vocab.file import load_vocab, save_vocab
from trimserve.vocab.map import Reason, VocabMap

VOCAB = VocabMap(
    np.array([0, 5, 36]),
    np.array([Reason.STRUCTURAL, Reason.PROFILE, Reason.FILL]),
    37,
    "f" * 64,
    {"coverage": 0.5, "options": {"top_k": 3}},
)


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_vocab_comes_back_equal(tmp_path):
    save_vocab(VOCAB, tmp_path / "v.safetensors")
    loaded = load_vocab(tmp_path / "v.safetensors")
    assert np.array_equal(loaded.kept_ids, VOCAB.kept_ids)
    assert np.array_equal(loaded.reason, VOCAB.reason)
    assert (loaded.vocab_size, loaded.tokenizer_sha256) == (37, "f" * 64)
    assert loaded.rule == VOCAB.rule


def test_vocab_file_holds_what_other_tools_read(tmp_path):
    save_vocab(VOCAB, tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "numpy") as file:
        vocab_map = file.get_tensor("vocab_map")
        assert (vocab_map.tolist(), vocab_map.dtype) == ([0, 5, 36], np.int32)
        # TensorRT-Edge-LLM's runtime: "vocab_map.safetensors should contain exactly one tensor", int32, 1-D.
        assert list(file.keys()) == ["vocab_map"]
        assert vocab_map.ndim == 1
        assert file.metadata()["kind"] == "vocab"
        assert json.loads(file.metadata()["vocab_size"]) == 37


def test_reasons_of_files_that_hold_them_as_a_tensor_are_read(tmp_path):
    facts = {"vocab_size": 37, "tokenizer_sha256": "", "rule": {}}
    arrays = {"vocab_map": np.array([3, 5], np.int32), "reason": np.array([0, 3], np.uint8)}
    save_artefact(tmp_path / "v", "vocab", arrays, facts)
    assert load_vocab(tmp_path / "v").reason.tolist() == [Reason.STRUCTURAL, Reason.FILL]


def test_same_content_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_vocab(VOCAB, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_vocab_with_ids_out_of_order_is_refused(tmp_path):
    facts = {"vocab_size": 37, "tokenizer_sha256": "", "rule": {}}
    arrays = {"vocab_map": np.array([5, 3], np.int32), "reason": np.zeros(2, np.uint8)}
    save_artefact(tmp_path / "v", "vocab", arrays, facts)
    with pytest.raises(MismatchError, match="increase strictly"):
        load_vocab(tmp_path / "v")
    save_artefact(tmp_path / "v", "vocab", {"reason": arrays["reason"]}, facts)
    with pytest.raises(MismatchError, match="should hold vocab_map"):
        load_vocab(tmp_path / "v")


def test_wrong_kind_schema_and_damage_are_refused(tmp_path):
    file = tmp_path / "v.safetensors"
    with pytest.raises(UsageError, match="does not exist"):
        load_vocab(file)
    save_artefact(file, "profile", {"x": np.zeros(1)}, {})
    with pytest.raises(MismatchError, match="should be a vocab but is profile"):
        load_vocab(file)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(MismatchError, match="no trimserve file"):
        load_vocab(file)
    save_file({"x": np.zeros(1)}, file, {"kind": "vocab"})
    with pytest.raises(MismatchError, match="schema None"):
        load_vocab(file)
    save_file({"x": np.zeros(1)}, file, {"kind": "vocab", "schema_version": "2"})
    with pytest.raises(MismatchError, match="schema 2, this trimserve reads 1"):
        load_vocab(file)
    save_file({"x": np.zeros(1)}, file, {"kind": "vocab", "schema_version": "1", "rule": "{"})
    with pytest.raises(MismatchError, match="is not JSON"):
        load_artefact(file, "vocab")


def test_artefacts_of_the_same_kind_are_replaced_others_are_not(tmp_path):
    save_vocab(VOCAB, tmp_path / "v")
    save_vocab(VOCAB, tmp_path / "v")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder", "no/where"):
        with pytest.raises(UsageError):
            save_vocab(VOCAB, tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="not a profile file"):
        check_output(tmp_path / "v", "profile")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_all_or_nothing(tmp_path, error):
    (tmp_path / "a").write_text("before")

    def write(name):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise error

    for name in ("a", "b"):
        with pytest.raises(error):
            write(name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "before")]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_atomic_path_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_full_disk_is_reported_with_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "write", full)
    with pytest.raises(OSError, match="No space") as caught:
        save_vocab(VOCAB, tmp_path / "v")
    assert caught.value.filename == str(tmp_path / "v")
    assert not list(tmp_path.iterdir())
