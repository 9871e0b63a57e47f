"""Held files, and what is remembered of their hashes."""

import hashlib
import os
import sys
import time
from pathlib import Path

import pytest

from trimserve.errors import MismatchError, TrimserveError
from trimserve.files import held, verified
from trimserve.files.held import HeldFile, HeldFolder
from trimserve.process import memory

CONTENT = bytes(range(256)) * 1024  # above the size that is kept in memory
SMALL = b"small"


@pytest.fixture(params=[CONTENT, SMALL], ids=["large", "small"])
def content(request):
    return request.param


@pytest.fixture
def path(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    return tmp_path / "file"


def test_a_held_file_outlives_its_path(path, content):
    file = HeldFile(path)
    assert len(content) == file.size
    assert (file.size > held.SMALL_BYTES) is (content == CONTENT)
    path.rename(path.with_name("old"))
    path.write_bytes(b"another")
    path.with_name("old").unlink()
    assert file.read() == content
    assert file.read(3, 2) == content[3:5]
    assert file.read(len(content) - 1, 10) == content[-1:]
    assert bytes(memoryview(file.map())) == content
    assert file.sha256() == hashlib.sha256(content).hexdigest()
    assert not file.is_in_place
    file.copy_to(path.with_name("copy"))
    assert path.with_name("copy").read_bytes() == content
    file.check_unchanged()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters")
def test_pages_that_were_read_can_be_given_back_and_come_again(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT * 64)
    file = HeldFile(tmp_path / "file")
    mapped = memoryview(file.map())
    before = memory().file
    assert bytes(mapped) == CONTENT * 64
    assert memory().file - before > len(CONTENT) * 48
    (tmp_path / "file").unlink()
    file.drop_pages()
    assert memory().file - before < len(CONTENT) * 16
    assert bytes(mapped) == CONTENT * 64
    small = HeldFile(Path(__file__))
    small.drop_pages()  # nothing is mapped, so nothing is dropped


def test_a_file_in_its_place_is_known(path):
    file = HeldFile(path)
    assert file.is_in_place
    path.unlink()
    assert not file.is_in_place


def test_a_file_that_is_written_into_is_noticed(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    file = HeldFile(tmp_path / "file")
    with (tmp_path / "file").open("r+b") as stream:
        stream.write(b"x")
    os.utime(tmp_path / "file", ns=(1, 1))
    with pytest.raises(MismatchError, match="file was changed after it was opened"):
        file.check_unchanged()


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # a reader of which would wait for a writer
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(MismatchError, match=f"{name} is not a regular file"):
            HeldFile(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        HeldFile(tmp_path / "none")


def test_descriptors_are_given_back(tmp_path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    (tmp_path / "file").write_bytes(CONTENT)

    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    folder = HeldFolder(tmp_path)
    file = folder.file("file")
    file.map()
    folder.close()
    assert before < count() <= before + 2
    del folder, file
    assert count() == before


def test_files_of_a_folder_are_those_of_one_folder(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / file).write_text(name + file)
    (tmp_path / "old").rename(tmp_path / "served")
    folder = HeldFolder(tmp_path / "served")
    assert folder.file("a").read() == b"olda"
    (tmp_path / "served").rename(tmp_path / "gone")
    (tmp_path / "new").rename(tmp_path / "served")
    assert folder.file("b").read() == b"oldb"
    folder.close()
    with pytest.raises(MismatchError, match="opened without c"):
        folder.file("c")


def test_a_copy_of_a_graph_has_the_files_that_it_names(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"...data.bin...")
    (tmp_path / "data.bin").write_bytes(CONTENT)
    (tmp_path / "other.bin").write_bytes(CONTENT)
    folder = HeldFolder(tmp_path)
    for name in ("model.onnx", "data.bin", "other.bin"):
        folder.file(name)
    graph = folder.graph("model.onnx")
    assert graph.is_in_place
    (tmp_path / "data.bin").unlink()
    assert not graph.is_in_place
    with graph.copied() as copy:
        assert sorted(path.name for path in copy.parent.iterdir()) == ["data.bin", "model.onnx"]
        assert (copy.parent / "data.bin").read_bytes() == CONTENT
    assert not copy.exists()


def test_no_room_for_a_copy_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    graph = HeldFolder(tmp_path).graph("model.onnx")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HeldFile, "copy_to", full)
    with pytest.raises(TrimserveError, match=r"no room for a copy of it \(No space"), graph.copied():
        pass


class TestRemembered:
    """A hash is known again until the file, its place or the month is another."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
        monkeypatch.setattr(verified, "REMEMBER_FROM_BYTES", 10)
        return tmp_path / "cache" / "trimserve" / "verified"

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "weights").write_bytes(CONTENT)
        os.utime(tmp_path / "weights", ns=(10**18, 10**18))
        return tmp_path / "weights"

    @pytest.fixture
    def settled(self, monkeypatch):
        now = time.time() + 60
        monkeypatch.setattr(verified.time, "time", lambda: now)

    @pytest.mark.usefixtures("settled")
    def test_until_it_is_written_to(self, path):
        assert not verified.is_remembered(HeldFile(path), "a")
        verified.remember(HeldFile(path), "a")
        assert verified.is_remembered(HeldFile(path), "a")
        assert not verified.is_remembered(HeldFile(path), "b")
        with path.open("r+b") as stream:
            stream.write(b"x")
        os.utime(path, ns=(10**18, 10**18))  # the time of change is set back, that of the inode is not
        assert not verified.is_remembered(HeldFile(path), "a")

    @pytest.mark.usefixtures("settled")
    def test_not_another_file_of_the_same_size(self, path):
        verified.remember(HeldFile(path), "a")
        path.rename(path.with_name("old"))
        path.write_bytes(CONTENT[::-1])
        os.utime(path, ns=(10**18, 10**18))
        assert not verified.is_remembered(HeldFile(path), "a")

    @pytest.mark.usefixtures("settled")
    def test_for_a_month(self, path, cache):
        verified.remember(HeldFile(path), "a")
        (note,) = cache.iterdir()
        old = time.time() - 31 * 86_400
        os.utime(note, (old, old))
        assert not verified.is_remembered(HeldFile(path), "a")

    def test_not_where_it_was_just_written(self, path, cache):
        verified.remember(HeldFile(path), "a")
        assert not cache.exists()

    @pytest.mark.usefixtures("settled")
    def test_not_where_others_can_write_notes(self, path, cache):
        verified.remember(HeldFile(path), "a")
        cache.chmod(0o777)
        assert not verified.is_remembered(HeldFile(path), "a")

    @pytest.mark.usefixtures("settled")
    def test_a_home_that_cannot_be_written_is_no_fault(self, path, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        verified.remember(HeldFile(path), "a")
        assert not verified.is_remembered(HeldFile(path), "a")

    @pytest.mark.usefixtures("settled")
    def test_notes_do_not_grow_without_end(self, path, cache, monkeypatch):
        monkeypatch.setattr(verified, "_MOST_ENTRIES", 8)
        for number in range(30):
            verified.remember(HeldFile(path), str(number))
        assert len(list(cache.iterdir())) <= 9
