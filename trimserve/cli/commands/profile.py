"""`trimserve profile`: count the tokens of a corpus."""

import argparse
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import add_reading_arguments, named_path, reading_options
from trimserve.cli.inputs import lines_as_one
from trimserve.cli.output import emit
from trimserve.cli.rules import Rule, check
from trimserve.interrupts import exit_code

if TYPE_CHECKING:
    from trimserve.profiles.profile import Profile


log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "corpus",
        nargs="+",
        metavar="CORPUS",
        help="txt, jsonl, csv, tsv, parquet (also .gz, .zst), folders, globs, hf://OWNER/NAME, - for stdin",
    )
    parser.add_argument(
        "-m", "--model", required=True, help="folder, GGUF file or hub id whose tokenizer counts"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=named_path, help="profile to write (.safetensors)"
    )
    add_reading_arguments(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="cores to use (default: all)")
    parser.add_argument("--engine", choices=("local", "ray"), help="where to count (default: local)")
    parser.add_argument("--shard", metavar="I/N", help="count part I of N, from 1/N; merge adds them up")
    parser.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the unfinished profile at --output, if there is one",
    )


def run(args: argparse.Namespace) -> int:
    """Profile, write, report."""
    from trimserve.files.artefact import check_output
    from trimserve.profiles.profile import Profile
    from trimserve.profiles.profiling import ProfileInterrupted, profile

    check(args, _RULES)
    check_output(args.output, "profile")  # before minutes of counting
    options: Any = reading_options(args)
    options |= {name: value for name in _OPTIONS if (value := getattr(args, name))}
    if args.workers is not None:
        options["workers"] = args.workers
    if args.resume and args.output.exists():
        options["resume"] = Profile.load(args.output)
    start = time.perf_counter()
    try:
        counted = profile(args.corpus, args.model, **options)
    except ProfileInterrupted as stop:
        stop.partial.save(args.output)
        return _interrupted(stop.partial, args)
    seconds = time.perf_counter() - start
    counted.save(args.output)
    _report(counted, args, seconds)
    # Last: where something else is wrong, that is the one sentence.
    if args.unit is None and (advice := lines_as_one(args.corpus)) is not None:
        log.warning(advice)
    return 0


_OPTIONS = ("engine", "shard")


def _has_rows(args: argparse.Namespace) -> bool:
    """Whether the corpus can have rows with fields; what lies on the hub is seen when it is fetched."""
    from trimserve.corpus.files import HUB, STDIN, find_files
    from trimserve.corpus.rows import is_table

    if any(name == STDIN or name.startswith(HUB) for name in args.corpus):
        return True
    return any(is_table(file.format) for file in find_files(args.corpus))


_RULES = (
    Rule(
        ("text_column", "output_column", "chat"),
        _has_rows,
        "says how rows of tables are read, and the corpus is plain text: leave it out.",
    ),
    Rule(
        ("resume",),
        lambda args: "-" not in args.corpus,
        "cannot go on with stdin, whose beginning has gone: leave it out and count anew, or name files.",
    ),
)


def _interrupted(partial: "Profile", args: argparse.Namespace) -> int:
    resumable = "-" not in args.corpus
    advice = "go on with --resume" if resumable else "stdin cannot be resumed"
    print(
        f"trimserve: interrupted; {args.output} holds what was counted, {partial.tokens:,} tokens of "
        f"{partial.texts:,} texts, and is a valid profile: {advice}.",
        file=sys.stderr,
    )
    return exit_code()


def _report(counted: "Profile", args: argparse.Namespace, seconds: float) -> None:
    from trimserve.cli.describe import profile_document, profile_summary
    from trimserve.console import human_bytes

    size = sum(source.bytes for source in counted.sources)
    document = profile_document(counted, str(args.output)) | {
        "seconds": round(seconds, 3),
        "bytes": size,
        "skipped": dict(counted.skipped),
    }
    if counted.output_counts is not None:
        document["output_tokens"] = int(counted.output_counts.sum())
    lines = [profile_summary(counted, str(args.output)), ""]
    if counted.output_counts is not None:
        lines.append(f"tokens of completions: {document['output_tokens']:,}")
    if counted.skipped:
        found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counted.skipped.items()))
        lines.append(f"left out: {found}")
    lines.append(
        f"counted {human_bytes(size)} in {seconds:.1f} s, {human_bytes(size / max(seconds, 1e-9))} a second"
    )
    emit(args, document, "\n".join(lines))
