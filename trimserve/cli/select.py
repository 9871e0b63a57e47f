"""`trimserve select`: choose the kept ids from profiles."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.output import emit
from trimserve.cli.profiles import add_profile_arguments, load_profiles, named_share
from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.vocab.map import VocabMap

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


# What only some selections have to tell.
_OPTIONAL = ("profiles", "output_coverage", "head_rows", "head_coverage")


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
    parser.add_argument("--keep-file", type=Path, metavar="F", help="ids or tokens, one a line, or .json")


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `trimserve.selection.select` that the command line gave."""
    given = {name: getattr(args, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    if "floors" in options:
        options["floors"] = dict(options["floors"])
    return options | {"keep_tokens": args.keep_token}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_profile_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, help="vocab to write (.safetensors)")
    parser.add_argument("-m", "--model", help="where tokenizer and weights are found (default: as profiled)")
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing: say what the choice would cost and bring"
    )
    add_selection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Select, write, report."""
    from trimserve.files.artefact import check_output
    from trimserve.merging import merge
    from trimserve.selection import select
    from trimserve.vocab.file import save_vocab

    if args.output is None and not args.dry_run:
        raise UsageError("select writes a vocab: name it with -o, or pass --dry-run to see its cost.")
    if args.output is not None:
        check_output(args.output, "vocab")
    profiles = load_profiles([*args.profiles, *args.profile])
    vocab = select(profiles, model=args.model, **selection_options(args))
    path = None if args.dry_run else str(args.output)
    document = selection_document(vocab, path)
    text = selection_summary(vocab, path)
    if args.dry_run:
        from trimserve.cli.prediction import predict, prediction_summary

        prediction = predict(merge(list(profiles.values())), vocab, args.model)
        document |= prediction
        text += "\n" + prediction_summary(prediction)
    else:
        save_vocab(vocab, args.output)
    emit(args, document, text)
    return 0


def selection_document(vocab: "VocabMap", path: str | None) -> dict[str, Any]:
    """The JSON document of a vocab that was written to `path`."""
    rule = vocab.rule
    document = {
        "path": path,
        "kept": len(vocab),
        "vocab_size": vocab.vocab_size,
        "coverage": rule["coverage"],
        "missing_mass": rule["missing_mass"],
        "missing_mass_bound": rule["missing_mass_bound"],
        "reasons": rule["reasons"],
        "bytes_kept": _row_bytes(vocab),
        "bytes_before": vocab.vocab_size * rule["row_bytes"],
    }
    return document | {name: rule[name] for name in _OPTIONAL if name in rule}


def _row_bytes(vocab: "VocabMap") -> int:
    """Bytes of the kept rows; embedding and head of an untied model are alike, a bias is next to nothing."""
    row_bytes: int = vocab.rule["row_bytes"]
    return (len(vocab) + len(vocab.head)) * row_bytes // 2


def selection_summary(vocab: "VocabMap", path: str | None) -> str:
    """Describe a vocab for people: how many ids, why, and what that covers."""
    from trimserve.cli.summary import missing_mass_text
    from trimserve.report import human_bytes, percent

    rule, size = vocab.rule, vocab.vocab_size
    facts = [("kept ids", f"{len(vocab):,} of {size:,} ({percent(len(vocab) / size)})")]
    facts += [(f"  {reason}", f"{count:,}") for reason, count in rule["reasons"].items()]
    facts.append(("coverage", f"{percent(rule['coverage'])} of the {rule['tokens']:,} tokens profiled"))
    facts += [(f"  {name}", percent(share)) for name, share in rule.get("profiles", {}).items()]
    if "output_coverage" in rule:
        facts.append(("  completions", percent(rule["output_coverage"])))
    if "head_rows" in rule:
        covered = percent(rule["head_coverage"])
        facts.append(("head", f"{rule['head_rows']:,} of the kept ids: {covered} of completions"))
    facts.append(("missing mass", missing_mass_text(rule["missing_mass"], rule["missing_mass_bound"])))
    if row_bytes := rule["row_bytes"]:
        kept, before = human_bytes(_row_bytes(vocab)), human_bytes(size * row_bytes)
        facts.append(("bytes of rows", f"{kept} of {before}"))
    title = f"vocab for {rule['tokenizer_name']}: {path or 'nothing was written (dry run)'}"
    return "\n".join([title, *(f"{k:<18}{v}" for k, v in facts)])
