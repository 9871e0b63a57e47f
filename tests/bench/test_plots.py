"""Figures show the rows that the result files hold."""

import json
import sys

import pytest

from bench import harness, plot, readme
from bench.tables import figures

SVGS = sorted(plot.FOLDER.glob("*.svg"))


@pytest.mark.parametrize("svg", SVGS, ids=lambda svg: svg.stem)
def test_figures_were_drawn_from_the_newest_rows(svg):
    name = svg.stem.rpartition("-")[0]
    expected = plot.digest(plot.rows_of(plot.FIGURES[name]))
    assert plot.drawn_from(svg) == expected, "run: python -m bench.plot"


def test_figures_on_pages_have_their_files():
    shown = [
        (page, name)
        for page in readme.PAGES
        for kind, name in readme.MARKERS.findall(page.read_text("utf-8"))
        if kind == "plot"
    ]
    assert shown
    for name in {name for _, name in shown} & set(plot.measured()):
        for theme in figures.THEMES:
            assert (plot.FOLDER / f"{name}-{theme.name}.svg").exists(), "run: python -m bench.plot"


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
