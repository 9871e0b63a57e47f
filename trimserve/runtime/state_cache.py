"""Caches with states of a fixed size: short convolutions and linear attention, beside keys and values.

A state cannot be cut back: each token is mixed into it for good. So the states after the last few steps are
kept, and cutting goes back to one of them. Every step makes new ones anyway: keeping them costs memory alone.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimserve.arrays import Mask
from trimserve.runtime.bound import Bound
from trimserve.runtime.kv_cache import KVCache, KVLayout

if TYPE_CHECKING:
    import onnxruntime as ort

# What kept states of one sequence may take, and how many steps are kept at least and at most.
_BYTES = 64 << 20
_LEAST_REACH, _MOST_REACH = 3, 64


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Names, shapes and dtypes of a graph's states.

    Attributes:
        past: input names.
        present: output names, in the same order.
        shapes: of each, without the batch axis.
        dtypes: of each.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    shapes: "tuple[tuple[int, ...], ...]"
    dtypes: "tuple[np.dtype[Any], ...]"

    @property
    def reach(self) -> int:
        """How many tokens can be taken back, by the memory that this takes."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        step = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in sizes)
        return min(max(_BYTES // max(step, 1), _LEAST_REACH), _MOST_REACH)

    def zeros(self, layout: KVLayout, batch: int) -> "list[ort.OrtValue]":
        """The states before the first token."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return [layout.to_device(np.zeros((batch, *shape), dtype)) for shape, dtype in sizes]


class StateCache:
    """A `KVCache` for graphs with states; keys and values are in another one."""

    def __init__(self, inner: KVCache, layout: KVLayout, states: StateLayout, batch: int) -> None:
        """Wrap a cache that holds nothing yet.

        Args:
            inner: where keys and values are.
            layout: its layout.
            states: the layout of the states.
            batch: how many sequences.
        """
        self._inner, self._layout, self._states = inner, layout, states
        # After each of the last steps: how many tokens it fed, and the states.
        self._steps = deque([(0, states.zeros(layout, batch))], maxlen=states.reach + 1)
        self._fed = 0

    @property
    def mask(self) -> Mask:
        """1 where a cached position holds a token."""
        return self._inner.mask

    @property
    def lengths(self) -> Mask:
        """Tokens of each sequence."""
        return self._inner.lengths

    @property
    def bound(self) -> Bound:
        """What its steps are bound to."""
        return self._inner.bound

    def append(self, new: Mask) -> None:
        """Count positions that are fed next; see `KVCache`."""
        self._inner.append(new)

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":
        """Keys and values, and the states after the last step."""
        self._fed = new
        return self._inner.inputs(new) | dict(zip(self._states.past, self._steps[-1][1], strict=True))

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """Where a step writes keys and values; see `KVCache`."""
        return self._inner.buffers()

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """Keep what a step returned, the states last."""
        count = len(self._states.present)
        self._inner.take(present[:-count])
        self._steps.append((self._fed, list(present[-count:])))

    def cut(self, drop: Mask) -> None:
        """Go back by `drop[b]` tokens of each sequence, at most by `StateLayout.reach` since the prompt.

        Raises:
            ValueError: the states of that time are not kept.
        """
        places = [self._place(int(tokens)) for tokens in drop]
        if len(set(places)) == 1:
            states = self._steps[places[0]][1]
        else:
            parts = zip(*(self._steps[place][1] for place in places), strict=True)
            states = [
                self._layout.to_device(np.stack([value.numpy()[row] for row, value in enumerate(part)]))
                for part in parts
            ]
        self._restart(states)
        self._inner.cut(drop)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given sequences; what was fed until now cannot be taken back then."""
        states = self._steps[-1][1]
        if list(rows) != list(range(self.mask.shape[0])):
            states = [self._layout.to_device(value.numpy()[list(rows)]) for value in states]
        self._restart(states)
        self._inner.select(rows)

    def _place(self, tokens: int) -> int:
        """Which of the kept steps was the last one before some tokens."""
        place, left = len(self._steps) - 1, tokens
        while left > 0 and place > 0:
            left -= self._steps[place][0]
            place -= 1
        if left:
            raise ValueError(f"the states before the last {tokens} tokens are not kept")
        return place

    def _restart(self, states: "list[ort.OrtValue]") -> None:
        self._steps.clear()
        self._steps.append((0, states))
