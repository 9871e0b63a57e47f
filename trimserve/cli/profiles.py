"""Profiles on the command line: a path, or NAME=PATH where a floor or a table needs a name."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.profiling import Profile


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the profiles, as arguments or by `--profile`."""
    parser.add_argument("profiles", nargs="*", metavar="[NAME=]P", help="profiles of one model")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="[NAME=]P", help="one more; can be repeated"
    )


def load_profiles(given: Iterable[str | Path]) -> "dict[str, Profile]":
    """Read profiles by name, in the order given; one without a name is called by its stem, else its path.

    Raises:
        UsageError: none is given, two are given one name, or a file does not exist.
    """
    from trimserve.profiling import Profile

    loaded: dict[str, Profile] = {}
    for number, (name, path) in enumerate(map(_parted, map(str, given)), 1):
        if name is not None and name in loaded:
            raise UsageError(f"two profiles are called {name}: give {path} another name.")
        free = (known for known in (name or Path(path).stem, path) if known not in loaded)
        loaded[next(free, f"{path} ({number})")] = Profile.load(path)
    if not loaded:
        raise UsageError("there is no profile: name at least one.")
    return loaded


def _parted(entry: str) -> tuple[str | None, str]:
    name, equals, path = entry.partition("=")
    return (name, path) if equals and not Path(entry).exists() else (None, entry)


def named_share(text: str) -> tuple[str, float]:
    """Parse NAME=SHARE, for argparse."""
    name, equals, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        wanted = "as in support=0.999" if equals else "with a profile's name, as in support=0.999"
        raise argparse.ArgumentTypeError(f"{text!r} should be a share {wanted}") from None
