"""A test without the mark realdata cannot reach the real data, however it tries."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench.machine import ROOT
from bench.realdata import data_folder
from tests.support.realdata import HIDDEN, unmarked

ASK = "from bench import harness; print(harness.data_folder())"


def found_by_a_process() -> str:
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_unmarked_test_finds_nothing():
    assert data_folder() == HIDDEN
    assert found_by_a_process() == str(HIDDEN)
    assert not HIDDEN.exists()


@pytest.fixture(scope="module")
def folder_of_a_fixture():
    return data_folder()


@pytest.mark.realdata
def test_a_marked_test_finds_it(data_dir, folder_of_a_fixture):
    assert data_dir == data_folder() == folder_of_a_fixture != HIDDEN
    assert found_by_a_process() == str(data_dir)


def test_asking_for_it_without_the_mark_is_refused():
    def item(name: str, *marks: str, fixtures: tuple[str, ...] = ("tmp_path", "data_dir")):
        marker = {mark: mark for mark in marks}.get
        return SimpleNamespace(nodeid=name, fixturenames=fixtures, get_closest_marker=marker)

    items = [item("a"), item("b", "realdata"), item("c", "slow"), item("d", fixtures=("tmp_path",))]
    assert unmarked(items) == ["a", "c"]


def test_there_is_one_finder():
    """No other module names the variable or the folder in its code."""
    names = re.compile(r"[\"'](TRIMSERVE_DATA[\"']|shared[\"'] /|.*/shared/data)")
    files = [
        path
        for folder in ("bench", "examples", "export", "tests", "trimserve")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = [path.relative_to(ROOT).as_posix() for path in files if names.search(path.read_text("utf-8"))]
    assert sorted(found) == ["bench/realdata.py", "tests/bench/test_realdata.py"]
