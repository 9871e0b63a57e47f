"""One decoder graph and its KV cache: feed compact ids, get compact logits and hidden states.

Nothing here knows tokens' meaning, sampling or exactness; see `generation.py` for the loop around it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids, Rows
from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import Lengths
from trimserve.runtime.after_head import read_after_head
from trimserve.runtime.cold_rows import COLD_INPUT, cold_widths
from trimserve.runtime.kv_cache import GrowingCache, KVCache, KVLayout, SharedCache

if TYPE_CHECKING:
    import onnxruntime as ort
from trimserve.arrays import Floats

# "true" in a graph whose attention writes its keys and values in place (GroupQueryAttention).
SHARED_KV_KEY = "trimserve.shared_kv"
# How long the head's share of a step is measured, and how often at least.
_MEASURING_SECONDS = 0.05
_MEASURED_STEPS = 3
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


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
    """A decoder-only graph with the serving passes of DESIGN.md section 5, bound to one session.

    Attributes:
        device: where the graph and its cache are.
        cold_inputs: names of the inputs for rows of cold ids, one for each table that ids are looked up in.
        no_rows: what a step without any slot is given for them: one row of zeros each.
        unchanged: longest text, in tokens, whose rotary frequencies do not depend on its length; None where
            they never do.
        restarts_after: most tokens after which the text so far is fed again, or None (see `restarting`).
    """

    _MASK = "attention_mask"  # the input that tells tokens from padding

    def __init__(
        self, session: "ort.InferenceSession", *, device: str = "cpu", lengths: Lengths | None = None
    ) -> None:
        self.device = device
        lengths = lengths or Lengths()
        self.unchanged = lengths.unchanged
        self.restarts_after = lengths.unchanged if lengths.restarts else None
        self._session = session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        self._past = [
            name for name in inputs if name.startswith("past_key_values.") and ".encoder." not in name
        ]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        needed = {"input_ids", self._MASK, COLD_INPUT, "logits_to_keep"}
        missing = sorted(
            (needed - inputs.keys()) | ({"logits", "hidden_states", *self._present} - set(outputs))
        )
        if missing or not self._past:
            raise UnsupportedModelError(
                f"the decoder graph lacks {', '.join(missing) or 'past_key_values'}: it was not made for "
                "serving. Export the model again with `trimserve export`."
            )
        self.takes_positions = "position_ids" in inputs
        self._takes_mask = "attention_mask" in inputs
        self.dtype = np.dtype(_NUMPY_TYPES.get(inputs[COLD_INPUT].type, np.float32))
        widths = cold_widths(session)
        self.hidden_size = widths[COLD_INPUT]
        self.cold_inputs = tuple(widths)
        self.no_rows = tuple(np.zeros((1, width), self.dtype) for width in widths.values())
        past = [inputs[name] for name in self._past]
        shapes = [(int(value.shape[1]), int(value.shape[3])) for value in past]
        kv_dtype = np.dtype(_NUMPY_TYPES.get(past[0].type, np.float32))
        self._layout = KVLayout(self._past, self._present, shapes, kv_dtype, device)
        metadata = session.get_modelmeta().custom_metadata_map
        self._shares_buffers = metadata.get(SHARED_KV_KEY) == "true"
        self.after_head = read_after_head(metadata)
        self._outputs = ["logits", "hidden_states", *self._present]
        self._binding = session.io_binding()
        self._last: dict[str, tuple[npt.NDArray[Any], ort.OrtValue]] = {}
        self._head_share: float | None = None

    @property
    def takes_batches(self) -> bool:
        """Whether sequences of unequal length can run together, padded on the left.

        Not where positions depend on the length: a graph has one length for the whole batch.
        """
        return self.takes_positions and not self._shares_buffers and self.unchanged is None

    @property
    def takes_beams(self) -> bool:
        """Whether its cache can hold several sequences of one length."""
        return not self._shares_buffers

    def empty_cache(self, batch: int) -> KVCache:
        """A cache that holds nothing yet, for `batch` sequences."""
        kind = SharedCache if self._shares_buffers else GrowingCache
        return kind(self._layout, batch)

    def start(self, sources: Sequence[Ids | None]) -> KVCache:
        """A cache for as many sequences as sources, of which a model without an encoder reads none."""
        return self.empty_cache(len(sources))

    def head_share(self) -> float:
        """The share of a step of one token that is the vocab head, measured the first time.

        A step without the head asks for the last -1 positions of one, which are none: the same graph, with
        the same weights, multiplies nothing.
        """
        if self._head_share is None:
            self._head_share = self._measure_head_share()
        return self._head_share

    def _measure_head_share(self) -> float:
        token = np.zeros((1, 1), np.int64)
        seconds: dict[int, list[float]] = {1: [], -1: []}
        end = time.perf_counter() + _MEASURING_SECONDS
        while len(seconds[-1]) < _MEASURED_STEPS or time.perf_counter() < end:
            for keep, found in seconds.items():
                cache = self.start([np.zeros(1, np.int32)])
                start = time.perf_counter()
                self.step(cache, token, self.no_rows, keep=keep)
                found.append(time.perf_counter() - start)
        with_head, without = (float(np.median(found)) for found in seconds.values())
        return min(max(1 - without / with_head, 0.0), 1.0)

    def step(
        self,
        cache: KVCache,
        ids: npt.NDArray[np.int64],
        cold_rows: Sequence[Rows],
        *,
        mask: npt.NDArray[np.int64] | None = None,
        keep: int = 1,
    ) -> Step:
        """Feed tokens and append them to the cache.

        Args:
            cache: of the same batch size; changed in place.
            ids: int64 (B, T), compact ids or K + slot.
            cold_rows: for each of `cold_inputs` (S, width), S >= 1, the slots' rows in the graph's dtype.
            mask: int64 (B, T), 0 where `ids` is padding on the left; all 1 by default.
            keep: how many of the last positions to give logits for; 0 for all.
        """
        past = cache.lengths if self.takes_positions else None
        new = np.ones_like(ids) if mask is None else mask
        cache.mask = np.concatenate([cache.mask, new], axis=1)
        on_cpu = self._layout.on_cpu
        inputs = {
            "input_ids": on_cpu(ids),
            "logits_to_keep": self._held("logits_to_keep", _number(keep)),
        }
        for name, rows in zip(self.cold_inputs, cold_rows, strict=True):
            inputs[name] = self._held(name, rows)
        if self._takes_mask:
            inputs["attention_mask"] = on_cpu(cache.mask)
        if past is not None:
            # A padded position gets position 0; the mask keeps it out of every sum.
            offsets = np.maximum(new.cumsum(axis=1) - 1, 0) if new.shape[1] > 1 else 0
            inputs["position_ids"] = on_cpu(past[:, None] + offsets)
        inputs |= cache.inputs(ids.shape[1])
        logits, hidden, *present = self._run(inputs, cache.buffers())
        cache.take(present)
        return Step(logits.numpy().astype(np.float32, copy=False), hidden.numpy())

    def _held(self, name: str, array: npt.NDArray[Any]) -> "ort.OrtValue":
        """Hand an array to ONNX Runtime; one that comes again, as most steps' do, is handed over once."""
        last = self._last.get(name)
        if last is None or last[0] is not array:
            last = self._last[name] = (array, self._layout.on_cpu(array))
        return last[1]

    def _run(
        self, inputs: "Mapping[str, ort.OrtValue]", buffers: "Mapping[str, ort.OrtValue]"
    ) -> "Sequence[ort.OrtValue]":
        """Run the graph: logits and hidden states on the CPU, the present in its buffers or on the device."""
        if self.device == "cpu" and not buffers:
            # One call costs a tenth of a millisecond less than binding each value does.
            made: Sequence[ort.OrtValue] = self._session.run_with_ort_values(self._outputs, inputs)
            return made
        binding = self._binding
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            if name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name, self.device if name in self._layout.present else "cpu")
        self._session.run_with_iobinding(binding)
        made = binding.get_outputs()
        return made


@cache
def _number(value: int) -> npt.NDArray[np.int64]:
    return np.array(value, np.int64)
