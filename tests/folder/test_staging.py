import errno
import os
from pathlib import Path

import pytest

from trimserve.errors import UsageError
from trimserve.folder.staging import staged_folder


def write(target, text="new", **options):
    with staged_folder(target, **options) as staging:
        (staging / "trimserve.json").write_text(text)


def test_staged_folder_appears_as_a_whole(tmp_path):
    write(tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "trimserve.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert (tmp_path / "empty" / "trimserve.json").exists()


def test_current_folder_can_be_the_target(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write(Path())
    assert (here / "trimserve.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_targets_that_are_not_ours_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="is not empty"):
        write(tmp_path / "full")
    with pytest.raises(UsageError, match="not made by trimserve"):
        write(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"

    def write_slowly():
        with staged_folder(target):
            target.mkdir()
            (target / "theirs").write_text("kept")

    with pytest.raises(UsageError, match="not empty"):
        write_slowly()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "theirs").read_text() == "kept"


def test_overwrite_replaces_a_folder_of_ours(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="--overwrite"):
        write(tmp_path / "out")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "trimserve.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space")])
def test_a_failure_half_way_leaves_what_was_there(tmp_path, error):
    write(tmp_path / "out", "old")

    def fail(target):
        with staged_folder(target, overwrite=True) as staging:
            (staging / "half").write_text("x")
            raise error

    for name in ("fresh", "out"):
        with pytest.raises(type(error)):
            fail(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "trimserve.json").read_text() == "old"
    if isinstance(error, OSError):  # a full disk has no file name of its own
        assert error.filename.endswith("fresh")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_swapping_puts_the_old_folder_back(tmp_path, monkeypatch, error):
    write(tmp_path / "out", "old")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".part"):
            raise error
        rename(source, target)

    monkeypatch.setattr(Path, "rename", lambda self, target: failing(self, target))
    monkeypatch.setattr("trimserve.folder.staging.exchange", lambda *_: False)
    with pytest.raises(error):
        write(tmp_path / "out", "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "trimserve.json").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
