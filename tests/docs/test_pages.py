"""Every command in the docs is one that the program takes, and the code of the guides runs as printed."""

import builtins
import csv
import io
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.pages import PAGES, README, ROOT, commands, python_blocks
from trimserve.cli.main import COMMANDS, _parse, main

GUIDES = [
    *(README, *sorted((ROOT / "docs" / "start").glob("*.md"))),
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *sorted((ROOT / "docs" / "concepts").glob("*.md")),
    ROOT / "docs" / "reference" / "errors.md",
]
ENCODER, CHAT = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
# Blocks that are not run here, and why.
NOT_RUN = {
    "docs/guides/langchain-llamaindex.md:1": "needs a server and langchain-openai",
    "docs/guides/fine-tune-small.md:1": "makes its own vocab: a test of its own below",
}


def test_every_command_of_every_page_is_one_that_the_program_takes(capsys):
    found = commands(*PAGES)
    assert len(found) > 60
    wrong = []
    for place, words in found:
        try:
            _parse(words)
        except SystemExit as stop:
            if stop.code:
                wrong.append((place, words, capsys.readouterr().err.splitlines()[-1]))
    assert wrong == []


def test_every_block_of_python_is_python():
    found = python_blocks(*PAGES)
    assert len(found) > 20
    for block in found:
        compile(block.text, block.name, "exec")


def test_a_command_that_the_program_does_not_take_is_seen(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```\ntrimserve report p.safetensors --unheard-of\n```\n")
    ((_, words),) = [(0, line.split()[1:]) for line in page.read_text().splitlines() if " report " in line]
    with pytest.raises(SystemExit):
        _parse(words)
    assert "--unheard-of" in capsys.readouterr().err


def test_the_reference_of_commands_is_what_argparse_says():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_pages
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = site_pages.commands()
    assert all(f"\n## trimserve {name}\n" in text for name in COMMANDS)
    assert "### trimserve finetune restore" in text
    assert "| `--fail-below` `C` | exit with 1" in text
    turned = site_pages.turned(
        "[a](docs/start/a.md#b) [b](examples/demo.py) [c](https://x.y)", "index.md", ""
    )
    assert turned == "[a](start/a.md#b) `b` [c](https://x.y)"
    assert site_pages.turned("[r](../../README.md)", "start/a.md", "docs/start") == "[r](../index.md)"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What the guides' commands have made: two trimmed folders of tiny models, beside the tickets."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime_genai")
    from tests.support.models import save_model
    from tests.support.served_models import KINDS

    place = tmp_path_factory.mktemp("desk")
    save_model("bert_encoder", place / ENCODER)
    (place / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "tickets.txt", place / "examples")
    shutil.move(KINDS["chat"].export(place / "made"), place / "smollm2-tickets")
    return place


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    return desk


@pytest.mark.export
def test_search_ends_in_hits(at_desk, capsys):
    """The commands of the first screen, as they are printed."""
    found = [words for place, words in commands(README) if place == "README.md:1"]
    assert [words[0] for words in found] == ["export", "run"]
    for words in found:
        assert main(words) == 0
    out = capsys.readouterr().out
    tickets = (at_desk / "examples" / "tickets.txt").read_text("utf-8").splitlines()
    hits = [line for line in out.splitlines() if any(line.startswith(ticket[:60]) for ticket in tickets)]
    assert len(hits) == 5


@pytest.mark.export
@pytest.mark.usefixtures("at_desk")
def test_a_chat_ends_in_an_answer(monkeypatch, capsys):
    (words,) = [words for place, words in commands(README) if words[0] == "chat"]
    assert words == ["chat", "smollm2-tickets"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is my refund?\n"))
    assert main([*words, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.export
@pytest.mark.parametrize(
    "block", [block for block in python_blocks(*GUIDES) if block.name not in NOT_RUN], ids=lambda b: b.name
)
def test_the_code_of_the_guides_runs_as_printed(block, at_desk, monkeypatch):
    if not (at_desk / "minilm-tickets").exists():
        words = [words for place, words in commands(README) if place == "README.md:1"]
        assert main(words[0]) == 0
    with (at_desk / "tickets.csv").open("w", newline="") as file:
        lines = (at_desk / "examples" / "tickets.txt").read_text("utf-8").splitlines()
        csv.writer(file).writerows([["text"], *([line] for line in lines)])
    for package in ("faiss", "langchain_core", "llama_index.core"):
        if f"from {package}" in block.text or f"import {package}" in block.text:
            pytest.importorskip(package)
    printed = []
    monkeypatch.setattr(builtins, "print", lambda *words, **_: printed.append(words))
    names: dict = {"__name__": "page"}
    exec(compile(block.text, block.name, "exec"), names)
    if "print(" in block.text:
        assert printed


@pytest.mark.export
@pytest.mark.usefixtures("at_desk")
def test_the_code_of_fine_tuning_runs_as_printed():
    (block,) = python_blocks(ROOT / "docs" / "guides" / "fine-tune-small.md")
    assert block.name in NOT_RUN
    shutil.copy("examples/tickets.txt", "train.txt")
    for words in (words for _, words in commands(block.page)):
        assert main(words) == 0
    exec(compile(block.text, block.name, "exec"), {})
    assert Path("tuned", "model.safetensors").stat().st_size > 0
