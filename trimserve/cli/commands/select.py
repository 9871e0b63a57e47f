"""`trimserve select`: choose the kept ids from profiles."""

import argparse

from trimserve.cli.arguments import (
    add_profile_arguments,
    add_selection_arguments,
    named_path,
    selection_options,
)
from trimserve.cli.describe import selection_document, selection_summary
from trimserve.cli.inputs import load_profiles
from trimserve.cli.output import emit
from trimserve.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_profile_arguments(parser)
    parser.add_argument("-o", "--output", type=named_path, help="vocab to write (.safetensors)")
    parser.add_argument("-m", "--model", help="where tokenizer and weights are found (default: as profiled)")
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing: say what the choice would cost and bring"
    )
    add_selection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Select, write, report."""
    from trimserve.files.artefact import check_output
    from trimserve.profiles.merging import merge
    from trimserve.selection.select_ids import select
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
        from trimserve.cli.describe import prediction_summary
        from trimserve.selection.prediction import predict

        prediction = predict(merge(list(profiles.values())), vocab, args.model)
        document |= prediction
        text += "\n" + prediction_summary(prediction)
    else:
        save_vocab(vocab, args.output)
    emit(args, document, text)
    return 0
