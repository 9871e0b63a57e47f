"""KV caches: the keys and values of the tokens fed so far, in the two ways that graphs want them.

Graphs with `Concat` in their attention return a longer array at every step (`GrowingCache`). Graphs with
GroupQueryAttention write into a buffer that past and present share (`SharedCache`): nothing is copied at a
step, and cutting costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trimserve.arrays import Array, Mask
from trimserve.errors import require
from trimserve.runtime.bound import Bound

if TYPE_CHECKING:
    import onnxruntime as ort

_FIRST_CAPACITY = 256  # positions of a new shared buffer; it doubles when it is full


class KVCache(Protocol):
    """The cache of a batch of sequences, aligned at their right ends (in `kv_rows.py` at their left)."""

    @property
    def mask(self) -> Mask:
        """1 where a cached position holds a token of its sequence, int64 (B, L)."""
        ...

    @property
    def bound(self) -> Bound:
        """What its steps are bound to."""
        ...

    @property
    def lengths(self) -> Mask:
        """Tokens of each sequence, int64 (B,)."""
        ...

    def append(self, new: Mask) -> None:
        """Count positions that are fed next, int64 (B, T), 1 where they hold a token."""
        ...

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":
        """What a step that feeds `new` positions reads; `mask` counts them already."""
        ...

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """Where the step writes the present; nothing if the graph makes it."""
        ...

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """Keep what the step returned, in the order of `KVLayout.present`."""
        ...

    def cut(self, drop: Mask) -> None:
        """Take the last `drop[b]` tokens of each sequence out, int64 (B,); each at most its length."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given sequences of the batch, in that order."""
        ...


class KVLayout:
    """Names, shapes and place of a graph's keys and values.

    Attributes:
        past: input names, one for the keys and one for the values of each layer.
        present: output names, in the same order.
        shapes: (heads, head size) of each.
        dtype: of the entries.
        device: where the graph leaves them.
    """

    def __init__(
        self,
        past: Sequence[str],
        present: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        dtype: "np.dtype[Any]",
        device: str,
    ) -> None:
        self._runtime = require("onnxruntime", extra="cpu", purpose="running a trimmed model")
        self.past = list(past)
        self.present = list(present)
        self.shapes = list(shapes)
        self.dtype = dtype
        self.device = device

    def zeros(self, batch: int, length: int) -> "list[ort.OrtValue]":
        """Values of `length` positions that hold nothing."""
        return [
            self.to_device(np.zeros((batch, heads, length, size), self.dtype)) for heads, size in self.shapes
        ]

    def on_cpu(self, array: Array) -> "ort.OrtValue":
        """Share an array with ONNX Runtime; one that is not contiguous is copied."""
        # np.ascontiguousarray would give a number an axis.
        whole = array if array.flags.c_contiguous else array.copy()
        value: ort.OrtValue = self._runtime.OrtValue.ortvalue_from_numpy(whole)
        return value

    def to_device(self, array: Array) -> "ort.OrtValue":
        """Hand an array to ONNX Runtime; on the CPU it is shared, not copied."""
        value: ort.OrtValue = self._runtime.OrtValue.ortvalue_from_numpy(array, self.device)
        return value


class GrowingCache:
    """A `KVCache` for graphs that return past and new positions as one longer array."""

    def __init__(self, layout: KVLayout, batch: int) -> None:
        self._layout = layout
        self._values = layout.zeros(batch, 0)
        self.mask: Mask = np.zeros((batch, 0), np.int64)
        self.bound = Bound()

    @property
    def lengths(self) -> Mask:
        """Tokens of each sequence."""
        lengths: Mask = self.mask.sum(axis=1)
        return lengths

    def append(self, new: Mask) -> None:
        """Count positions; see `KVCache`."""
        self.mask = np.concatenate([self.mask, new], axis=1)

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":  # noqa: ARG002 - the graph makes the room
        """The past."""
        return dict(zip(self._layout.past, self._values, strict=True))

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """None: the graph makes the present."""
        return {}

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """The present is the next step's past."""
        self._values = list(present)

    def cut(self, drop: Mask) -> None:
        """Copy what is left of each sequence, aligned at the right again."""
        if not drop.any():
            return
        lengths = self.lengths - drop
        width = int(lengths.max())
        starts = self.mask.shape[1] - drop - width  # first position of each sequence's window
        self._replace(lambda values: _windows(values, starts, width))
        self.mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)

    def select(self, rows: Sequence[int]) -> None:
        """Copy the chosen sequences, without the padding that none of them needs."""
        if list(rows) == list(range(self.mask.shape[0])):
            return
        mask = self.mask[np.asarray(rows, np.int64)]
        start = mask.shape[1] - int(mask.sum(axis=1).max(initial=0))
        self._replace(lambda values: np.ascontiguousarray(values[rows, :, start:]))
        self.mask = np.ascontiguousarray(mask[:, start:])

    def _replace(self, change: Callable[[Array], Array]) -> None:
        self._values = [self._layout.to_device(change(value.numpy())) for value in self._values]


class SharedCache:
    """A `KVCache` in buffers that past and present share, for graphs with GroupQueryAttention.

    For sequences of one length, such as beams: the operator counts positions from the buffer's start, so
    that others could not be aligned at the right.
    """

    def __init__(self, layout: KVLayout, batch: int) -> None:
        self._layout = layout
        self._capacity = _FIRST_CAPACITY
        self._values = layout.zeros(batch, self._capacity)
        self.mask: Mask = np.zeros((batch, 0), np.int64)
        self.bound = Bound()

    @property
    def lengths(self) -> Mask:
        """Tokens of each sequence, all alike."""
        return np.full(self.mask.shape[0], self.mask.shape[1], np.int64)

    def append(self, new: Mask) -> None:
        """Count positions; see `KVCache`."""
        self.mask = np.concatenate([self.mask, new], axis=1)

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":
        """The buffers, with room for the new positions."""
        self._reserve(self.mask.shape[1], kept=self.mask.shape[1] - new)
        return dict(zip(self._layout.past, self._values, strict=True))

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """The same buffers."""
        return dict(zip(self._layout.present, self._values, strict=True))

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """Nothing to do: the buffers are the present."""

    def cut(self, drop: Mask) -> None:
        """Forget the last positions, equally many of each; the next step writes over them."""
        if (drop != drop[0]).any():
            raise ValueError(f"sequences of a shared cache have one length: {drop.tolist()} cannot be cut")
        self.mask = self.mask[:, : self.mask.shape[1] - int(drop[0])]

    def select(self, rows: Sequence[int]) -> None:
        """Copy the chosen sequences into buffers of their own."""
        if list(rows) != list(range(self.mask.shape[0])):
            self._copy(list(rows), self.mask.shape[1])
            self.mask = self.mask[np.asarray(rows, np.int64)]

    def _reserve(self, length: int, *, kept: int) -> None:
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity *= 2
        self._copy(list(range(self.mask.shape[0])), kept)

    def _copy(self, rows: list[int], kept: int) -> None:
        """Move the first `kept` positions of some sequences to new buffers of the capacity."""
        copies = []
        for value in self._values:
            old = value.numpy()
            new = np.zeros((len(rows), old.shape[1], self._capacity, old.shape[3]), old.dtype)
            new[:, :, :kept] = old[rows, :, :kept]
            copies.append(self._layout.to_device(new))
        self._values = copies


def _windows(values: Array, starts: Mask, width: int) -> Array:
    """Copy `width` positions of axis 2 from each sequence's own start; before position 0 come zeros."""
    out = np.zeros((*values.shape[:2], width, values.shape[3]), values.dtype)
    for row, start in enumerate(starts.tolist()):
        skip = max(0, -start)  # a shorter sequence has less on its left than the window asks for
        out[row, :, skip:] = values[row, :, start + skip : start + width]
    return out
