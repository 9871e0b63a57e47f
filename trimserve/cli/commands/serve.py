"""`trimserve serve`: an OpenAI-compatible server of trimmed folders."""

import argparse
import logging
import os
from pathlib import Path

from trimserve.cli.arguments import add_memory
from trimserve.cli.output import emit
from trimserve.errors import UsageError
from trimserve.stdout import data_stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folders", nargs="*", metavar="DIR", help="trimmed folders; each is named as it is")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a folder under another name; repeatable",
    )
    listening = parser.add_argument_group("where it listens")
    listening.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for every network (default: 127.0.0.1)"
    )
    listening.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    listening.add_argument("--unix-socket", type=Path, metavar="PATH", help="a socket in a file, and no port")
    listening.add_argument(
        "--api-key-file",
        type=Path,
        metavar="F",
        help="keys, one a line, that clients must send (default: those of TRIMSERVE_API_KEY, if it is set)",
    )
    running = parser.add_argument_group("how it runs")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models run")
    running.add_argument("--threads", type=int, metavar="N", help="CPU threads of one operator")
    add_memory(running)
    running.add_argument(
        "--no-reload", action="store_true", help="keep a folder's models when it is replaced"
    )
    watching = parser.add_argument_group("what it records")
    watching.add_argument(
        "--record-profile",
        type=Path,
        metavar="P",
        help="add counts of served token ids, never texts, to this profile (default: record nothing)",
    )
    watching.add_argument(
        "--record-min-docs", type=int, metavar="N", help="requests that must hold an id (default: 2)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, metavar="N", help="requests that wait (default: 256)")
    limits.add_argument("--max-queue-tokens", type=int, metavar="N", help="their tokens (default: 262144)")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="of an answer, by default (1024)")
    limits.add_argument("--max-inputs", type=int, metavar="N", help="texts of one request (default: 2048)")
    limits.add_argument("--max-body", type=int, metavar="BYTES", help="of one request (default: 16777216)")
    limits.add_argument(
        "--shutdown-timeout",
        type=float,
        metavar="SECONDS",
        help="to finish what runs at the end (default: 30)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from trimserve.errors import require

    require("starlette", extra="serve", purpose="trimserve serve")
    from trimserve.folder.manifest import read_manifest
    from trimserve.serving.keys import read_keys
    from trimserve.serving.server import Address, serve
    from trimserve.serving.settings import make_settings

    folders = _folders(args)
    for path in folders.values():
        read_manifest(path)  # what is no folder of ours is said before anything else
    names = (
        "threads",
        "max_queue",
        "max_queue_tokens",
        "max_tokens",
        "max_inputs",
        "max_body",
        "shutdown_timeout",
        "record_profile",
        "record_min_docs",
    )
    if args.record_min_docs is not None and args.record_profile is None:
        raise UsageError("--record-min-docs is about --record-profile: name the file, or leave it out.")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = make_settings(
        folders=folders,
        device=args.device,
        memory=args.memory,
        reload=not args.no_reload,
        keys=read_keys(args.api_key_file),
        **given,
    )
    logging.getLogger("trimserve.serving").setLevel(logging.INFO)

    def started(url: str) -> None:
        where = f"serving {', '.join(folders)} on {url}" + ("" if settings.keys else ", without API keys")
        emit(args, {"url": url, "models": list(folders), "pid": os.getpid()}, where)
        out = data_stream()
        if out is not None:
            out.flush()

    serve(settings, Address(args.host, args.port, args.unix_socket), started)
    return 0


def _folders(args: argparse.Namespace) -> dict[str, Path]:
    """Name -> folder.

    Raises:
        UsageError: none, or two of one name.
    """
    pairs = [(Path(os.path.abspath(word)).name, word) for word in args.folders]  # noqa: PTH100 - links keep their name
    for word in args.name:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--name {word!r} should be NAME=DIR, as in chat=qwen3-tickets.")
        pairs.append((name, path))
    if not pairs:
        raise UsageError("expected a trimmed folder: trimserve serve DIR.")
    folders: dict[str, Path] = {}
    for name, word in pairs:
        if not word:
            raise UsageError("an empty text is no folder: name one.")
        if name in folders:
            raise UsageError(f"two folders are called {name!r}: name one of them with --name NAME=DIR.")
        folders[name] = Path(word)
    return folders
