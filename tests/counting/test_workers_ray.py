"""Counting on a real Ray cluster of this machine."""

import json
import os
import signal

import numpy as np
import pytest

from trimserve.corpus import slices
from trimserve.counting.sums import Sums
from trimserve.errors import UsageError
from trimserve.profiles.profiling import profile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Two workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def write_corpus(folder, rows):
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"t": f"the cat {i % 97} sat on the mat.\nA dog é {i}"}) + "\n" for i in range(rows)
        )
    )
    (folder / "long.txt").write_text("One line of a long text\nand a further one 日本.\n" * 400, "utf-8")


@pytest.mark.usefixtures("cluster")
def test_a_cluster_counts_like_one_machine_though_a_worker_dies(tmp_path, model_folders, monkeypatch):
    write_corpus(tmp_path, 30_000)
    monkeypatch.setattr(slices, "SLICE_BYTES", 20_000)
    model = model_folders["byte_level_bpe"]
    expected = profile(tmp_path, model, text_column="t", progress=False)
    added, killed = [], []
    add = Sums.add

    def adding(self, number, *block):
        add(self, number, *block)
        added.append(number)
        if not killed:
            killed.append(counting_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Sums, "add", adding)
    found = profile(tmp_path, model, text_column="t", engine="ray", workers=2, progress=False)
    assert len(killed) == 1
    assert sorted(added) == list(range(len(added)))  # each slice once
    assert len(added) > 60
    for name in ("counts", "document_counts", "texts", "characters", "beyond_rows"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert sorted(map(str, found.sources)) == sorted(map(str, expected.sources))


@pytest.mark.usefixtures("cluster")
def test_an_unreadable_row_on_the_cluster_names_its_line(tmp_path, model_folders):
    (tmp_path / "rows.jsonl").write_text('{"t": "a"}\n{\n')
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 2: broken JSON"):
        profile(tmp_path, model_folders["byte_level_bpe"], text_column="t", engine="ray", progress=False)


def counting_workers():
    """Process ids of the cluster's actors that count."""
    import psutil

    names = ((process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [
        pid for pid, line in names if line and line[0].startswith("ray::") and "CountSlice" in " ".join(line)
    ]
