"""What surrounds a call: a terminal's encoding, pipes and devices for files, sizes that no system has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trimserve
from trimserve.cli.main import main
from trimserve.errors import MismatchError, TrimserveError, UsageError
from trimserve.files.checked_json import read_bounded
from trimserve.model.resolve import resolve_model
from trimserve.selection.keep_file import read_keep_file

LETTERS = """
from trimserve.stdout import data_only, data_stream
with data_only():
    print("käse 中文 \\udcff", file=data_stream())
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict", "utf-8:surrogateescape"])
def test_letters_that_the_terminal_has_not_are_escaped(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    found = subprocess.run([sys.executable, "-c", LETTERS], capture_output=True, env=environment)
    assert found.returncode == 0, found.stderr
    name = encoding.partition(":")[0]
    assert found.stdout == "käse 中文 \udcff\n".encode(name, "backslashreplace")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_pipe_in_a_models_folder_is_refused_at_once(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(MismatchError, match="pipe or a device"):
        resolve_model(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless device")
def test_a_file_without_an_end_is_refused(tmp_path):
    with pytest.raises(MismatchError, match="more than"):
        read_keep_file("/dev/zero")
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(MismatchError, match="pipe or a device"):
        resolve_model(tmp_path)


def test_a_bound_is_met_to_the_byte(tmp_path):
    (file := tmp_path / "f").write_bytes(b"12345")
    assert read_bounded(file, most_bytes=5) == b"12345"
    with pytest.raises(MismatchError, match="more than 4 bytes"):
        read_bounded(file, most_bytes=4)


@pytest.mark.parametrize("count", [10**5, 10**6, 2**40])
def test_more_threads_than_any_machine_has_are_refused(tmp_path, count):
    with pytest.raises(UsageError, match="threads should be"):
        trimserve.load(tmp_path, threads=count)
    with pytest.raises(UsageError, match="workers should be"):
        trimserve.profile(tmp_path, tmp_path, workers=count)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "é" * 128])
def test_names_that_no_file_can_have_are_refused(name):
    for call in (trimserve.load, trimserve.inspect):
        with pytest.raises(UsageError, match="more than 255 bytes"):
            call(name)


def test_nothing_is_no_path(capsys):
    for words in (["run", "", "x"], ["export", "-m", "m", "--vocab", "v.safetensors", "-o", ""]):
        assert main(words) == 2
        assert "no path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "reason", "size"),
    [
        ("a", [1], 5),
        ([1], "b", 5),
        ([1], [1], "5"),
        ([1], [1], None),
        ([[1], [1, 2]], [1], 5),
        ([1.5], [1], 5),
        ([True], [1], 5),
        ([1], [300], 5),
        ([1], [-1], 5),
        ([2**63], [1], 5),
        ([2**70], [1], 5),
    ],
)
def test_a_vocab_of_no_whole_numbers_is_refused(kept, reason, size):
    with pytest.raises(TrimserveError):
        trimserve.VocabMap(kept, reason, size)


def test_profiles_are_read_from_paths_alone():
    with pytest.raises(UsageError, match="path should be a path"):
        trimserve.Profile.load(5)


def test_ids_that_are_no_whole_numbers_are_refused():
    vocab = trimserve.VocabMap([1], [1], 5)
    for look in (vocab.to_compact, vocab.to_original, vocab.is_kept):
        for ids in ("a", [0.5], [None]):
            with pytest.raises(UsageError, match="whole numbers"):
                look(ids)
