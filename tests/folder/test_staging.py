import contextlib
import errno
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from trimserve.errors import UsageError
from trimserve.folder.staging import check_target, staged_folder


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


KILLED = """
import os, signal, sys
from pathlib import Path
import trimserve.folder.staging as staging
if sys.argv[2] == "no exchange":
    staging.exchange = lambda *_: False
seen = 0
def hook(event, args):
    global seen
    if event in ("os.rename", "trimserve.exchange") and os.path.dirname(sys.argv[1]) in str(args[0]):
        seen += 1
        if seen == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with staging.staged_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "trimserve.json").write_text("new")
    (folder / "a").write_text("new")
"""


def killed(target, way, at):
    command = [sys.executable, "-c", KILLED, str(target), way, str(at)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_kill_between_two_renames_is_put_right_by_the_next_run(tmp_path, caplog):
    target = tmp_path / "out"
    write(target, "old")
    assert killed(target, "no exchange", 2) == -9
    assert not target.exists()
    with pytest.raises(UsageError, match="not empty"), caplog.at_level(logging.WARNING):
        check_target(target, overwrite=False)  # this run changes nothing, and yet
    assert (target / "trimserve.json").read_text() == "old"
    assert "the folder is back in its place" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert killed(target, "no exchange", 3) == 0
    assert (target / "trimserve.json").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_an_exchange_leaves_no_moment_without_a_target(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    assert killed(target, "exchange", 1) == -9
    assert (target / "trimserve.json").read_text() == "old"
    assert killed(target, "exchange", 2) == 0  # there is no second step
    assert (target / "trimserve.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def mounted(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("only root mounts")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_mount_point_is_written_into_and_not_replaced(mounted):
    (mounted / "lost+found").mkdir()
    for at in (1, 2):  # killed after none and one of two files were moved
        assert killed(mounted, "exchange", at) == -9
    write(mounted, "first")
    assert sorted(path.name for path in mounted.iterdir()) == ["lost+found", "trimserve.json"]
    with pytest.raises(UsageError, match="is a mount point"):
        write(mounted, "second", overwrite=True)
    write(mounted / "inner", "third")
    assert (mounted / "trimserve.json").read_text() == "first"


def test_two_writers_of_one_folder(tmp_path):
    """The second is told at once; what the first makes is not mixed with anything."""
    with staged_folder(tmp_path / "out") as staging:
        (staging / "trimserve.json").write_text("first")
        with pytest.raises(UsageError, match=f"process {os.getpid()} is writing"):
            check_target(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "trimserve.json").read_text() == "first"


@pytest.mark.parametrize("name", ["file/out", "file/a/b", "x" * 256, "loop", "nul\0"])
def test_impossible_places_are_said_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError):
        check_target(tmp_path / name, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_links_and_long_names(tmp_path):
    (tmp_path / "link").symlink_to("real")
    for overwrite in (False, True):
        write(tmp_path / "link", overwrite=overwrite)
    write(tmp_path / ("ü" * 127))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "trimserve.json").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_folders_above_go_again_if_nothing_comes_into_them(tmp_path):
    def fail():
        with staged_folder(tmp_path / "a" / "b" / "out"):
            raise RuntimeError

    check_target(tmp_path / "a" / "b" / "out", overwrite=False)
    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_library_keeps_its_words(tmp_path):
    def fail(error):
        with staged_folder(tmp_path / "out"):
            raise error

    with pytest.raises(OSError, match=r"^no such file in the model$"):
        fail(OSError("no such file in the model"))
    staged = f"{tmp_path}/.out.trimserve.part/tokenizer.json"
    with pytest.raises(OSError, match="full") as caught:
        fail(OSError(errno.ENOSPC, "full", "/models/tokenizer.json", None, staged))
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "out"), None)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="root becomes another user")
def test_a_folder_of_ours_in_one_of_others_is_written_into(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    os.chown(target, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(
            (tmp_path.name, "pytest-", "popen-")
        ):
            folder.chmod(0o755)
    write(tmp_path / "first")  # imports what the other user may not be able to read
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            write(target)
            with contextlib.suppress(UsageError):
                write(target, overwrite=True)
                os._exit(3)
            with contextlib.suppress(UsageError):
                write(tmp_path / "other")
                os._exit(4)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [path.name for path in target.iterdir()] == ["trimserve.json"]
