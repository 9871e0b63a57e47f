"""Disks that fill up: by every change that a command makes, and a small one that is really full."""

import os
import shutil
import signal
import subprocess

import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from tests.support.counting import Counter
from tests.support.writers import NAMES

pytestmark = [pytest.mark.export, pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX processes")]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("name", NAMES)
def test_full_from_any_change_on(faults, name, step):
    faults.counter = Counter(f"full disks during {name}", "none")
    changes = faults.whole(faults.writers[name]).changes
    moments = sorted({*range(1, changes - 6, step), *range(max(1, changes - 6), changes + 1)})
    for moment in moments:
        faults.fill(faults.writers[name], {"full": moment})
    faults.counter.check()


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("only root mounts a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_small_disk(faults, small_disk, name):
    """From full to room enough, a page at a time."""
    writer = faults.writers[name]
    outcomes = Counter(f"small disks under {name}", "none")
    for pages in range(0, 20, 2):
        work = writer.fresh(small_disk / "work")
        before = writer.state(work) if (work / writer.output).exists() else "absent"
        disk = os.statvfs(small_disk)
        (small_disk / "fill").write_bytes(bytes(max(0, disk.f_bavail - pages) * disk.f_bsize))
        done = faults.zygote.run(work, *writer.argv(work))
        state = writer.state(work)
        (small_disk / "fill").unlink()
        outcomes.add(f"ended with {done.code} and left {state}")
        assert "Traceback" not in done.stderr, done
        assert (done.code, state) in (
            (0, "new"),
            (1, before),
            (0, before) if name == "verify" else (0, "new"),
        ), done
        assert [path for path in small_disk.rglob("*") if ".trimserve." in path.name] == []
    assert any(outcome.startswith("ended with 0 ") for outcome in outcomes.kinds)
    outcomes.check()
