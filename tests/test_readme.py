"""README.md says what was measured and what exists."""

import re
from pathlib import Path

import pytest

from bench import readme
from trimserve.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_measured_tables_equal_the_result_files():
    assert "<!-- measured: encoder -->" in TEXT
    assert readme.render(TEXT) == TEXT, "run: python -m bench.readme"


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
