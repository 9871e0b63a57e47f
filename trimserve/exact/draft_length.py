"""How many tokens to draft before a check."""

# The longest block by default. On two cores the product with 144,256 x 256 BF16 rows takes 0.57 ms a step for
# 16 steps, 0.46 for 32 and 0.43 for 64: past 32 another step costs about what it shares.
LONGEST_DRAFT = 32
# How fast the limit of a block's size grows while drafts stand.
_GROWTH = 4


class DraftLength:
    """How many tokens to draft before a check, from measured costs and the share of drafts that stand.

    A block of B steps costs ``B * step + check(B)``, or the larger of the two where the check overlaps with
    the next drafts. If each draft stands with probability p, it gives ``(1 - p^B) / (1 - p)`` tokens: those
    up to and with the first that differs. Of the powers of two up to the maximum, the size with the lowest
    cost a token is taken. Costs are averages over the requests so far, so they follow the machine; the
    tokens do not depend on them.
    """

    def __init__(self, maximum: int = LONGEST_DRAFT, *, overlap: bool = False) -> None:
        self._overlap = overlap
        self._sizes = [1 << power for power in range(maximum.bit_length()) if 1 << power <= maximum]
        self._limit = 1
        self._stood = 4.0
        self._drafted = 4.2
        self._step_seconds = 0.0
        self._check_seconds: dict[int, float] = {}

    def start(self) -> None:
        """Begin a request: one step until its first token, then blocks grow. What was learned stays."""
        self._limit = 1

    @property
    def size(self) -> int:
        """The block size to draft next."""
        if self._limit == 1:
            return 1
        return min((size for size in self._sizes if size <= self._limit), key=self._cost)

    def _cost(self, size: int) -> float:
        stand = min(self._stood / self._drafted, 0.9999)
        tokens = (1 - stand**size) / (1 - stand)
        draft, check = size * self._step_seconds, self._check_cost(size)
        return (max(draft, check) if self._overlap else draft + check) / tokens

    def _check_cost(self, size: int) -> float:
        if size in self._check_seconds or not self._check_seconds:
            return self._check_seconds.get(size, 0.0)
        # Not measured yet: as the nearest smaller size, since the rows are read once in either case.
        known = [measured for measured in self._check_seconds if measured < size]
        return self._check_seconds[max(known) if known else min(self._check_seconds)]

    def note(self, size: int, stood: int, drafted: int, step_seconds: float, check_seconds: float) -> None:
        """Learn from a block: its size, drafts that stood of those judged, and what it cost."""
        decay = 0.98**drafted
        self._stood = decay * self._stood + stood
        self._drafted = decay * self._drafted + drafted
        grown, shrunk = min(_GROWTH * self._limit, self._sizes[-1]), max(self._limit // 2, 1)
        self._limit = grown if stood == drafted else shrunk
        if step_seconds > 0:
            self._step_seconds = _average(self._step_seconds, step_seconds)
        self._check_seconds[size] = _average(self._check_seconds.get(size, 0.0), check_seconds)


def _average(old: float, new: float) -> float:
    return new if old == 0 else 0.8 * old + 0.2 * new
