"""README.md's first screen: short, true, and the same address everywhere."""

import re
import tomllib

from tests.support.pages import README, ROOT, commands
from trimserve.cli.main import COMMANDS

TEXT = README.read_text("utf-8")
FIRST_SCREEN = TEXT.split("\n## ", 1)[0]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def tables(text):
    """Tables of a page: runs of lines that begin with a bar."""
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def test_it_is_short():
    assert len(TEXT.split()) <= 1_200
    assert len(tables(TEXT)) <= 3


def test_the_first_screen_has_one_measured_table_and_what_a_newcomer_copies():
    assert "<!-- measured: first_screen -->" in FIRST_SCREEN
    assert len(tables(FIRST_SCREEN)) == 1
    assert "When not to use it" in FIRST_SCREEN
    assert len(FIRST_SCREEN.splitlines()) <= 72
    found = [words[0] for _, words in commands(README)]
    assert found == ["export", "run", "export", "chat", "serve"]
    # From a clone to hits, and to a chat, in five lines each.
    for block in re.findall(r"```\w*\n(.*?)```", FIRST_SCREEN, re.DOTALL):
        assert len([line for line in block.splitlines() if line and "import" not in line]) <= 5


def test_the_address_stands_once_and_is_the_projects():
    repository = PROJECT["urls"]["Repository"]
    assert TEXT.count(repository) == 1
    assert f"@ git+{repository}" in TEXT
    extras = re.search(r"trimserve\[([\w,]+)\] @", TEXT)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_linked_files_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_commands_that_are_named_exist():
    named = set(re.findall(r"`trimserve (\w+)", TEXT)) - {"COMMAND"}
    assert {"profile", "select", "report", "verify", "inspect"} <= named <= set(COMMANDS)
