"""What decides which ids stay: the options of `select`, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimserve.errors import UsageError

DEFAULT_COVERAGE = 0.999
_SIZES = ("coverage", "top_k", "max_bytes")


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """What decides how many ids stay; at most one of coverage, top_k and max_bytes.

    Attributes:
        coverage: keep the most frequent ids until this share of occurrences is covered, 0..1.
        top_k: keep at most this many ids, structural and explicit ones included, before rounding.
        min_count: an id that occurs less often does not stay for its frequency.
        max_bytes: the kept rows may take this many bytes, as stored in the checkpoint.
        multiple_of: K is rounded to a multiple of this: up, or down for max_bytes.
        min_docs: an id that fewer documents hold does not stay, not even to fill K up.
        output_coverage: share of the completions' occurrences that is covered at least, 0..1.
        floors: profile's name -> share of its occurrences that is covered at least, 0..1.
        separate_output: the head of an untied model keeps only what covers the completions' `output_share`.
    """

    coverage: float | None = None
    top_k: int | None = None
    min_count: int | None = None
    max_bytes: int | None = None
    multiple_of: int = 128
    min_docs: int | None = None
    output_coverage: float | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    separate_output: bool = False

    def __post_init__(self) -> None:
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise UsageError(f"{' and '.join(sizes)} contradict each other: give one of them.")
        shares = {"coverage": self.coverage, "output_coverage": self.output_coverage}
        for name, share in {
            **shares,
            **{f"floor {key}": share for key, share in self.floors.items()},
        }.items():
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"{name} is a share from 0 to 1, not {share}.")
        for name in ("top_k", "min_count", "max_bytes", "multiple_of", "min_docs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} should be at least 1 but is {value:,}.")

    @property
    def share(self) -> float:
        """The coverage that is sought: infinite where only a size or a count limits what stays."""
        if self.coverage is not None:
            return self.coverage
        sized = self.top_k or self.max_bytes or self.min_count
        return math.inf if sized else DEFAULT_COVERAGE

    @property
    def output_share(self) -> float:
        """The coverage of completions that a head with ids of its own is chosen for."""
        given = (self.output_coverage, self.coverage, DEFAULT_COVERAGE)
        return next(share for share in given if share is not None)

    def to_dict(self) -> dict[str, Any]:
        """The options that were given, and the coverage that holds by default."""
        given = {name: getattr(self, name) for name in self.__slots__}
        given |= {"floors": dict(self.floors) or None, "separate_output": self.separate_output or None}
        options = {name: value for name, value in given.items() if value is not None}
        return options | ({"coverage": DEFAULT_COVERAGE} if self.share == DEFAULT_COVERAGE else {})
