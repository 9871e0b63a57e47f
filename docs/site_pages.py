"""Pages of the site that are made when it is built (a hook of mkdocs, see mkdocs.yml).

The first page is README.md, the reference of commands is what argparse says, and pages of the repository that
lie beside docs/ come in with their links turned.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trimserve.cli.main import full_parser  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Page of the site -> file of the repository.
FROM_ROOT = {
    "index.md": "README.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(\]\(|src=\"|srcset=\")(?!https?:|#|mailto:)([^)\"#\s]+)")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / name).read_text("utf-8") for page, name in FROM_ROOT.items()}
    made = {page: turned(text, page, "") for page, text in made.items()} | {"reference/cli.md": commands()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:  # noqa: ARG001
    """Turn links that leave docs/ to the pages that are made, and take away those to code."""
    path = page.file.src_uri
    if path in FROM_ROOT:
        return markdown
    return turned(markdown, path, posixpath.join("docs", posixpath.dirname(path)))


def turned(text: str, page: str, folder: str) -> str:
    """A page's text with its links as the site has them.

    Args:
        text: Markdown.
        page: where it is in the site.
        folder: the folder of the repository that its links start from.
    """
    places = {name: place for place, name in FROM_ROOT.items()}
    here = posixpath.dirname(page)

    def place(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target.startswith("docs/"):
            found = target.removeprefix("docs/")
        elif target in places:
            found = places[target]
        else:
            return match[0]
        return match[1] + posixpath.relpath(found, here or ".")

    # A file of code has no page: its name stays, its link goes.
    text = re.sub(
        r"\[([^\]]+)\]\((?!https?:|#)([^)#]+\.(?:py|cff|toml)|[^)#]*examples/[^)#]*)\)",
        lambda match: f"`{match[1].strip('`')}`",
        text,
    )
    return _LINK.sub(place, text)


def commands() -> str:
    """The reference of the command line, from argparse."""
    parts = [
        "# Commands\n",
        "Results go to stdout, progress and messages to stderr; `--format json` makes stdout one JSON "
        "document. Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed. `-m/--model` takes a "
        "folder, a GGUF or ONNX file, or a hub id.\n",
    ]
    for name in _below(full_parser()):
        parts += _described(name, 2)
    return "\n".join(parts)


def _described(parser: argparse.ArgumentParser, level: int) -> list[str]:
    formatter = parser._get_formatter()
    formatter._width = 100
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    usage = formatter.format_help().strip()
    parts = [
        f"{'#' * level} {parser.prog}\n",
        f"{parser.description or ''}\n",
        f"```text\n{usage}\n```\n",
    ]
    rows = [
        f"| {_named(action)} | {_cell(parser, action)} |"
        for action in parser._actions
        if action.dest != "help" and not isinstance(action, argparse._SubParsersAction)
    ]
    if rows:
        parts.append("\n".join(["| argument | what it does |", "| --- | --- |", *rows]) + "\n")
    for parser_below in _below(parser):
        parts += _described(parser_below, level + 1)
    return parts


def _below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of subcommands."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [below for action in found for below in dict.fromkeys(action.choices.values())]


def _named(action: argparse.Action) -> str:
    value = action.metavar if action.metavar is not None else action.dest.upper()
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.choices is not None:
        value = ", ".join(map(str, action.choices))
    if not action.option_strings:
        return f"`{value}`"
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} `{value}`"


def _cell(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return text.replace("|", "\\|").replace("<", "&lt;")
