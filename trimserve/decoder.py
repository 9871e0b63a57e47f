"""One decoder graph and its KV cache: feed compact ids, get compact logits and hidden states.

Nothing here knows tokens' meaning, sampling or exactness; see `generation.py` for the loop around it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import UnsupportedModelError, require

if TYPE_CHECKING:
    import onnxruntime as ort

Floats = npt.NDArray[np.float32]
# What stands between the head's product and the logits: operators with the number each takes, None where
# it takes none (Tanh) or one a token (an Add of the bias). The serving passes write it into the graph.
AfterHead = tuple[tuple[str, float | None], ...]
AFTER_HEAD_KEY = "trimserve.after_head"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(slots=True)
class KVCache:
    """Keys and values of the tokens fed so far, for a batch of sequences aligned at their right ends.

    Attributes:
        values: one array (B, heads, L, head size) a key and value of each layer, where the graph left it.
        mask: int64 (B, L), 1 where a cached position holds a token of its sequence.
    """

    values: "list[ort.OrtValue]"
    mask: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 (B,)."""
        lengths: npt.NDArray[np.int64] = self.mask.sum(axis=1)
        return lengths


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the graph gave for the last `keep` positions.

    Attributes:
        logits: float32 (B, keep, K), the compact head's.
        hidden: (B, keep, H), the head's input, in the graph's dtype.
    """

    logits: Floats
    hidden: npt.NDArray[Any]


class Decoder:
    """A decoder-only graph with the serving passes of DESIGN.md section 5, bound to one session."""

    def __init__(self, session: "ort.InferenceSession", *, device: str = "cpu") -> None:
        self._runtime = require("onnxruntime", extra="cpu", purpose="running a trimmed model")
        self._session = session
        self._device = device
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        needed = {"input_ids", "attention_mask", "cold_rows", "logits_to_keep"}
        missing = sorted(
            (needed - inputs.keys()) | ({"logits", "hidden_states", *self._present} - set(outputs))
        )
        if missing or not self._past:
            raise UnsupportedModelError(
                f"the decoder graph lacks {', '.join(missing) or 'past_key_values'}: it was not made for "
                "serving. Export the model again with `trimserve export`."
            )
        self.takes_positions = "position_ids" in inputs
        self.dtype = np.dtype(_NUMPY_TYPES.get(inputs["cold_rows"].type, np.float32))
        self.hidden_size = int(inputs["cold_rows"].shape[1])
        first = inputs[self._past[0]]
        self._past_dtype = np.dtype(_NUMPY_TYPES.get(first.type, np.float32))
        self._past_shapes = [inputs[name].shape for name in self._past]
        self.after_head = _after_head(session.get_modelmeta().custom_metadata_map)
        self._binding = session.io_binding()

    def empty_cache(self, batch: int) -> KVCache:
        """A cache that holds nothing yet, for `batch` sequences."""
        values = [
            self._to_device(np.zeros((batch, int(shape[1]), 0, int(shape[3])), self._past_dtype))
            for shape in self._past_shapes
        ]
        return KVCache(values, np.zeros((batch, 0), np.int64))

    def step(
        self,
        cache: KVCache,
        ids: npt.NDArray[np.int64],
        cold_rows: npt.NDArray[Any],
        *,
        mask: npt.NDArray[np.int64] | None = None,
        keep: int = 1,
    ) -> Step:
        """Feed tokens and append them to the cache.

        Args:
            cache: of the same batch size; changed in place.
            ids: int64 (B, T), compact ids or K + slot.
            cold_rows: (S, H), S >= 1, the embeddings of the slots, in the graph's dtype.
            mask: int64 (B, T), 0 where `ids` is padding on the left; all 1 by default.
            keep: how many of the last positions to give logits for; 0 for all.
        """
        mask = np.ones_like(ids) if mask is None else mask
        past = cache.lengths
        cache.mask = np.concatenate([cache.mask, mask], axis=1)
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", cache.mask)
        binding.bind_cpu_input("cold_rows", cold_rows)
        binding.bind_cpu_input("logits_to_keep", np.array(keep, np.int64))
        if self.takes_positions:
            # A padded position gets position 0; the mask keeps it out of every sum.
            positions = past[:, None] + np.maximum(mask.cumsum(axis=1) - 1, 0)
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in zip(self._past, cache.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        binding.bind_output("hidden_states")
        for name in self._present:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        logits, hidden, *cache.values = binding.get_outputs()
        return Step(logits.numpy().astype(np.float32, copy=False), hidden.numpy())

    def cut(self, cache: KVCache, drop: npt.NDArray[np.int64]) -> None:
        """Take the last `drop[b]` tokens of each sequence out of the cache.

        Args:
            cache: changed in place; its sequences stay aligned at their right ends.
            drop: int64 (B,), tokens to drop, each at most the sequence's length.
        """
        if not drop.any():
            return
        lengths = cache.lengths - drop
        width = int(lengths.max())
        starts = cache.mask.shape[1] - drop - width  # first kept position of each sequence's window
        cache.values = [self._to_device(_windows(self._to_host(v), starts, width)) for v in cache.values]
        cache.mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)

    def select(self, cache: KVCache, rows: Sequence[int]) -> None:
        """Keep the given sequences of the batch, in that order."""
        index = np.asarray(rows, np.int64)
        if np.array_equal(index, np.arange(cache.mask.shape[0])):
            return
        mask = cache.mask[index]
        width = int(mask.sum(axis=1).max(initial=0))
        start = mask.shape[1] - width
        cache.values = [
            self._to_device(np.ascontiguousarray(self._to_host(v)[index, :, start:])) for v in cache.values
        ]
        cache.mask = np.ascontiguousarray(mask[:, start:])

    def _to_device(self, array: npt.NDArray[Any]) -> "ort.OrtValue":
        value: ort.OrtValue = self._runtime.OrtValue.ortvalue_from_numpy(array, self._device)
        return value

    def _to_host(self, value: "ort.OrtValue") -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = value.numpy()
        return array


def _after_head(metadata: Mapping[str, str]) -> AfterHead:
    return tuple((operator, number) for operator, number in json.loads(metadata.get(AFTER_HEAD_KEY, "[]")))


def apply_after_head(product: Floats, bias: Floats, after_head: AfterHead) -> Floats:
    """Make logits of the product of hidden states and head rows, as the graph does.

    Args:
        product: float32 (..., n).
        bias: float32 (n,), of the same token ids; zeros where the head has none.
        after_head: see `AfterHead`.
    """
    logits = product
    for operator, number in after_head:
        value = bias if number is None else np.float32(number)
        logits = np.tanh(logits) if operator == "Tanh" else _ARITHMETIC[operator](logits, value)
    return logits


_ARITHMETIC: dict[str, Callable[..., Floats]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


def _windows(values: npt.NDArray[Any], starts: npt.NDArray[np.int64], width: int) -> npt.NDArray[Any]:
    """Copy `width` positions of axis 2 from each sequence's own start; starts below 0 read zeros."""
    out = np.zeros((*values.shape[:2], width, values.shape[3]), values.dtype)
    for row, start in enumerate(starts.tolist()):
        skip = max(0, -start)  # a shorter sequence has less on its left than the window asks for
        out[row, :, skip:] = values[row, :, start + skip : start + width]
    return out
