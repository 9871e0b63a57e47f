"""Which sequence has which row of the buffers: those that decode lie at the front, side by side.

Behind them are the row of the prompt that is being read, rows of prompts that were answered lately, whose
keys and values can begin another prompt, and empty ones.
"""

from dataclasses import dataclass, field

import numpy as np

from trimserve.arrays import Counts, Ids
from trimserve.engine.task import Task
from trimserve.errors import UsageError
from trimserve.runtime.kv_cache import KVCache
from trimserve.runtime.kv_rows import KVRows

_FIRST_CAPACITY = 256  # positions of a row at first
# Positions that are fed again however much of a prompt is there: a step of one token has other last bits.
_FED_AGAIN = 2


@dataclass(slots=True, eq=False)
class Row:
    """One row.

    Attributes:
        task: whose it is; None where it is free.
        prompt: the token ids at its start whose keys and values were made as a prompt's are, int32 (n,).
        written: positions that were ever written, which have taken memory.
        used: when it was used last, counted in requests.
    """

    task: Task | None = None
    prompt: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    written: int = 0
    used: int = 0

    @property
    def held(self) -> int:
        """Positions that it has taken or will take."""
        return self.written if self.task is None else max(self.written, positions(self.task))


def positions(task: Task) -> int:
    """Positions that a request takes at most: its last token is produced and not fed."""
    return int(task.request.prompt.size) + max(task.request.max_tokens, 1) - 1


class RowTable:
    """Gives rows to requests, within a budget.

    Attributes:
        live: how many rows decode.
    """

    def __init__(self, rows: KVRows, *, most: int, budget: int, reuses: bool) -> None:
        """Give nothing yet.

        Args:
            rows: the buffers.
            most: rows in use at a time, at most.
            budget: bytes of keys and values, at most.
            reuses: let a prompt begin with what another one has left.
        """
        self._kv = rows
        self._most = most
        self._budget = budget // rows.position_bytes
        self._reuses = reuses
        self._rows: list[Row] = []
        self._clock = 0
        self.live = 0

    @property
    def tasks(self) -> list[Task]:
        """The requests that decode, in the order of their rows."""
        return [row.task for row in self._rows[: self.live] if row.task is not None]

    @property
    def used_bytes(self) -> int:
        """Of the positions that requests at work have filled."""
        filled = sum(int(n) for n, row in zip(self._kv.lengths, self._rows, strict=True) if row.task)
        return filled * self._kv.position_bytes

    @property
    def held_bytes(self) -> int:
        """Of all positions that have taken memory."""
        return sum(row.written for row in self._rows) * self._kv.position_bytes

    def check(self, task: Task) -> None:
        """Refuse a request that would not even fit alone.

        Raises:
            UsageError: see above.
        """
        if positions(task) > self._budget:
            raise UsageError(
                f"a prompt of {task.prompt_tokens:,} tokens and {task.request.max_tokens:,} new ones need "
                f"keys and values of {positions(task) * self._kv.position_bytes:,} bytes, and kv_memory is "
                f"{self._budget * self._kv.position_bytes:,}: lower max_new_tokens, or raise kv_memory."
            )

    def fits(self, task: Task) -> bool:
        """Whether a request fits beside those at work."""
        busy = [row for row in self._rows if row.task is not None]
        return len(busy) < self._most and sum(row.held for row in busy) + positions(task) <= self._budget

    def admit(self, task: Task) -> int:
        """Give a request that fits a row, which begins with what is known of its prompt; gives its place."""
        self._clock += 1
        needed = positions(task)
        source, length = self._longest_prefix(task.request.prompt)
        prefix = self._rows[source] if length else None
        if all(row.task for row in self._rows) or needed > self._kv.capacity:
            self._grow(needed)
        place = self._free_place(prefix)
        if sum(row.held for i, row in enumerate(self._rows) if i != place) + needed > self._budget:
            self._forget(prefix)
            place = self._free_place(prefix)
        row = self._rows[place]
        if prefix is not None and prefix is not row:
            self._kv.copy(self._rows.index(prefix), place, length)
        self._kv.lengths[place] = length
        row.task, row.prompt, row.used = task, task.request.prompt[:length], self._clock
        task.cached_tokens = length
        return place

    def place_of(self, task: Task) -> int:
        """Where a request's row is now."""
        return next(place for place, row in enumerate(self._rows) if row.task is task)

    def has_read(self, task: Task) -> None:
        """Note how much of a request's prompt is in its row."""
        place = self.place_of(task)
        row = self._rows[place]
        length = int(self._kv.lengths[place])
        # One token alone is fed by a step whose products have one row.
        row.prompt = task.request.prompt[: length if task.request.prompt.size > 1 else 0]
        row.written = max(row.written, length)

    def promote(self, task: Task) -> None:
        """Let a request decode that has read its prompt: its row becomes the last of those that do."""
        self._swap(self.place_of(task), self.live)
        self.live += 1

    def release(self, task: Task) -> None:
        """Take a request's row; what its prompt left stays for others, as long as nobody needs the row."""
        place = self.place_of(task)
        self._note_written()
        self._rows[place].task = None
        self._kv.lengths[place] = self._rows[place].prompt.size
        if place < self.live:
            self.live -= 1
            self._swap(place, self.live)

    def view(self, count: int | None = None) -> KVCache:
        """The rows that decode; `count` adds some behind them."""
        return self._kv.view(0, self.live if count is None else count)

    def view_of(self, task: Task) -> KVCache:
        """The row of one request."""
        return self._kv.view(self.place_of(task), 1)

    def pad(self, count: int) -> None:
        """Have so many rows at least, the last of them with room for a token that nobody reads."""
        if self._kv.count < count:
            self._grow(self._kv.capacity)
        for place in range(self.live, count):
            row = self._rows[place]
            if row.task is None and self._kv.lengths[place]:
                row.prompt = row.prompt[:0]
                self._kv.lengths[place] = 0

    def unpad(self, count: int) -> None:
        """Forget the token of what `pad` added."""
        self._kv.lengths[self.live : count] -= 1

    def cut(self, drop: Counts) -> None:
        """Forget the last positions of the rows that decode, int64 (live,)."""
        self._note_written()
        self._kv.lengths[: self.live] -= drop

    def _note_written(self) -> None:
        for row, length in zip(self._rows, self._kv.lengths.tolist(), strict=True):
            row.written = max(row.written, length)

    def _longest_prefix(self, prompt: Ids) -> tuple[int, int]:
        """The row that begins like a prompt, and how far."""
        best, longest = 0, 0
        if self._reuses:
            for place, row in enumerate(self._rows):
                count = min(row.prompt.size, prompt.size - _FED_AGAIN)
                if count > longest:
                    differs = np.flatnonzero(row.prompt[:count] != prompt[:count])
                    shared = int(differs[0]) if differs.size else count
                    if shared > longest:
                        best, longest = place, shared
        return best, longest

    def _free_place(self, prefix: Row | None) -> int:
        """The free row that is missed least: the prefix's own, an empty one, or the one not used longest."""
        free = [place for place, row in enumerate(self._rows) if row.task is None]
        return min(
            free,
            key=lambda i: (self._rows[i] is not prefix, self._rows[i].prompt.size > 0, self._rows[i].used),
        )

    def _grow(self, needed: int) -> None:
        """Make room for another row, or longer ones, by doubling."""
        rows = self._kv.count
        if all(row.task for row in self._rows):
            rows = min(max(2 * rows, 1), self._most)
        capacity = max(self._kv.capacity, _FIRST_CAPACITY)
        while capacity < needed:
            capacity *= 2
        self._resize(rows, capacity)

    def _forget(self, prefix: Row | None) -> None:
        """Give the memory of free rows back, but for what the next prompt begins with."""
        for row in self._rows:
            if row.task is None and row is not prefix:
                row.prompt = row.prompt[:0]
        self._resize(self._kv.count, self._kv.capacity)

    def _resize(self, rows: int, capacity: int) -> None:
        keep = [
            int(length) if row.task else row.prompt.size
            for row, length in zip(self._rows, self._kv.lengths, strict=True)
        ]
        self._kv.resize(rows, capacity, keep)
        for row, length in zip(self._rows, keep, strict=True):
            row.written = length
        self._rows += [Row() for _ in range(rows - len(self._rows))]

    def _swap(self, first: int, second: int) -> None:
        if first != second:
            self._kv.swap(first, second)
            self._rows[first], self._rows[second] = self._rows[second], self._rows[first]
            for place in (first, second):
                self._rows[place].written = max(self._rows[place].written, int(self._kv.lengths[place]))
