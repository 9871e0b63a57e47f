"""`--device cuda` of the benchmarks: an onnxruntime that says it has CUDA, a stand-in for the driver."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("ml_dtypes")

from bench import arena, harness, machine, scale, serving, suite
from bench.decode import run as decode
from bench.encoder import grid as encoder_grid


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """An nvidia-smi that counts 512 MiB for this process."""
    if sys.platform == "win32":
        pytest.skip("makes a script with a shebang")
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"apps = '41, 100\\n{os.getpid()}, 512'\n"
        "print(apps if 'compute-apps' in sys.argv[1] else 'Some GPU, 555.1, 80 MiB')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def started(monkeypatch):
    """The command lines of the processes that a benchmark starts; none is."""
    commands = []

    def fresh_process(words, **_):
        commands.append(list(words))
        return {"1": 1.0}

    monkeypatch.setattr(harness, "Worker", lambda words, **_: commands.append(list(words)))
    monkeypatch.setattr(harness, "fresh_process", fresh_process)
    return commands


def test_every_process_is_told_the_device(started, monkeypatch, tmp_path):
    args = harness.parser("some", rounds=1).parse_args(["--device", "cuda", "--threads", "3"])
    encoder_grid._worker(tmp_path, args)
    decode.Case("m", None, {"full": tmp_path}, ["a"], 4, 1.0, 3, args.device).start("full")
    harness.Worker(serving._command(str(tmp_path), args))
    arena.arena_bytes(tmp_path, {}, device=args.device, threads=3)
    monkeypatch.setattr(scale, "make_heads", lambda *_: tmp_path)
    heads = SimpleNamespace(widths=[8], rows=[4096], threads=3, device=args.device, seconds=0.1)
    scale.heads(heads, tmp_path)
    assert len(started) == 5
    for words in started:
        assert words[words.index("--device") + 1] == "cuda", words
        assert words[words.index("--threads") + 1] == "3", words


def test_the_suite_runs_what_takes_a_device_there():
    args = SimpleNamespace(quick=False, device="cuda", only=None)
    entries = suite.chosen(args)
    assert [entry.module for entry in entries] == ["encoder.grid", "decode", "serving", "scale"]
    words = suite.command(entries[0], quick=False, device="cuda")
    assert words[-2:] == ["--device", "cuda"]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("device", "expected"), [("cuda", 512 << 20), ("cpu", None)])
def test_serving_counts_the_drivers_memory_of_its_process(device, expected, monkeypatch, tmp_path, capsys):
    asked = {}

    class Model:
        def generate(self, prompts, **_):
            return [SimpleNamespace(ids=(1, 2)) for _ in prompts]

    def load(folder, **options):
        asked.update(options, folder=folder)
        return Model()

    monkeypatch.setattr(serving, "Generator", Model)
    monkeypatch.setattr(serving, "load", load)
    request = json.dumps({"prompts": ["a"], "tokens": 2, "mode": "compact"})
    monkeypatch.setattr("sys.stdin", io.StringIO(request + "\n"))
    serving.worker(tmp_path, device, 3)
    assert asked == {"folder": tmp_path, "device": device, "threads": 3}
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["device_bytes"] == expected
    assert answer["ids"] == [[1, 2]]


def test_tables_show_device_memory_and_arenas():
    def each(value):
        return dict.fromkeys(serving.VARIANTS, value)

    cell = {
        "batch": 1,
        "prompt": 64,
        "first_ms": each({"median": 1.0}),
        "ms": each({"median": 1.0}),
        "time_ratio": each({"value": 0.5}),
        "memory": each({"anonymous": 10**6}),
        "device_bytes": each(2 * 10**9),
    }
    held = {"CUDAExecutionProvider": 3 * 10**9, "CPUExecutionProvider": 10**6}
    line = serving.lines({"cells": [cell], "arena_bytes": each(held)})[0]
    assert line[-2:] == ("2 GB", "CPU 1 MB, CUDA 3 GB")


def test_products_are_timed_on_the_device(monkeypatch, tmp_path):
    asked = []

    class Session:
        def get_inputs(self):
            return [SimpleNamespace(shape=["states", 8])]

        def run(self, *_):
            return None

    def open_session(_, **options):
        asked.append(options["device"])
        return Session()

    monkeypatch.setattr(scale, "open_session", open_session)
    assert set(scale.time_heads(tmp_path, (1, 4), 3, "cuda", 0.0)) == {1, 4}
    assert asked == ["cuda", "cuda"]


@pytest.mark.usefixtures("driver")
def test_rows_name_the_device_and_the_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "SCRATCH", tmp_path)
    monkeypatch.setattr(machine, "_git_revision", lambda: "some")
    harness.save_row("some", {}, quick=True, device="cuda")
    row = harness.last_row("some", tmp_path)
    assert row["device"] == "cuda"
    assert row["gpu"]["driver_version"] == "555.1"
