"""Which token id each logit belongs to, and the ids so far: what a logits processor sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.errors import UsageError
from trimserve.foreign import foreign

_ADVICE = "return float32 logits of the shape that it is given."
# (token ids of prompt and output, logits over the full vocab (V,)) -> logits (V,); must be a pure function.
LogitsProcessor = Callable[[Ids, Floats], Floats]


@dataclass(frozen=True, slots=True)
class History:
    """Token ids so far: int32 arrays of any length; `source` is what an encoder-decoder's encoder reads."""

    prompt: Ids
    output: Ids
    source: Ids | None = None

    @property
    def ids(self) -> Ids:
        """Prompt and output together."""
        return np.concatenate([self.prompt, self.output])

    @property
    def given(self) -> Ids:
        """The text that was given."""
        return self.prompt if self.source is None else self.source


class Columns:
    """Which token id each entry of a logits array belongs to.

    Attributes:
        ids: int32 (n,), distinct token ids.
        vocab_size: V; a processor sees the logits at this width.
    """

    def __init__(self, ids: Ids, vocab_size: int) -> None:
        self.ids = ids
        self.vocab_size = vocab_size
        self._column_of = np.full(vocab_size, -1, np.int32)
        self._column_of[ids] = np.arange(ids.size, dtype=np.int32)

    def has(self, token_id: int) -> bool:
        """Whether an id has a column."""
        return bool(self._column_of[token_id] >= 0)

    def find(self, ids: Ids) -> npt.NDArray[np.int32]:
        """Columns of those of the given ids that have one."""
        known = ids[(ids >= 0) & (ids < self.vocab_size)]
        columns: npt.NDArray[np.int32] = self._column_of[known]
        return columns[columns >= 0]

    def apply(self, processor: LogitsProcessor, history: Ids, logits: Floats) -> Floats:
        """Run a processor on the logits at full width, -inf where there is no column."""
        full = np.full(self.vocab_size, -np.inf, np.float32)
        full[self.ids] = logits
        given = processor(history, full)
        with foreign("a logits_processor returned no array of numbers", advice=_ADVICE, error=UsageError):
            changed = np.asarray(given, np.float32)
        if changed.shape != full.shape:
            raise UsageError(
                f"a logits_processor must return an array of shape ({self.vocab_size},) as it was given, "
                f"found {changed.shape}."
            )
        if not changed.max(initial=-np.inf) < np.inf:
            raise UsageError(
                "a logits_processor must return numbers, or -inf for what is not allowed, found NaN or +inf: "
                "for a token that must come, set the others to -inf."
            )
        return changed[self.ids]


def join_columns(first: Columns, extra: Sequence[int]) -> Columns:
    """The columns of `first`, followed by some more ids."""
    return Columns(np.concatenate([first.ids, np.asarray(extra, np.int32)]), first.vocab_size)
