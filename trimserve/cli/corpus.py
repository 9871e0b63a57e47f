"""The options that say how a corpus becomes documents, for the commands that profile one."""

import argparse
from typing import Any

_OPTIONS = ("text_column", "output_column", "chat", "unit", "skip_bad")


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the options."""
    parser.add_argument(
        "--text-column", metavar="C", help="field of a row that holds its text, as a.b.c if nested"
    )
    parser.add_argument("--output-column", metavar="C", help="field of the completion, counted apart")
    parser.add_argument(
        "--chat", action="store_true", help="rows of messages, through the model's chat template"
    )
    parser.add_argument(
        "--unit", choices=("document", "line", "paragraph"), help="what one text is (default: document)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave bad rows and bytes out, and count them"
    )


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `trimserve.profiling.profile` that the command line gave."""
    return {name: value for name in _OPTIONS if (value := getattr(args, name))}
