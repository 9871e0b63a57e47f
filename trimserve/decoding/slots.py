"""The cold slots of one request: ids that stand in its prompt, or that it has produced."""

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.decoding.columns import Columns, join_columns
from trimserve.runtime.after_head import AfterHead, apply_after_head
from trimserve.runtime.cold_rows import ColdRows

# Cold ids of one request that may be drafted; each costs one row of the head a step.
MAX_SLOTS = 64


class DraftSlots:
    """The cold ids that one request may draft: those of its prompt and of its output.

    The least recently used id leaves when there are more than `MAX_SLOTS`.
    """

    def __init__(self, kept: Columns, cold: ColdRows, after_head: AfterHead, prompt_cold_ids: Ids) -> None:
        self._after_head = after_head
        self._kept = kept
        self._cold = cold
        self.ids: list[int] = []
        self.columns = kept
        latest_first = dict.fromkeys(prompt_cold_ids[::-1].tolist())
        self._hold(list(latest_first)[:MAX_SLOTS][::-1])

    def use(self, cold_id: int) -> None:
        """Note that a cold id was produced."""
        self._hold([*(held for held in self.ids if held != cold_id), cold_id][-MAX_SLOTS:])

    def _hold(self, ids: list[int]) -> None:
        if ids == self.ids or not self._cold.has_head:
            return
        self.ids = ids
        self.columns = join_columns(self._kept, ids)
        index = np.array(ids, np.int32)
        self._rows = self._cold.head(index).astype(np.float32)
        bias = self._cold.head_bias(index) if self._cold.has_head_bias else np.zeros(len(ids))
        self._bias = bias.astype(np.float32)

    def extend(self, logits: Floats, hidden: Floats) -> Floats:
        """Append the slots' logits to the kept ids': float32 (K,), (H,) -> (K + S,)."""
        return np.concatenate([logits, self._logits(hidden)]) if self.ids else logits

    def best(self, logits: Floats, hidden: Floats) -> int:
        """The token id of the largest of these logits, the lowest on a tie."""
        column = int(logits.argmax())  # kept ids are sorted: the first is the lowest
        kept_id = int(self._kept.ids[column])
        if not self.ids:
            return kept_id
        slot_logits = self._logits(hidden)
        largest = slot_logits.max()
        if largest < logits[column]:
            return kept_id
        ties = [self.ids[slot] for slot in np.flatnonzero(slot_logits == largest)]
        return min(ties if largest > logits[column] else [*ties, kept_id])

    def _logits(self, hidden: Floats) -> Floats:
        product = self._rows @ self._cold.head_input(hidden)
        return apply_after_head(product, self._bias, self._after_head)
