"""Freed memory goes back to the system, where the C library is one that keeps it."""

import ctypes
import subprocess
import sys

import pytest

# Blocks below glibc's threshold for maps of their own, freed below one that stays.
CODE = """
from trimserve.process import release_free_memory
from trimserve.process import memory

blocks = [bytearray(b"x" * 60_000) for _ in range(1000)]
last = blocks.pop()
blocks.clear()
before = memory().anonymous
release_free_memory()
print(before - memory().anonymous)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own counters")
def test_freed_blocks_go_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40e6


def test_other_systems_have_nothing_to_do(monkeypatch):
    from trimserve import process as heap

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)  # would fail if it were called
    heap.release_free_memory()
