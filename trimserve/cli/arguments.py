"""Options that several commands share, and how argparse reads them."""

import argparse
import re
from pathlib import Path
from typing import Any

_OPTIONS = ("text_column", "output_column", "chat", "unit", "skip_bad", "max_line")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d{1,12}) ?([kmg]?)(?:i?b)?", re.IGNORECASE)


def add_memory(parser: argparse._ActionsContainer) -> None:
    """Declare --memory, see `loading.load`."""
    parser.add_argument(
        "--memory",
        choices=("fast", "low"),
        default="fast",
        help="fast: packed copies of the weights; low: as little private memory as possible, slower",
    )


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the options."""
    add_text_arguments(parser)
    parser.add_argument("--output-column", metavar="C", help="field of the completion, counted apart")
    parser.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="rows of messages, through the model's chat template",
    )


def add_text_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare those that say how files become texts, without prompts and completions."""
    parser.add_argument(
        "--text-column", metavar="C", help="field of a row that holds its text, as a.b.c if nested"
    )
    parser.add_argument(
        "--unit", choices=("document", "line", "paragraph"), help="what one text is (default: document)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", default=None, help="leave bad rows and bytes out, and count them"
    )
    parser.add_argument(
        "--max-line",
        type=byte_size,
        metavar="N",
        help="longest line, row or cell that is read, such as 256M (default: 64M)",
    )


def named_path(word: str) -> Path:
    """A path of the command line; nothing at all would mean the current folder."""
    if not word:
        raise argparse.ArgumentTypeError("an empty text is no path: name one")
    return Path(word)


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `trimserve.profiles.profiling.profile` that the command line gave."""
    return {name: value for name in _OPTIONS if (value := getattr(args, name))}


def byte_size(text: str) -> int:
    """Parse a number of bytes for argparse: 4096, 64M, 1GiB."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number of bytes, such as 4096 or 64M")
    return int(found[1]) * _UNITS[found[2].lower()]


def positive(text: str) -> int:
    """Parse a whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("should be at least 1")
    return value


OPTIONS = (
    "coverage",
    "top_k",
    "max_bytes",
    "min_count",
    "min_docs",
    "output_coverage",
    "separate_output",
    "floors",
    "keep_file",
)


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which ids stay; `export` has them too."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--coverage", type=float, help="share of token occurrences to keep (default: 0.999)")
    size.add_argument("--top-k", type=int, metavar="N", help="keep at most N ids before rounding")
    size.add_argument("--max-bytes", type=int, metavar="N", help="keep at most N bytes of vocab rows")
    parser.add_argument("--min-count", type=int, metavar="N", help="drop ids that occur less than N times")
    parser.add_argument(
        "--min-docs", type=int, metavar="N", help="drop ids that less than N documents hold (privacy)"
    )
    parser.add_argument(
        "--floor",
        dest="floors",
        action="append",
        type=named_share,
        metavar="NAME=C",
        help="cover at least a share C of the profile NAME, given as NAME=P; can be repeated",
    )
    parser.add_argument(
        "--output-coverage", type=float, metavar="C", help="cover at least a share C of the completions"
    )
    parser.add_argument(
        "--separate-output",
        action="store_true",
        default=None,
        help="untied models: in the head keep the ids of completions alone, at --output-coverage",
    )
    parser.add_argument(
        "--keep-token",
        action="append",
        default=[],
        metavar="T",
        help="a token, or a text whose tokens stay; can be repeated",
    )
    parser.add_argument("--keep-file", type=named_path, metavar="F", help="ids or tokens a line, or .json")


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `trimserve.selection.select_ids.select` that the command line gave."""
    given = {name: getattr(args, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    if "floors" in options:
        options["floors"] = dict(options["floors"])
    return options | {"keep_tokens": args.keep_token}


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the profiles, as arguments or by `--profile`."""
    parser.add_argument("profiles", nargs="*", metavar="[NAME=]P", help="profiles of one model")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="[NAME=]P", help="one more; can be repeated"
    )


def named_share(text: str) -> tuple[str, float]:
    """Parse NAME=SHARE, for argparse."""
    name, equals, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        wanted = "as in support=0.999" if equals else "with a profile's name, as in support=0.999"
        raise argparse.ArgumentTypeError(f"{text!r} should be a share {wanted}") from None
