"""A KV cache that is read in again where the model's positions change for all of its tokens.

Phi-3 has one set of rotary frequencies for short texts and one for long ones, and transformers goes through a
text again when it grows beyond the short set: keys of the one set mean nothing to queries of the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimserve.arrays import Ids, Mask
from trimserve.runtime.bound import Bound
from trimserve.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    import onnxruntime as ort


class RestartingCache:
    """A `KVCache` that knows the token ids in it, for sequences of one length.

    Attributes:
        ids: token ids int32 (B, L) that were fed.
    """

    def __init__(self, inner: KVCache, batch: int, unchanged: int) -> None:
        """Wrap a cache that holds nothing yet.

        Args:
            inner: where keys and values are.
            batch: B.
            unchanged: most tokens with the first set of frequencies.
        """
        self._inner = inner
        self._unchanged = unchanged
        self._is_long = False
        self.ids: Ids = np.zeros((batch, 0), np.int32)

    @property
    def mask(self) -> Mask:
        """1 where a cached position holds a token."""
        return self._inner.mask

    def append(self, new: Mask) -> None:
        """Count positions; see `KVCache`."""
        self._inner.append(new)

    @property
    def lengths(self) -> Mask:
        """Tokens of each sequence."""
        return self._inner.lengths

    @property
    def bound(self) -> Bound:
        """What its steps are bound to."""
        return self._inner.bound

    def feed(self, new: Ids, empty: KVCache) -> Ids:
        """Take note of token ids (B, T) that are fed next.

        Args:
            new: the token ids.
            empty: what to start from where the tokens before them have keys of the other set.

        Returns:
            What is to be fed: `new`, or all tokens so far.
        """
        self.ids = np.concatenate([self.ids, new], axis=1)
        is_long = self.ids.shape[1] > self._unchanged
        again = is_long != self._is_long and self.ids.shape[1] > new.shape[1]
        self._is_long = is_long
        if again:
            self._inner = empty
            return self.ids
        return new

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":
        """What a step reads; see `KVCache`."""
        return self._inner.inputs(new)

    def buffers(self) -> "dict[str, ort.OrtValue]":
        """Where a step writes; see `KVCache`."""
        return self._inner.buffers()

    def take(self, present: "Sequence[ort.OrtValue]") -> None:
        """Keep what a step returned; see `KVCache`."""
        self._inner.take(present)

    def cut(self, drop: Mask) -> None:
        """Take the last `drop[b]` tokens out, equally many of each sequence."""
        self._inner.cut(drop)
        self.ids = self.ids[:, : self.ids.shape[1] - int(drop[0])]

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given sequences."""
        self._inner.select(rows)
        self.ids = self.ids[np.asarray(rows, np.int64)]
