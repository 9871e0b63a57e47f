import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness


def test_ratio_of_equal_samples_is_one_and_interval_holds_the_value():
    same = harness.ratio([2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    noisy = harness.ratio([4.0, 4.4, 3.8, 4.1, 4.0], [2.0, 2.1, 1.9, 2.2, 2.0])
    assert noisy.low <= noisy.value <= noisy.high
    assert noisy.value == pytest.approx(2.0)


def test_slow_rounds_cancel_in_a_paired_ratio():
    slowness = [1.0, 3.0, 2.0, 9.0, 5.0]
    found = harness.paired_ratio([0.9 * factor for factor in slowness], slowness)
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_spread_orders_its_percentiles():
    values = harness.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (values.median, values.count) == (3.0, 5)
    assert values.p5 < values.median < values.p95


def test_memory_sees_an_array_that_was_touched():
    if sys.platform != "linux":
        pytest.importorskip("psutil")
    before = harness.memory()
    touched = bytearray(b"x" * (64 << 20))
    after = harness.memory()
    assert after.resident - before.resident > 0.9 * len(touched)
    if sys.platform == "linux":
        assert after.anonymous is not None
        assert before.anonymous is not None
        assert after.anonymous - before.anonymous > 0.9 * len(touched)


def test_in_turn_reverses_the_order_every_round(capsys):
    variants = {name: ["-c", f"print('noise'); print('{{\"name\": \"{name}\"}}')"] for name in "ab"}
    results = harness.in_turn(variants, 2)
    assert results == {"a": [{"name": "a"}] * 2, "b": [{"name": "b"}] * 2}
    started = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert started == ["a", "b", "b", "a"]


ECHO = (
    "import sys; print('{\"ready\": 1}', flush=True)\nfor line in sys.stdin: print(line.strip(), flush=True)"
)


def test_workers_answer_in_turn():
    with harness.Worker(["-c", ECHO]) as first, harness.Worker(["-c", ECHO]) as second:
        assert first.ready == second.ready == {"ready": 1}
        answers = harness.alternately({"a": first, "b": second}, '{"ms": 2}', 3)
    assert answers == {"a": [{"ms": 2}] * 3, "b": [{"ms": 2}] * 3}


def test_worker_that_ends_early_is_an_error_after_its_own_message(capfd):
    with pytest.raises(RuntimeError, match="exit code 1"):
        harness.Worker(["-c", "raise SystemExit('not today')"])
    assert "not today" in capfd.readouterr().err


def test_failing_process_is_an_error_with_its_message():
    with pytest.raises(RuntimeError, match="no such luck"):
        harness.fresh_process(["-c", "raise SystemExit('no such luck')"])


def test_rows_carry_their_circumstances(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "SCRATCH", tmp_path)
    harness.save_row("some", {"ms": 1.5}, quick=True)
    harness.save_row("some", {"ms": 2.5}, quick=True)
    row = harness.last_row("some", tmp_path)
    assert row["ms"] == 2.5
    assert {"date", "git", "hardware", "cpu", "versions", "schema_version"} <= row.keys()
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 2
    assert json.dumps(row)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells VmHWM")
def test_the_peak_is_this_process_own_and_not_that_of_its_parent():
    child = "from trimserve.process import peak_resident; print(peak_resident())"
    parent = (
        "import subprocess, sys; held = b'x' * (300 << 20); "
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 5 << 20 < int(done.stdout) < 250 << 20
