"""Counting a stream holds no more memory for a longer one."""

import json
import subprocess
import sys

import pytest

from tests.support.tiny_tokenizers import TEXT

_RUN = """
import json, sys
from trimserve.cli.main import main
from trimserve.process import memory
code = main(sys.argv[1:])
print(json.dumps(memory().peak))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="reads VmHWM",
)
def test_memory_does_not_grow_with_the_stream(tmp_path, model_folders):
    def peak(megabytes):
        block = (TEXT * 200).encode()
        command = [sys.executable, "-c", _RUN, "profile", "-", "-m", str(model_folders["byte_level_bpe"])]
        command += ["-o", str(tmp_path / "p.safetensors"), "--format", "json"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
            for _ in range(megabytes * 1_000_000 // len(block)):
                running.stdin.write(block)
            out, _ = running.communicate()
        assert running.returncode == 0
        counted, peak_bytes = map(json.loads, out.splitlines())
        assert counted["bytes"] > 0.98e6 * megabytes
        return peak_bytes

    short, long = peak(24), peak(96)
    assert long < 500e6
    assert long - short < 40e6  # of 72 MB more text
