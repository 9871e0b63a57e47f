"""`trimserve report`: show what a profile says and what each K costs."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import add_profile_arguments, add_reading_arguments, named_path, reading_options
from trimserve.cli.inputs import load_named_vocab, load_profiles
from trimserve.cli.output import emit
from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.model.source import ModelSource
    from trimserve.profiles.profile import Profile
    from trimserve.reporting.facts import Inputs
    from trimserve.vocab.map import VocabMap

_HTML_SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_profile_arguments(parser)
    parser.add_argument("-o", "--output", type=named_path, help="page to write (.html)")
    parser.add_argument("-m", "--model", help="where tokenizer and weights are found (default: as profiled)")
    parser.add_argument(
        "--vocab",
        type=named_path,
        metavar="V",
        help="the choice to show, or a trimmed folder that has it (default: coverage 0.999)",
    )
    parser.add_argument(
        "--folder", type=named_path, metavar="DIR", help="a trimmed folder: its vocab, its verification"
    )
    held_out = "files of them, or a profile of them (.safetensors)"
    unseen = parser.add_argument_group("texts that were not profiled")
    unseen.add_argument("--held-out", nargs="+", metavar="CORPUS", help=held_out)
    add_reading_arguments(unseen)
    parser.add_argument(
        "--min-docs", type=int, metavar="N", help="name no token that less than N documents hold"
    )
    parser.add_argument(
        "--top", type=int, default=30, metavar="N", help="how many dropped tokens to name (30)"
    )
    parser.add_argument("--title", help="heading of the page (default: the profiles' names)")


def run(args: argparse.Namespace) -> int:
    """Gather the numbers, write the page, report."""
    from trimserve.reporting.facts import gather
    from trimserve.reporting.terminal import summarise

    for name in ("min_docs", "top"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} should be 0 or more, found {value}.")
    if args.output is not None:
        _check_output(args.output)
    inputs = _inputs(args)
    report = gather(inputs, top=args.top)
    title = args.title or ", ".join(inputs.profiles)
    document: dict[str, Any] = {"path": str(args.output) if args.output else None} | report.to_dict()
    document["next"] = _next(args, report.model, report.recommended.kept)
    text = f"{summarise(report, title)}\n\nnext: {document['next']}"
    if args.output is not None:
        from trimserve.files.atomic import atomic_path
        from trimserve.reporting.page import render

        with atomic_path(args.output) as temporary:
            temporary.write_text(render(report, title), "utf-8")
        text += f"\n\nreport: {args.output}"
    emit(args, document, text)
    return 0


def _next(args: argparse.Namespace, model: str, kept: int) -> str:
    """The command that makes a folder with so many ids."""
    profiles = [*args.profiles, *args.profile]
    words = ["trimserve", "export", "-m", args.model or model]
    words += [word for name in profiles for word in ("--profile", name)]
    words += ["--top-k", str(kept), "-o", f"{Path(profiles[0].partition('=')[2] or profiles[0]).stem}-{kept}"]
    return shlex.join(words)


def _check_output(path: Path) -> None:
    from trimserve.files.atomic import check_place

    if path.suffix.lower() not in _HTML_SUFFIXES:
        raise UsageError(f"{path} should be a page's name, which ends in .html: choose another name.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the page to write.")
    check_place(path)


def _inputs(args: argparse.Namespace) -> "Inputs":
    from trimserve.model.prize import read_weight_bytes
    from trimserve.profiles.merging import check_same_model, check_vocab, merge
    from trimserve.profiles.model import find_source
    from trimserve.reporting.facts import Inputs
    from trimserve.text.dead_ids import dead_ids
    from trimserve.text.names import TokenNames

    profiles = load_profiles([*args.profiles, *args.profile])
    merged = next(iter(profiles.values())) if len(profiles) == 1 else merge(list(profiles.values()))
    source = find_source(merged, args.model)
    vocab, verification = _choice(args, merged)
    check_vocab(merged, vocab)
    held_out = _held_out(args, source)
    if held_out is not None:
        check_same_model(merged, held_out)
    tokenizer = None if source is None else source.tokenizer()
    return Inputs(
        profiles=profiles,
        merged=merged,
        vocab=vocab,
        names=None if tokenizer is None else TokenNames(tokenizer),
        weights=None if source is None else read_weight_bytes(source),
        held_out=held_out,
        dead_ids=None if tokenizer is None else dead_ids(tokenizer),
        verification=verification,
        min_docs=args.min_docs or vocab.rule.get("options", {}).get("min_docs", 1),
    )


def _choice(args: argparse.Namespace, merged: "Profile") -> "tuple[VocabMap, dict[str, Any] | None]":
    """The vocab that the report is about, and what verification found of it."""
    from trimserve.folder.manifest import read_manifest
    from trimserve.selection.select_ids import select

    if args.folder is not None:
        manifest = read_manifest(args.folder)
        return load_named_vocab(args.vocab or args.folder), manifest.verification
    return (select(merged) if args.vocab is None else load_named_vocab(args.vocab)), None


def _held_out(args: argparse.Namespace, source: "ModelSource | None") -> "Profile | None":
    from trimserve.profiles.merging import merge
    from trimserve.profiles.profile import Profile
    from trimserve.profiles.profiling import profile

    reading = reading_options(args)
    counted = all(Path(name).suffix == ".safetensors" for name in args.held_out or ())
    if counted and reading:
        raise UsageError(
            "--text-column, --output-column, --chat, --unit and --skip-bad say how files of --held-out are "
            "read: name such files, or leave the options out."
        )
    if not args.held_out:
        return None
    if counted:
        return merge([Profile.load(name) for name in args.held_out])
    if source is None:
        raise UsageError("--held-out is counted with the model's tokenizer, which is not at hand: pass -m.")
    return profile(args.held_out, source, **reading)
