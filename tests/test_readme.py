"""README.md says what was measured and what exists."""

import re
from pathlib import Path

import pytest

from trimserve.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_first_screen_has_the_measured_table():
    assert "<!-- measured: encoder -->" in TEXT.split("\n## ", 1)[0]


def test_first_screen_has_at_most_forty_lines():
    first_screen = TEXT.split("\n## ", 1)[0]
    assert len(first_screen.splitlines()) <= 40


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described(command):
    assert re.search(rf"trimserve {command}\b", TEXT)


def test_linked_files_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.export
def test_python_example_runs_as_printed(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from tests.support.models import save_model

    monkeypatch.chdir(tmp_path)
    model = save_model("bert_encoder", tmp_path / "model")
    Path("tickets.txt").write_text("the cat sat on the mat\n", "utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT.split("\n## ", 1)[0], re.DOTALL)
    names: dict = {}
    exec(code.replace("sentence-transformers/all-MiniLM-L6-v2", str(model)), names)
    assert names["embeddings"].shape == (2, 16)
