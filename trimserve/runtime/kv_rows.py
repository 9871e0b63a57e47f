"""Keys and values of many sequences in shared buffers, a row each, with a length of its own.

GroupQueryAttention counts a row's positions from the buffer's start, so rows are aligned at the left, and a
step of one token takes rows of unequal length. A prompt goes into its row alone. Rows that run together lie
side by side at the front: nothing is copied at a step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimserve.arrays import Array, Mask
from trimserve.runtime.bound import Bound
from trimserve.runtime.kv_cache import KVLayout

if TYPE_CHECKING:
    import onnxruntime as ort


class KVRows:
    """Buffers (B, heads, S, head size), one for the keys and one for the values of each layer.

    Attributes:
        lengths: int64 (B,), positions of each row that hold something.
        capacity: S.
        position_bytes: of one position of one row, all layers.
    """

    def __init__(self, layout: KVLayout, most: int) -> None:
        """Hold nothing yet.

        Args:
            layout: of the graph's keys and values.
            most: rows, at most.
        """
        self._layout = layout
        self._most = most
        self.capacity = 0
        self.lengths: Mask = np.zeros(0, np.int64)
        self.position_bytes = sum(heads * size for heads, size in layout.shapes) * layout.dtype.itemsize
        self._arrays: list[Array] = []
        self._views: dict[tuple[int, int], RowsView] = {}

    @property
    def count(self) -> int:
        """B."""
        return len(self.lengths)

    def resize(self, rows: int, capacity: int, keep: Sequence[int]) -> None:
        """Have other buffers, a layer after the other, so that no more than one is there twice.

        Pages that nothing is written to take no memory.

        Args:
            rows: B.
            capacity: S.
            keep: how many positions of each row to copy, from the first row on; the others begin empty.
        """
        if rows > self._most:
            raise ValueError(f"{rows} rows were asked for, and {self._most} are the most")
        old, self._arrays = self._arrays or [None] * len(self._layout.shapes), []
        self._views.clear()
        for index, (heads, size) in enumerate(self._layout.shapes):
            made = np.zeros((rows, heads, capacity, size), self._layout.dtype)
            before, old[index] = old[index], None
            if before is not None:
                for row, length in enumerate(keep):
                    made[row, :, :length] = before[row, :, :length]
            self._arrays.append(made)
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int64)
        self.lengths[: len(keep)] = keep

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first positions of another one, and hold nothing else."""
        for array in self._arrays:
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target] = length

    def swap(self, first: int, second: int) -> None:
        """Let two rows change places."""
        length = int(max(self.lengths[first], self.lengths[second]))
        for array in self._arrays:
            kept = array[first, :, :length].copy()
            array[first, :, :length] = array[second, :, :length]
            array[second, :, :length] = kept
        self.lengths[[first, second]] = self.lengths[[second, first]]

    def view(self, first: int, count: int) -> "RowsView":
        """Some rows as the cache of one run; valid until `resize`."""
        found = self._views.get((first, count))
        if found is None:
            found = RowsView(self, [array[first : first + count] for array in self._arrays], first)
            self._views[first, count] = found
        return found

    def values(self, arrays: Sequence[Array]) -> "tuple[dict[str, ort.OrtValue], dict[str, ort.OrtValue]]":
        """Arrays as the graph's past and its present, which are the same."""
        shared = [self._layout.on_cpu(array) for array in arrays]
        past = dict(zip(self._layout.past, shared, strict=True))
        return past, dict(zip(self._layout.present, shared, strict=True))


class RowsView:
    """A `KVCache` of rows that lie side by side. What it appends or cuts is the rows' own."""

    def __init__(self, rows: KVRows, arrays: Sequence[Array], first: int) -> None:
        self._rows = rows
        self._place = slice(first, first + len(arrays[0]))
        self._past, self._present = rows.values(arrays)
        self.bound = Bound()

    @property
    def lengths(self) -> Mask:
        """Tokens of each row; a copy."""
        return self._rows.lengths[self._place].copy()

    @property
    def mask(self) -> Mask:
        """As wide as the longest of the rows."""
        lengths = self._rows.lengths[self._place]
        mask: Mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        return mask

    def append(self, new: Mask) -> None:
        """Every row gets equally many positions; see `KVCache`."""
        self._rows.lengths[self._place] += new.shape[1]
        if self._rows.lengths[self._place].max() > self._rows.capacity:
            # The operator would write behind the row's end.
            raise ValueError(f"a row is full: it has room for {self._rows.capacity} positions")

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":  # noqa: ARG002 - there is room for them
        """The rows."""
        return dict(self._past)

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """The same rows."""
        return self._present

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """Nothing to do: the rows are the present."""

    def cut(self, drop: Mask) -> None:
        """Forget the last positions of each row; the next step writes over them."""
        self._rows.lengths[self._place] -= drop

    def select(self, rows: Sequence[int]) -> None:
        """Only all of them, as they are: rows are moved where they are."""
        if list(rows) != list(range(self._place.stop - self._place.start)):
            raise ValueError(f"a view of rows cannot choose among them: {list(rows)}")
