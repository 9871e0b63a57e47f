"""Options that something else makes meaningless: one table a command, so that none passes in silence."""

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple

from trimserve.errors import UsageError


class Rule(NamedTuple):
    """When an option is honoured.

    Attributes:
        options: names of options, as attributes of the parsed arguments.
        holds: whether the rest of the command line lets them mean something.
        why: why they do not otherwise, and what to do, as the end of "--x …".
    """

    options: tuple[str, ...]
    holds: Callable[[argparse.Namespace], bool]
    why: str


def check(args: argparse.Namespace, rules: Iterable[Rule]) -> None:
    """Refuse the options that mean nothing beside the others.

    Raises:
        UsageError: the first rule that is broken, by the names of the options that break it.
    """
    for rule in rules:
        names = given(args, rule.options)
        if names and not rule.holds(args):
            raise UsageError(f"{', '.join(map(flag, names))} {rule.why}")


def given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of some options that the command line has; None and an empty list are defaults.

    So an option of yes or no has the default None, as its no may have been given.
    """
    return [name for name in names if getattr(args, name) is not None and getattr(args, name) != []]


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"
