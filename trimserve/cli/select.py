"""`trimserve select`: choose the kept ids from profiles."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.output import emit

if TYPE_CHECKING:
    from trimserve.vocab import VocabMap

OPTIONS = ("coverage", "top_k", "max_bytes", "min_count", "keep_file")


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which ids stay; `export` has them too."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--coverage", type=float, help="share of token occurrences to keep (default: 0.999)")
    size.add_argument("--top-k", type=int, metavar="N", help="keep at most N ids before rounding")
    size.add_argument("--max-bytes", type=int, metavar="N", help="keep at most N bytes of vocab rows")
    parser.add_argument("--min-count", type=int, metavar="N", help="drop ids that occur less than N times")
    parser.add_argument(
        "--keep-token",
        action="append",
        default=[],
        metavar="T",
        help="a token, or a text whose tokens stay; can be repeated",
    )
    parser.add_argument("--keep-file", type=Path, metavar="F", help="ids or tokens, one a line, or .json")


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `trimserve.selection.select` that the command line gave."""
    given = {name: getattr(args, name) for name in OPTIONS}
    return {name: value for name, value in given.items() if value is not None} | {
        "keep_tokens": args.keep_token
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("profiles", nargs="+", metavar="P", help="profiles of one model")
    parser.add_argument("-o", "--output", required=True, type=Path, help="vocab to write (.safetensors)")
    parser.add_argument("-m", "--model", help="where --keep-token finds the tokenizer (default: as profiled)")
    add_selection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Select, write, report."""
    from trimserve.artefacts import check_output, save_vocab
    from trimserve.profiling import Profile
    from trimserve.selection import select

    check_output(args.output, "vocab")
    profiles = [Profile.load(path) for path in args.profiles]
    vocab = select(profiles, model=args.model, **selection_options(args))
    save_vocab(vocab, args.output)
    emit(args, selection_document(vocab, str(args.output)), selection_summary(vocab, str(args.output)))
    return 0


def selection_document(vocab: "VocabMap", path: str) -> dict[str, Any]:
    """The JSON document of a vocab that was written to `path`."""
    rule = vocab.rule
    return {
        "path": path,
        "kept": len(vocab),
        "vocab_size": vocab.vocab_size,
        "coverage": rule["coverage"],
        "missing_mass": rule["missing_mass"],
        "missing_mass_bound": rule["missing_mass_bound"],
        "reasons": rule["reasons"],
        "bytes_kept": len(vocab) * rule["row_bytes"],
        "bytes_before": vocab.vocab_size * rule["row_bytes"],
    }


def selection_summary(vocab: "VocabMap", path: str) -> str:
    """Describe a vocab for people: how many ids, why, and what that covers."""
    from trimserve.cli.summary import missing_mass_text
    from trimserve.report import human_bytes, percent

    rule, size = vocab.rule, vocab.vocab_size
    facts = [("kept ids", f"{len(vocab):,} of {size:,} ({percent(len(vocab) / size)})")]
    facts += [(f"  {reason}", f"{count:,}") for reason, count in rule["reasons"].items()]
    facts.append(("coverage", f"{percent(rule['coverage'])} of the {rule['tokens']:,} tokens profiled"))
    facts.append(("missing mass", missing_mass_text(rule["missing_mass"], rule["missing_mass_bound"])))
    if row_bytes := rule["row_bytes"]:
        kept, before = human_bytes(len(vocab) * row_bytes), human_bytes(size * row_bytes)
        facts.append(("bytes of rows", f"{kept} of {before}"))
    return "\n".join([f"vocab for {rule['tokenizer_name']}: {path}", *(f"{k:<18}{v}" for k, v in facts)])
