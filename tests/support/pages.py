"""The pages of the documentation, and the code in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a page says a shell runs, and not what a program prints.
_SHELLS = ("", "bash", "console", "sh")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.number}"


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.findall(page.read_text("utf-8"))
    return [Block(page, number, *block) for number, block in enumerate(found)]


def python_blocks(*pages: Path) -> list[Block]:
    return [block for page in pages for block in blocks(page) if block.language == "python"]


def commands(*pages: Path) -> list[tuple[str, list[str]]]:
    """The `trimserve` lines of pages: where each stands, and its words without the program's name."""
    return [
        (block.name, shlex.split(line, comments=True)[1:])
        for page in pages
        for block in blocks(page)
        if block.language in _SHELLS
        for line in block.text.replace("\\\n", " ").splitlines()
        if re.match(r"trimserve \S", line)  # a diagram has more spaces
    ]
