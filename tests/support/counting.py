"""What the tests of tests/hardening count: how many attempts, by which seed, and what went wrong.

pytest hides what passing tests print, so `shown` gathers the counters' lines for its summary.
"""

import collections
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.support.limits import limited
from trimserve.errors import TrimserveError

_LONGEST_SENTENCE = 1_000
_LINE = re.compile(r".+: [\d,]+ tried, seed \S+, \d+ faults.*")
_LISTED = 40


class Counter:
    """How many were tried, what each gave, and the faults.

    Attributes:
        kinds: how many there were of each kind.
        faults: by what they are: one of each, with what was tried.
    """

    def __init__(self, title: str, seed: object) -> None:
        self.title = title
        self.seed = seed
        self.tried = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, str] = {}

    def add(self, kind: str, what: object = "", fault: str | None = None) -> None:
        """Count one attempt: what kind it was or what it gave, what was done, and what was wrong."""
        self.tried += 1
        self.kinds[kind] += 1
        if fault is not None:
            self.fault(fault, what)

    def fault(self, fault: str, what: object = "") -> None:
        """Note what is wrong with an attempt."""
        self.faults.setdefault(":".join(fault.split(":")[:3])[:90], f"{fault} [{what}]")

    @property
    def line(self) -> str:
        """What CI shows."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.title}: {self.tried:,} tried, seed {self.seed}, {len(self.faults)} faults ({kinds})"

    def check(self) -> None:
        """Print the line; fail where there is a fault."""
        print(f"\n{self.line}")
        faults = list(self.faults.values())[:_LISTED]
        assert not self.faults, "\n".join([self.line, *faults])


def is_sentence(error: BaseException) -> bool:
    """Whether an error's words are one line of a length that can be read."""
    words = str(error)
    return bool(words) and "\n" not in words and len(words) <= _LONGEST_SENTENCE


def outcome_of(attempt: Callable[[], object]) -> str | None:
    """None where an attempt succeeds or ends in one sentence; else what is wrong."""
    try:
        with limited():
            attempt()
    except TrimserveError as error:
        if not is_sentence(error):
            return f"not one sentence: {type(error).__name__}: {str(error)[:300]!r}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return fault_of(error)
    return None


def fault_of(error: BaseException) -> str:
    """An error that is none of ours, and where in trimserve it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "trimserve" in frame.filename]
    last = frames[-1] if frames else None
    where = "" if last is None else f"{Path(last.filename).name}:{last.lineno} {last.name}"
    return f"{type(error).__name__} at {where}: {str(error)[:120]!r}"


def shown(reports: Iterable[Any]) -> Iterator[str]:
    """The counters' lines in what tests printed."""
    for report in reports:
        if getattr(report, "when", None) == "call":
            for name, text in report.sections:
                if name == "Captured stdout call":
                    yield from filter(_LINE.fullmatch, text.splitlines())
