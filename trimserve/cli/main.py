"""Parse the command line, run one subcommand, turn errors into one sentence and an exit code."""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from trimserve.cli.native_stderr import hide_panics
from trimserve.errors import TrimserveError, require
from trimserve.files.atomic import recording
from trimserve.interrupts import came, exit_code, terminations
from trimserve.stdout import data_only
from trimserve.version import __version__

_COMPLETION = "--print-completion"
# Packages whose versions decide about results, with what may stand for each.
_DECISIVE = (("onnxruntime", "onnxruntime-gpu"), ("tokenizers",), ("numpy",))
_FULL = (errno.ENOSPC, errno.EDQUOT)
# subcommand -> its one-line help; trimserve/cli/<subcommand>.py has add_arguments(parser) and run(args).
COMMANDS = {
    "inspect": "what a model or folder is, its vocab tensors, and the most that trimming saves",
    "profile": "count the tokens of a corpus",
    "merge": "add profiles up",
    "diff": "what tells two profiles apart",
    "select": "choose the kept ids from profiles",
    "report": "show what a profile says and what each K costs",
    "export": "make a trimmed folder",
    "verify": "compare a trimmed folder with the full model",
    "run": "generate or embed with a trimmed folder",
    "chat": "a conversation with a trimmed folder, in the terminal",
    "serve": "an OpenAI-compatible server of trimmed folders",
    "bench": "measure the full model against a trimmed folder",
    "finetune": "check training texts against a vocab, restore full checkpoints of compact ones",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done, 1 failed, 2 usage, 3 verification failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_program = argv is None
    with recording() as written, terminations() if is_program else contextlib.nullcontext():
        try:
            code = _run(arguments, is_program=is_program)
            if sys.stdout is not None:  # None where the caller closed it
                sys.stdout.flush()  # --help: a reader that has gone is noticed here, not at the end
            return code
        except BaseException as error:
            # A library may have made another error of the exception that a signal raised in it.
            if isinstance(error, KeyboardInterrupt) or came():
                return _fail(_interrupted(written), exit_code())
            return _told(error)


def _told(error: BaseException) -> int:
    """Say an error in one sentence and give its exit code; what is none that a user can meet goes on."""
    if isinstance(error, TrimserveError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, MemoryError):
        return _fail("out of memory: free some, or give it less to do at a time.", 1)
    if isinstance(error, BrokenPipeError):
        # The reader (head, less) has gone: no message, and none from the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        advice = " Free some space and run it again." if error.errno in _FULL else ""
        named = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or _one_line(error)}{named}.{advice}", 1)
    raise error


def _interrupted(written: Sequence[Path]) -> str:
    """What stands in its place after a signal."""
    stands = dict.fromkeys(str(path) for path in written if path.exists())
    if not stands:
        return "interrupted; no file was written."
    return f"interrupted; {', '.join(stands)} was written before and is complete."


def _one_line(error: BaseException) -> str:
    """A library's own words for what has no number of the system."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _run(arguments: list[str], *, is_program: bool) -> int:
    try:
        args = _parse(arguments)
    except SystemExit as stop:  # argparse: 0 for --help and --version, 2 for usage
        return int(stop.code or 0)
    if is_program:
        hide_panics()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    with data_only(utf8=args.format == "json", restore=not is_program):
        code: int = importlib.import_module(f"trimserve.cli.commands.{args.command}").run(args)
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    at = next((at for at, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    named = arguments[at] if at < len(arguments) else None
    if at or named not in commands:  # nothing, --help, --version, or a mistake: none of it comes back
        parser.parse_args(arguments if arguments[:1] == [_COMPLETION] else arguments[: at + 1])
        parser.error("expected a COMMAND first")
    _declare(named, commands[named])  # of the called one alone
    return _parse_mixed(commands[named], arguments[1:], argparse.Namespace(command=named))


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The program's parser, and those of its commands, whose arguments `_declare` adds."""
    parser = argparse.ArgumentParser(
        prog="trimserve",
        description="Serve a language model with the vocabulary rows a domain uses.",
    )
    silent: Any = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(
        "--version", action=_PrintVersions, nargs=0, help="print versions, and exit", **silent
    )
    shells = ("bash", "zsh", "tcsh")
    completion = "print what completes commands in a shell, and exit"
    parser.add_argument(_COMPLETION, action=_PrintCompletion, choices=shells, help=completion, **silent)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    return parser, {
        name: subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        for name, summary in COMMANDS.items()
    }


def _declare(name: str, command: argparse.ArgumentParser) -> None:
    importlib.import_module(f"trimserve.cli.commands.{name}").add_arguments(command)
    command.add_argument("--format", choices=("human", "json"), default="human", help="output format")
    command.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")


def full_parser() -> argparse.ArgumentParser:
    """The whole command line, with the arguments of every command: for completion and for the docs."""
    parser, commands = _parsers()
    for name, command in commands.items():
        _declare(name, command)
    return parser


class _PrintVersions(argparse.Action):
    """Prints the program's version and those of what decides about results."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(versions())
        parser.exit()


class _PrintCompletion(argparse.Action):
    """Prints a script that completes the command line."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        shtab = require("shtab", extra="completion", purpose=f"trimserve {_COMPLETION}")
        print(shtab.complete(full_parser(), shell=shell))
        parser.exit()


def versions() -> str:
    """One line with the versions of trimserve, Python and what computes; nothing of it is imported."""
    found = [f"Python {platform.python_version()}"]
    for names in _DECISIVE:
        installed = [f"{name} {version}" for name in names if (version := _installed(name)) is not None]
        found.append(installed[0] if installed else f"no {names[0]}")
    return f"trimserve {__version__} ({', '.join(found)})"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _parse_mixed(
    parser: argparse.ArgumentParser, words: list[str], known: argparse.Namespace
) -> argparse.Namespace:
    """Parse options and positional arguments in any order, as people type them.

    argparse does it for a parser without subcommands; of one with them (`finetune`), for the subcommand.
    """
    below = next((entry for entry in parser._actions if isinstance(entry, argparse._SubParsersAction)), None)
    if below is None:
        return parser.parse_intermixed_args(words, known)
    at = next((at for at, word in enumerate(words) if word in below.choices), None)
    if at is None:
        return parser.parse_args(words, known)  # says what is missing
    setattr(known, below.dest, words[at])
    below.required = False
    known = parser.parse_args(words[:at], known)
    return _parse_mixed(below.choices[words[at]], words[at + 1 :], known)


def _fail(message: str, code: int) -> int:
    if os.environ.get("TRIMSERVE_DEBUG") == "1":
        traceback.print_exc()
    print(f"trimserve: {message}", file=sys.stderr)
    return code
