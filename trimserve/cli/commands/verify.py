"""`trimserve verify`: compare a trimmed folder with the full model; exit code 3 where it differs."""

import argparse

from trimserve.cli.arguments import named_path
from trimserve.cli.inputs import read_lines
from trimserve.cli.output import emit
from trimserve.console import table
from trimserve.errors import require

NOT_VERIFIED = 3
_OUTCOMES = {True: "ok", False: "FAILED", None: "not compared"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", type=named_path, metavar="DIR", help="the trimmed folder")
    parser.add_argument(
        "-m", "--model", help="the full model: a folder, GGUF file or hub id (default: the folder's source)"
    )
    parser.add_argument("--revision", help="hub revision of the model")
    adapter = "the adapter that was merged into the model (default: the one the folder names)"
    parser.add_argument("--adapter", metavar="DIR", help=adapter)
    parser.add_argument("--texts", metavar="FILE", help="texts to compare on, one a line; - for stdin")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if every check holds, else 3."""
    export = require("trimserve_export.verify", extra="export", purpose="trimserve verify")
    texts = None if args.texts is None else read_lines(args.texts)
    result = export.verify(args.folder, args.model, texts=texts, revision=args.revision, adapter=args.adapter)
    rows = [(check.name, _OUTCOMES[check.ok], _number(check.max_abs_diff)) for check in result.checks]
    lines = [table(("check", "result", "largest difference"), rows), ""]
    lines += [f"{check.name}: {check.detail}" for check in result.checks]
    rest = f" (not compared: {', '.join(result.not_compared)})" if result.not_compared else ""
    lines.append(
        f"{args.folder}: " + (f"verified{rest}" if result.ok else f"FAILED {', '.join(result.failed)}")
    )
    emit(args, result.to_dict(), "\n".join(lines))
    return 0 if result.ok else NOT_VERIFIED


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
