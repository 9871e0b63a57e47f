"""`trimserve diff`: what tells two profiles of one model apart."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import named_path
from trimserve.cli.inputs import load_named_vocab
from trimserve.cli.output import emit
from trimserve.console import percent, table
from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.profiles.profile import Profile
    from trimserve.text.names import TokenNames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("before", metavar="A", help="the earlier profile")
    parser.add_argument("after", metavar="B", help="the later one, of the same model")
    parser.add_argument(
        "--vocab",
        type=named_path,
        metavar="V",
        help="a vocab or a trimmed folder: what it keeps of each, too",
    )
    parser.add_argument(
        "--fail-below", type=float, metavar="C", help="exit with 1 where --vocab covers less of B than C"
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many tokens to list (20)")
    parser.add_argument("-m", "--model", help="where the tokens' texts are found (default: as profiled)")


def run(args: argparse.Namespace) -> int:
    """Compare and report."""
    from trimserve.cli.inputs import find_names
    from trimserve.profiles.difference import diff
    from trimserve.profiles.profile import Profile

    before, after = Profile.load(args.before), Profile.load(args.after)
    if args.top < 0:
        raise UsageError(f"--top should be 0 or more, found {args.top}.")
    if args.fail_below is not None and (args.vocab is None or not 0 <= args.fail_below <= 1):
        raise UsageError("--fail-below is a coverage of --vocab, from 0 to 1: name both.")
    found = diff(before, after, top=args.top)
    names = find_names(before, args.model)
    document: dict[str, Any] = {"before": args.before, "after": args.after} | dataclasses.asdict(found)
    document["moved"] = [
        dataclasses.asdict(move) | {"text": names.text(move.token_id) if names else None}
        for move in found.moved
    ]
    if args.vocab is not None:
        document["coverage"] = _coverages(args.vocab, before, after)
    emit(args, document, _summary(document, names))
    return int(args.fail_below is not None and document["coverage"][1] < args.fail_below)


def _coverages(path: Path, *profiles: "Profile") -> list[float]:
    from trimserve.profiles.merging import check_vocab

    vocab = load_named_vocab(path)
    for profile in profiles:
        check_vocab(profile, vocab)
    return [profile.coverage(vocab.kept_ids) for profile in profiles]


def _summary(document: dict[str, Any], names: "TokenNames | None") -> str:
    distance, chance = document["js_distance"], document["js_by_chance"]
    first, second = document["tokens"]
    facts = [
        ("tokens", f"{first:,} in {document['before']}, {second:,} in {document['after']}"),
        ("new ids", f"{document['new_ids']:,}, {percent(document['new_mass'])} of the later tokens"),
        ("gone ids", f"{document['gone_ids']:,}, {percent(document['gone_mass'])} of the earlier tokens"),
        ("shifted mass", percent(document["shifted_mass"])),
        ("Jensen-Shannon", f"{distance:.4f} (0 the same, 1 nothing in common; {chance:.4f} by chance)"),
    ]
    if "coverage" in document:
        facts.append(("coverage", " then ".join(map(percent, document["coverage"]))))
    lines = [f"{name:<18}{value}" for name, value in facts]
    if not document["moved"]:
        return "\n".join(lines)
    rows = [_row(move, names) for move in document["moved"]]
    return "\n".join([*lines, "", table(["moved most", "id", "before", "after", "by"], rows)])


def _row(move: dict[str, Any], names: "TokenNames | None") -> list[str]:
    before, after = 1000 * move["before"], 1000 * move["after"]
    text = repr(move["text"]) if names else "-"
    shares = (f"{before:.3f} ‰", f"{after:.3f} ‰", f"{after - before:+.3f} ‰")
    return [text, f"{move['token_id']:,}", *shares]
