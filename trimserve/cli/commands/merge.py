"""`trimserve merge`: add profiles up."""

import argparse

from trimserve.cli.arguments import named_path
from trimserve.cli.output import emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("profiles", nargs="+", metavar="P", help="profiles of one model")
    parser.add_argument(
        "-o", "--output", required=True, type=named_path, help="profile to make (.safetensors)"
    )
    parser.add_argument(
        "--weight",
        nargs="+",
        type=float,
        metavar="W",
        help="share of the deployment's tokens that each profile stands for, one number a profile",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, write, report."""
    from trimserve.cli.describe import profile_document, profile_summary
    from trimserve.files.artefact import check_output
    from trimserve.profiles.merging import merge
    from trimserve.profiles.profile import Profile

    check_output(args.output, "profile")
    merged = merge([Profile.load(path) for path in args.profiles], weights=args.weight)
    merged.save(args.output)
    emit(args, profile_document(merged, str(args.output)), profile_summary(merged, str(args.output)))
    return 0
