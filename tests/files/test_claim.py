"""Places that one process holds at a time, and what dead ones leave there."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trimserve.errors import UsageError
from trimserve.files import claim as module
from trimserve.files.atomic import atomic_path, check_place, replace_in_order
from trimserve.files.claim import BusyError, claim, hidden_prefix
from trimserve.files.owner import Owner
from trimserve.files.scratch import scratch_folder

HOLD = """
import sys
from pathlib import Path
from trimserve.files.claim import claim
with claim(Path(sys.argv[1])) as held:
    held.path("part").mkdir()
    (held.path("part") / "weights").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(target, code=HOLD):
    """Another process that holds a place and has begun to write."""
    command = [sys.executable, "-c", code, str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.communicate()


def test_a_living_process_is_named_and_left_alone(tmp_path):
    process = holder(tmp_path / "out")
    try:
        busy = pytest.raises(BusyError, match=f"process {process.pid} is writing")
        with busy, claim(tmp_path / "out", wait=0):
            pytest.fail("held twice")
        assert (tmp_path / ".out.trimserve.part" / "weights").exists()
        with claim(tmp_path / "other"):
            pass
    finally:
        end(process)


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_dead_process_left_is_named_and_removed(tmp_path, caplog, monkeypatch, locks):
    process = holder(tmp_path / "out")
    if not locks:  # a file system without them: the process is looked up
        monkeypatch.setattr(module, "_lock", lambda _: None)
        with pytest.raises(BusyError, match=str(process.pid)), claim(tmp_path / "out", wait=0):
            pytest.fail("held twice")
    end(process)
    with caplog.at_level(logging.WARNING), claim(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.trimserve.owner"]
    assert f"process {process.pid}, which ended before it was done, left .out.trimserve.part" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_not_taken_for_alive(tmp_path, monkeypatch):
    owner = Owner.this()
    assert owner.runs
    assert not dataclasses.replace(owner, started="1").runs  # this number, but not this process
    assert not dataclasses.replace(owner, boot="another start", host=owner.host).runs
    monkeypatch.setattr(module, "_lock", lambda _: None)
    (tmp_path / ".out.trimserve.owner").write_bytes(dataclasses.replace(owner, started="1").to_bytes())
    with claim(tmp_path / "out", wait=0):
        pass


def test_another_machine_is_neither_alive_nor_dead(tmp_path):
    owner = dataclasses.replace(Owner.this(), host="far-away", boot="another")
    file = tmp_path / ".out.trimserve.owner"
    file.write_bytes(owner.to_bytes())
    (tmp_path / ".out.trimserve.part").mkdir()
    with pytest.raises(BusyError, match=r"on far-away was writing .*remove .*owner"), claim(tmp_path / "out"):
        pytest.fail("taken")
    assert len(list(tmp_path.iterdir())) == 2
    file.unlink()
    with claim(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"\xff" * 9, b"[" * 9999, b"null"])
def test_an_owner_file_that_says_nothing_is_nobodys(tmp_path, content):
    (tmp_path / ".out.trimserve.owner").write_bytes(content)
    with claim(tmp_path / "out", wait=0):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../mine", "/mine", "..", ".", "", "a/../../mine"])
def test_names_in_an_owner_file_lead_nowhere(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("kept")
    fields = dataclasses.asdict(Owner.this()) | {"moving": [name, "last"]}
    (tmp_path / "out" / ".out.trimserve.owner").write_text(json.dumps(fields))
    with claim(tmp_path / "out", tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_threads_take_turns(tmp_path):
    """Each of them sees its own file: none is removed by another that thinks it dead."""
    path, problems = tmp_path / "p", []

    def work(number):
        try:
            for turn in range(25):
                with atomic_path(path) as temporary:
                    temporary.write_text(f"{number} {turn} " * 99)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert len(set(path.read_text().split(" "))) <= 3
    assert [found.name for found in tmp_path.iterdir()] == ["p"]


def test_long_names_have_short_ones_beside_them():
    long = hidden_prefix(Path("ü" * 127))
    assert len(os.fsencode(long)) < 200
    assert long != hidden_prefix(Path("ü" * 126 + "x"))


SCRATCH = """
import sys
from pathlib import Path
from trimserve.files.scratch import scratch_folder
with scratch_folder("full", Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_scratch_folders_of_dead_processes_go(tmp_path):
    started = [holder(tmp_path, SCRATCH) for _ in range(2)]
    end(started[0])
    try:
        with scratch_folder("full", tmp_path) as mine:
            assert mine.is_dir()
            assert len(list(tmp_path.iterdir())) == 4  # mine, the living one's, and an owner each
    finally:
        end(started[1])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="root becomes another user")
def test_a_folder_that_may_not_be_written_is_said_before_the_work(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            check_place(tmp_path / "p")
        except UsageError as error:
            os._exit(0 if "Permission denied" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_files_are_replaced_in_order_and_nothing_is_when_one_cannot_be_staged(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    replace_in_order(tmp_path, [("a", b"1"), ("b", b"2"), ("a", b"3")])
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("3", "2")
    real = os.fsync
    calls = []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="full"):
        replace_in_order(tmp_path, [("a", b"x"), ("b", b"y")])
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("a", "3"), ("b", "2")]


def test_a_library_leaves_signals_alone():
    code = (
        "import signal; from trimserve.cli.main import main; main(['--version']);"
        "print(signal.getsignal(signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(signal.SIG_DFL)
