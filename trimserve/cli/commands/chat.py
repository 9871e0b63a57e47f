"""`trimserve chat`: a conversation in the terminal, through the folder's own chat template."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import named_path
from trimserve.cli.output import emit
from trimserve.errors import UsageError
from trimserve.stdout import data_stream

if TYPE_CHECKING:
    from trimserve.generation.generator import Generator

_OPTIONS = ("mode", "max_new_tokens", "temperature", "top_k", "top_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; None stands for the folder's own."""
    parser.add_argument("folder", type=named_path, metavar="DIR", help="a trimmed folder of a chat model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--mode", choices=("exact", "compact"), help="default: exact where the folder can")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer (default: the folder's, else 1024)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the folder's)")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the first P of probability")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random numbers (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of one operator")


def run(args: argparse.Namespace) -> int:
    """Answer line after line until the input ends; Ctrl-D ends a terminal's."""
    from trimserve.generation.generator import Generator
    from trimserve.loading import load

    model = load(args.folder, device=args.device, threads=args.threads)
    if not isinstance(model, Generator):
        raise UsageError(f"{args.folder} does {model.task}, and a conversation needs a generator: use run.")
    options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    options.setdefault("max_new_tokens", model.config.settings.get("max_new_tokens", 1024))
    model.plan(options)  # type: ignore[arg-type] # before the first line is typed
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    for line in _lines():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(args, model, messages, options)})
    if args.format == "json":
        emit(args, {"messages": messages}, "")
    return 0


def _lines() -> Iterator[str]:
    """What is typed, or a message a line of what is piped in; empty lines are none."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.strip():
            yield text


def _answer(
    args: argparse.Namespace, model: "Generator", messages: list[dict[str, str]], options: dict[str, Any]
) -> str:
    out = data_stream()
    pieces = []
    for piece in model.stream_chat(messages, **options):
        pieces.append(piece)
        if args.format == "human":
            print(piece, end="", file=out, flush=True)
    if args.format == "human":
        print(file=out, flush=True)
    return "".join(pieces)
