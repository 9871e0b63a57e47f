"""One decoder graph and its KV cache: feed compact ids, get compact logits and hidden states.

Nothing here knows tokens' meaning, sampling or exactness; see `generation.py` for the loop around it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids, Rows
from trimserve.concurrency import Once
from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import Lengths
from trimserve.runtime.after_head import read_after_head
from trimserve.runtime.cold_rows import COLD_INPUT, cold_widths
from trimserve.runtime.contract import CROSS, PAST, PRESENT, is_state
from trimserve.runtime.kv_cache import GrowingCache, KVCache, KVLayout, SharedCache
from trimserve.runtime.kv_rows import KVRows
from trimserve.runtime.session import Session
from trimserve.runtime.state_cache import StateCache, StateLayout

if TYPE_CHECKING:
    import onnxruntime as ort

# "true" in a graph whose attention writes its keys and values in place (GroupQueryAttention).
SHARED_KV_KEY = "trimserve.shared_kv"
# How long the head's share of a step is measured, and how often at least.
_MEASURING_SECONDS = 0.05
_MEASURED_STEPS = 3
# How many positions are asked for: by steps, by scores (all of them), and by what measures the head.
_USUAL_KEEPS = (1, 0, -1, 2)
_ONE = np.ones(1, np.int64)
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

    It knows nothing of any request: what belongs to one is in its cache. So any number of threads may use it,
    each with caches of its own.

    Attributes:
        device: where the graph and its cache are.
        cold_inputs: names of the inputs for rows of cold ids, one for each table that ids are looked up in.
        no_rows: what a step without any slot is given for them: one row of zeros each.
        unchanged: longest text, in tokens, whose rotary frequencies do not depend on its length; None where
            they never do.
        restarts_after: most tokens after which the text so far is fed again, or None (see `restarting`).
    """

    _MASK = "attention_mask"  # the input that tells tokens from padding

    def __init__(self, session: Session, *, device: str = "cpu", lengths: Lengths | None = None) -> None:
        self.device = device
        self._lengths = lengths
        lengths = lengths or Lengths()
        self.unchanged = lengths.unchanged
        self.restarts_after = lengths.unchanged if lengths.restarts else None
        self._session = session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        past_names = [name for name in inputs if name.startswith(PAST) and CROSS not in name]
        self._past = [name for name in past_names if not is_state(name)]
        states = [name for name in past_names if is_state(name)]
        self._present = [name.replace(PAST, PRESENT) for name in (*self._past, *states)]
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
        self._layout = KVLayout(self._past, self._present[: len(past)], shapes, kv_dtype, device)
        self._states = _state_layout({name: inputs[name] for name in states})
        metadata = session.get_modelmeta().custom_metadata_map
        self._shares_buffers = metadata.get(SHARED_KV_KEY) == "true"
        self.after_head = read_after_head(metadata)
        self._outputs = ["logits", "hidden_states", *self._present]
        self._places = {name: device if name in self._present else "cpu" for name in self._outputs}
        # Nearly every step takes these: handed over once, and never written to.
        self._no_rows = [self._layout.on_cpu(rows) for rows in self.no_rows]
        self._keeps = {keep: self._layout.on_cpu(np.array(keep, np.int64)) for keep in _USUAL_KEEPS}
        self._head_share: Once[float] = Once()

    @property
    def takes_batches(self) -> bool:
        """Whether sequences of unequal length can run together, padded on the left.

        Not where positions depend on the length: a graph has one length for the whole batch.
        """
        return self.takes_positions and not self._shares_buffers and self.unchanged is None

    @property
    def no_several_because(self) -> str | None:
        """Why a step of several tokens cannot stand for as many steps; None where it may (`measure_rows`)."""
        if (reason := self.no_rows_because) is not None:
            return reason
        if self._states is not None:
            return "its states cannot be taken back in the middle of a step"
        # Without them nobody knows whether there is room for a second position.
        return "its manifest says nothing of its length" if self._lengths is None else None

    @property
    def reach(self) -> int | None:
        """How many tokens can be taken out of its cache again; None for any number."""
        return None if self._states is None else self._states.reach

    def empty_cache(self, batch: int) -> KVCache:
        """A cache that holds nothing yet, for `batch` sequences."""
        kind = SharedCache if self._shares_buffers else GrowingCache
        cache = kind(self._layout, batch)
        if self._states is None:
            return cache
        return StateCache(cache, self._layout, self._states, batch)

    def rows(self, most: int) -> KVRows:
        """Buffers for so many sequences of unequal length that decode together; see `no_rows_because`."""
        return KVRows(self._layout, most)

    @property
    def no_rows_because(self) -> str | None:
        """Why sequences cannot share the buffers of `rows`; None where they can."""
        if not self._shares_buffers:
            return (
                "this graph returns its whole cache at every step (only GroupQueryAttention writes in place)"
            )
        if self.unchanged is not None:
            return "this model's positions depend on a text's length"
        return None if self.device == "cpu" else f"the cache is on {self.device}"

    def start(self, sources: Sequence[Ids | None]) -> KVCache:
        """A cache for as many sequences as sources, of which a model without an encoder reads none."""
        return self.empty_cache(len(sources))

    def head_share(self) -> float:
        """The share of a step of one token that is the vocab head, measured the first time.

        A step without the head asks for the last -1 positions of one, which are none: the same graph, with
        the same weights, multiplies nothing.
        """
        return self._head_share.get(self._measure_head_share)

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
        cache.append(new)
        on_cpu = self._layout.on_cpu
        inputs = {"input_ids": on_cpu(ids), "logits_to_keep": self._keep(keep)}
        inputs |= self._rows(cold_rows)
        if self._takes_mask:
            inputs["attention_mask"] = on_cpu(cache.mask)
        if past is not None:
            # A padded position gets position 0; the mask keeps it out of every sum.
            offsets = np.maximum(new.cumsum(axis=1) - 1, 0) if new.shape[1] > 1 else 0
            inputs["position_ids"] = on_cpu(past[:, None] + offsets)
        inputs |= cache.inputs(ids.shape[1])
        logits, hidden, *present = self._run(inputs, cache)
        cache.take(present)
        return Step(logits.numpy().astype(np.float32, copy=False), hidden.numpy())

    def step_in_pair(self, cache: KVCache, ids: npt.NDArray[np.int64], cold_rows: Sequence[Rows]) -> Step:
        """Feed the token of a lone sequence twice, int64 (1, 1), and take the second one back.

        ONNX Runtime multiplies one row by another kernel than several, with other last bits. In a pair, what
        stands behind a token is the same however many more are fed in a step. At the end of the model's
        positions, where there is no room for two, the token is fed alone.
        """
        longest = self._lengths.longest if self._lengths else None
        if longest is not None and cache.mask.shape[1] + 2 > longest:
            return self.step(cache, ids, cold_rows)
        step = self.step(cache, np.repeat(ids, 2, axis=1), cold_rows, keep=2)
        cache.cut(_ONE)
        return Step(step.logits[:, :1], step.hidden[:, :1])

    def _keep(self, keep: int) -> "ort.OrtValue":
        usual = self._keeps.get(keep)
        return self._layout.on_cpu(np.array(keep, np.int64)) if usual is None else usual

    def _rows(self, cold_rows: Sequence[Rows]) -> "dict[str, ort.OrtValue]":
        # The very tuple, not one with equal rows: comparing those would cost more than it saves.
        values = self._no_rows if cold_rows is self.no_rows else map(self._layout.on_cpu, cold_rows)
        return dict(zip(self.cold_inputs, values, strict=True))

    def _run(self, inputs: "dict[str, ort.OrtValue]", cache: KVCache) -> "Sequence[ort.OrtValue]":
        """Run the graph: logits and hidden states on the CPU, the present in its buffers or on the device."""
        buffers = cache.buffers()
        if self.device == "cpu" and not buffers:
            # One call costs a tenth of a millisecond less than binding each value does.
            return self._session.run_with_ort_values(self._outputs, inputs)
        places = {name: place for name, place in self._places.items() if name not in buffers}
        return cache.bound.run(self._session, inputs, buffers, places)


def _state_layout(inputs: "Mapping[str, ort.NodeArg]") -> StateLayout | None:
    """The layout of a graph's states, by its inputs for them; None where it has none."""
    if not inputs:
        return None
    return StateLayout(
        tuple(inputs),
        tuple(name.replace(PAST, PRESENT) for name in inputs),
        tuple(tuple(map(int, value.shape[1:])) for value in inputs.values()),
        tuple(np.dtype(_NUMPY_TYPES.get(value.type, np.float32)) for value in inputs.values()),
    )
