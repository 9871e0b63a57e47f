"""Figures show the rows that the result files hold."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from bench import harness, plot, readme
from bench.tables import figures


def check(module, monkeypatch, capsys) -> tuple[int, str]:
    """What `make lint` sees: the status and what is said."""
    monkeypatch.setattr("sys.argv", [module.__name__, "--check"])
    return module.main(), capsys.readouterr().err


def test_a_figure_of_other_rows_or_none_is_named(monkeypatch, capsys, tmp_path):
    assert check(plot, monkeypatch, capsys) == (0, "")  # the tree's own figures
    folder = Path(shutil.copytree(plot.FOLDER, tmp_path / "plots"))
    monkeypatch.setattr(plot, "FOLDER", folder)
    changed, missing = folder / "decode-dark.svg", folder / "scale-light.svg"
    changed.write_text(changed.read_text("utf-8").replace("rows sha256 ", "rows sha256 0"), "utf-8")
    missing.unlink()
    status, said = check(plot, monkeypatch, capsys)
    assert (status, plot.stale()) == (1, [changed, missing])
    assert str(changed) in said
    assert "make plots" in said


def test_a_page_of_other_numbers_is_named(monkeypatch, capsys, tmp_path):
    assert check(readme, monkeypatch, capsys) == (0, "")  # the tree's own pages
    page = tmp_path / "page.md"
    monkeypatch.setattr(readme, "PAGES", (page,))
    page.write_text("<!-- measured: startup -->\n| 7 |\n<!-- end -->\n", "utf-8")
    status, said = check(readme, monkeypatch, capsys)
    assert (status, readme.stale()) == (1, [page])
    assert "make plots" in said
    monkeypatch.setattr("sys.argv", ["readme"])
    assert readme.main() == 0
    assert readme.stale() == []


def test_a_changed_number_changes_the_hash_and_raw_samples_do_not(tmp_path):
    row = json.loads((harness.RESULTS / "decode.jsonl").read_text("utf-8").splitlines()[-1])
    digests = []
    for change in ({}, {"token_ms_samples": {}}, {"vocab_size": 1}):
        (tmp_path / "decode.jsonl").write_text(json.dumps(row | change) + "\n", "utf-8")
        digests.append(plot.digest(plot.rows_of(plot.FIGURES["decode"], tmp_path)))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", plot.measured())
def test_every_measured_figure_can_be_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    svg = tmp_path / f"{name}-dark.svg"
    plot.draw(name, figures.DARK, svg)
    assert plot.drawn_from(svg) == plot.digest(plot.rows_of(plot.FIGURES[name]))
    assert figures.DARK.text in svg.read_text("utf-8")


def test_without_matplotlib_the_pip_command_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("sys.argv", ["plot", "decode"])
    assert plot.main() == 1
    assert "pip install 'trimserve[bench]'" in capsys.readouterr().err
