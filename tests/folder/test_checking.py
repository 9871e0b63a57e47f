"""Whether a folder is what was written, as thoroughly as is asked for."""

import os

import pytest

from tests.support.folders import make_folder
from trimserve.errors import MismatchError, UsageError
from trimserve.files import verified
from trimserve.folder import checking
from trimserve.folder.opening import open_folder

LARGE = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path, model_folders, monkeypatch):
    """A folder whose large files are those above a kilobyte, hashed and noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    for module in (verified, checking):
        monkeypatch.setattr(module, "REMEMBER_FROM_BYTES", 1024)
    monkeypatch.setattr(verified, "_SETTLED_SECONDS", -1.0)
    files = {"model.onnx": b"graph", "model.onnx_data": LARGE, "cold_head.onnx_data": LARGE * 8}
    made = make_folder(tmp_path / "out", [0, 3, 36], 37, source=model_folders["wordpiece"], files=files)
    open_folder(made.path)
    assert (tmp_path / "cache").exists()
    return made.path


def flip(file, place):
    """Change one bit and set the file's time back, as a disk does it, or somebody who hides it."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 0x10]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("verify", [None, "fast", "full"])
def test_a_flipped_bit_in_any_file_is_found(path, verify):
    for file in sorted(path.iterdir()):
        if file.name == "trimserve.json":
            continue
        whole = file.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            flip(file, place)
            with pytest.raises(MismatchError, match=f"{file.name} has changed"):
                open_folder(path, verify=verify)
            flip(file, place)
        open_folder(path, verify=verify)


def test_sizes_alone_are_compared_on_request(path, monkeypatch):
    flip(path / "model.onnx_data", 7)
    monkeypatch.setenv("TRIMSERVE_VERIFY", "off")
    open_folder(path)
    with pytest.raises(MismatchError, match="has changed"):
        open_folder(path, verify="full")
    (path / "model.onnx_data").write_bytes(LARGE + b"1")
    with pytest.raises(MismatchError, match="bytes but has"):
        open_folder(path)


def hashed(path, monkeypatch, verify):
    names = []
    real = checking.HeldFile.sha256
    monkeypatch.setattr(
        checking.HeldFile, "sha256", lambda file: (names.append(file.path.name), real(file))[1]
    )
    open_folder(path, verify=verify)
    return set(names)


def test_large_files_are_hashed_once(path, monkeypatch):
    large = {"model.onnx_data", "cold_head.onnx_data"}
    assert not hashed(path, monkeypatch, "fast") & large
    assert hashed(path, monkeypatch, "full") >= large
    os.utime(path / "model.onnx_data")
    assert hashed(path, monkeypatch, "fast") & large == {"model.onnx_data"}


def test_another_word_is_refused(path, monkeypatch):
    with pytest.raises(UsageError, match="verify is 'all': choose one of full, fast, off"):
        open_folder(path, verify="all")
    monkeypatch.setenv("TRIMSERVE_VERIFY", "yes")
    with pytest.raises(UsageError, match="TRIMSERVE_VERIFY is 'yes'"):
        open_folder(path)
