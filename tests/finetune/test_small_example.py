"""examples/finetune_small.py: its methods have names, and a benchmark's row has what its runs gave."""

import pytest

pytest.importorskip("torch")

from bench.finetune.small import rows_of
from examples import finetune_methods, finetune_small

pytestmark = pytest.mark.export


def test_each_method_has_a_name_and_a_result_row():
    assert tuple(finetune_methods.METHODS) == finetune_small.METHODS
    run = {
        "method": "full",
        "rate": 2e-4,
        "trained": 2_000_000,
        "saved": 10**6,
        "peak": 3 * 10**6,
        "tests": 4,
    }
    runs = [
        run | {"seed": seed, "accuracy": seed / 4, "losses": [1.0, 0.5], "seconds": [9.0, 0.5]}
        for seed in (1, 2)
    ]
    (row,) = rows_of(runs, 32)
    assert (row["steps"], row["cpu_seconds"], row["accuracies"]) == (2, 0.5, [0.25, 0.5])
    (line,) = finetune_small.lines(runs)
    assert line == ("full", "2.00 M", "1 MB", "3 MB", "0.50", "37.5 ± 17.7")
