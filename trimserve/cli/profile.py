"""`trimserve profile`: count the tokens of a corpus."""

import argparse
import time
from pathlib import Path

from trimserve.cli.output import emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("corpus", nargs="+", metavar="CORPUS", help=".txt or .jsonl files, - for stdin")
    parser.add_argument("-m", "--model", required=True, help="folder or hub id whose tokenizer counts")
    parser.add_argument("-o", "--output", required=True, type=Path, help="profile to write (.safetensors)")
    parser.add_argument("--text-column", metavar="C", help="field of a .jsonl record that holds its text")
    parser.add_argument("--workers", type=int, metavar="N", help="tokenizer threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Profile, write, report."""
    from trimserve.artefacts import check_output
    from trimserve.cli.summary import profile_document, profile_summary
    from trimserve.profiling import profile

    check_output(args.output, "profile")  # before minutes of counting
    start = time.perf_counter()
    counted = profile(args.corpus, args.model, text_column=args.text_column, workers=args.workers)
    seconds = time.perf_counter() - start
    counted.save(args.output)
    document = profile_document(counted, str(args.output)) | {"seconds": round(seconds, 3)}
    emit(args, document, f"{profile_summary(counted, str(args.output))}\n\ncounted in {seconds:.1f} s")
    return 0
