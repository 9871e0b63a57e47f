"""`trimserve verify`: compare a trimmed folder with the full model; exit code 3 where it differs."""

import argparse
import sys
from pathlib import Path

from trimserve.cli.output import emit
from trimserve.errors import UsageError, require
from trimserve.report import table

NOT_VERIFIED = 3
_OUTCOMES = {True: "ok", False: "FAILED", None: "not compared"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the trimmed folder")
    parser.add_argument(
        "-m", "--model", help="the full model: a folder or hub id (default: the folder's source)"
    )
    parser.add_argument("--revision", help="hub revision of the model")
    parser.add_argument("--texts", metavar="FILE", help="texts to compare on, one a line; - for stdin")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if every check holds, else 3."""
    export = require("trimserve_export.verify", extra="export", purpose="trimserve verify")
    texts = None if args.texts is None else read_lines(args.texts)
    result = export.verify(args.folder, args.model, texts=texts, revision=args.revision)
    rows = [(check.name, _OUTCOMES[check.ok], _number(check.max_abs_diff)) for check in result.checks]
    lines = [table(("check", "result", "largest difference"), rows), ""]
    lines += [f"{check.name}: {check.detail}" for check in result.checks]
    rest = f" (not compared: {', '.join(result.not_compared)})" if result.not_compared else ""
    lines.append(
        f"{args.folder}: " + (f"verified{rest}" if result.ok else f"FAILED {', '.join(result.failed)}")
    )
    emit(args, result.to_dict(), "\n".join(lines))
    return 0 if result.ok else NOT_VERIFIED


def read_lines(name: str) -> list[str]:
    """Read the non-empty lines of a UTF-8 file, or of stdin for ``-``.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or has no text.
    """
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{name} does not exist: pass a file with a text a line.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error}): convert it first.") from error
    lines = [line for line in content.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{name} holds no text: pass a file with a text a line.")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
