"""How many tokens to draft before a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from trimserve.concurrency import Lock

# The longest block by default. On two cores the product with 144,256 x 256 BF16 rows takes 0.57 ms a step for
# 16 steps, 0.46 for 32 and 0.43 for 64: past 32 another step costs about what it shares.
LONGEST_DRAFT = 32
# How fast the limit of a block's size grows while drafts stand.
_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """What blocks cost, and how many drafts stand.

    Attributes:
        stood: accepted drafts, older ones counting less.
        drafted: of so many.
        step_seconds: of one step of the decoder; 0 where none was measured.
        check_seconds: of a check, by the size of its block.
    """

    stood: float = 4.0
    drafted: float = 4.2
    step_seconds: float = 0.0
    check_seconds: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))

    def after(
        self, size: int, stood: int, drafted: int, step_seconds: float, check_seconds: float
    ) -> "Costs":
        """With one more block; see `DraftLength.note`."""
        decay = 0.98**drafted
        step = _average(self.step_seconds, step_seconds) if step_seconds > 0 else self.step_seconds
        check = _average(self.check_seconds.get(size, 0.0), check_seconds)
        checks = MappingProxyType({**self.check_seconds, size: check})
        return Costs(decay * self.stood + stood, decay * self.drafted + drafted, step, checks)

    def check_cost(self, size: int) -> float:
        """Seconds of a check; of a size that was not measured yet as of the nearest smaller one.

        The rows are read once in either case.
        """
        if size in self.check_seconds or not self.check_seconds:
            return self.check_seconds.get(size, 0.0)
        known = [measured for measured in self.check_seconds if measured < size]
        return self.check_seconds[max(known) if known else min(self.check_seconds)]


class LearnedCosts:
    """The costs that all requests of a model learn from each other, in any number of threads.

    They follow the machine; the tokens do not depend on them.

    Attributes:
        now: what is known.
    """

    def __init__(self) -> None:
        self.now = Costs()
        self._lock = Lock()

    def note(self, size: int, stood: int, drafted: int, step_seconds: float, check_seconds: float) -> None:
        """Learn from a block; see `DraftLength.note`."""
        with self._lock:
            self.now = self.now.after(size, stood, drafted, step_seconds, check_seconds)


class DraftLength:
    """How many tokens of one request to draft before a check, from what was learned.

    A block of B steps costs ``B * step + check(B)``, or the larger of the two where the check overlaps with
    the next drafts. If each draft stands with probability p, it gives ``(1 - p^B) / (1 - p)`` tokens: those
    up to and with the first that differs. Of the powers of two up to the maximum, the size with the lowest
    cost a token is taken. A request begins with one step until its first token, then blocks grow.
    """

    def __init__(
        self, maximum: int = LONGEST_DRAFT, *, overlap: bool = False, learned: LearnedCosts | None = None
    ) -> None:
        self._overlap = overlap
        self._sizes = [1 << power for power in range(maximum.bit_length()) if 1 << power <= maximum]
        self._limit = 1
        self._learned = learned or LearnedCosts()

    @property
    def size(self) -> int:
        """The block size to draft next."""
        if self._limit == 1:
            return 1
        costs = self._learned.now
        return min(
            (size for size in self._sizes if size <= self._limit), key=lambda size: self._cost(costs, size)
        )

    def _cost(self, costs: Costs, size: int) -> float:
        stand = min(costs.stood / costs.drafted, 0.9999)
        tokens = (1 - stand**size) / (1 - stand)
        draft, check = size * costs.step_seconds, costs.check_cost(size)
        return (max(draft, check) if self._overlap else draft + check) / tokens

    def note(self, size: int, stood: int, drafted: int, step_seconds: float, check_seconds: float) -> None:
        """Learn from a block: its size, accepted drafts of those judged, and what it cost."""
        grown, shrunk = min(_GROWTH * self._limit, self._sizes[-1]), max(self._limit // 2, 1)
        self._limit = grown if stood == drafted else shrunk
        self._learned.note(size, stood, drafted, step_seconds, check_seconds)


def _average(old: float, new: float) -> float:
    return new if old == 0 else 0.8 * old + 0.2 * new
