"""bench.quantize: a model whose package is not there is left out in one line."""

import importlib.util

import pytest

pytest.importorskip("torch")

from bench.quantize import run

pytestmark = pytest.mark.export


def test_without_the_packages_every_model_is_left_out_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["bench.quantize", "--quick"])
    assert run.main() == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if "left out: pip install" in line] == said
    assert len(said) == 2
