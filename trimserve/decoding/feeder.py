"""Feed token ids to a decoder: cold ones through slots, a batch of prompts aligned at their right ends."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.decoding.columns import Columns
from trimserve.decoding.request import Request
from trimserve.decoding.stats import Timing
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder, Step
from trimserve.runtime.kv_cache import KVCache
from trimserve.runtime.restarting_cache import RestartingCache
from trimserve.text.batching import join
from trimserve.vocab.map import VocabMap


class Feeder:
    """A decoder that takes token ids.

    Attributes:
        timing: seconds spent in the model.
    """

    def __init__(self, decoder: Decoder, vocab: VocabMap, cold: ColdRows, *, in_pairs: bool = False) -> None:
        """Feed a decoder.

        Args:
            decoder: the graph.
            vocab: which ids it keeps.
            cold: rows of the others.
            in_pairs: give the bits of `Decoder.step_in_pair` for lone tokens, too.
        """
        self._decoder = decoder
        self._vocab = vocab
        self._cold = cold
        self._kept = Columns(vocab.kept_ids, vocab.vocab_size)
        self._step_of_one = decoder.step_in_pair if in_pairs else decoder.step
        self.timing = Timing()

    def prefill(self, requests: Sequence[Request]) -> tuple[KVCache, Step]:
        """Read the requests' sources and prompts; gives the step after each prompt's last token."""
        fill = int(self._vocab.kept_ids[0])
        # Aligned at the right, where generation goes on.
        ids, mask = join([request.prompt for request in requests]).padded(fill, "left")
        start = time.perf_counter()
        cache = self._decoder.start([request.source for request in requests])
        self.timing.model += time.perf_counter() - start
        if (unchanged := self._decoder.restarts_after) is not None:
            cache = RestartingCache(cache, len(requests), unchanged)
        step = self._step(cache, ids, mask)
        self.timing.prompts += time.perf_counter() - start
        return cache, step

    def feed(self, cache: KVCache, tokens: Sequence[int]) -> Step:
        """Feed one token id to each sequence."""
        ids = np.array(tokens, np.int32)
        columns = self._kept.find(ids)
        if columns.size < ids.size or isinstance(cache, RestartingCache):
            return self._step(cache, ids[:, None])
        start = time.perf_counter()  # nearly every step: no slot is needed
        step = self._step_of_one(cache, columns.astype(np.int64)[:, None], self._decoder.no_rows)
        self.timing.model += time.perf_counter() - start
        return step

    def feed_several(self, cache: KVCache, tokens: Sequence[int]) -> Step:
        """Feed some token ids to one sequence, in one step that has logits behind each."""
        return self._step(cache, np.array([tokens], np.int32), keep=len(tokens))

    def feed_prompt(self, cache: KVCache, ids: Ids, *, is_last: bool) -> Step:
        """Feed the next tokens of one sequence's prompt, int32 (T,); only the last ones give logits."""
        start = time.perf_counter()
        step = self._step(cache, ids[None], keep=1 if is_last else -ids.size)
        self.timing.prompts += time.perf_counter() - start
        return step

    def _step(
        self,
        cache: KVCache,
        ids: npt.NDArray[np.integer[Any]],
        mask: npt.NDArray[np.int64] | None = None,
        keep: int = 1,
    ) -> Step:
        start = time.perf_counter()
        if isinstance(cache, RestartingCache):
            ids = cache.feed(ids.astype(np.int32, copy=False), self._decoder.empty_cache(len(ids)))
        slotted = self._vocab.with_slots(ids)
        rows = self._cold.embeddings(slotted.cold_ids) if slotted.cold_tokens else self._decoder.no_rows
        if slotted.ids.size == 1 and mask is None and keep == 1:
            step = self._step_of_one(cache, slotted.ids, rows)
        else:
            step = self._decoder.step(cache, slotted.ids, rows, mask=mask, keep=keep)
        self.timing.model += time.perf_counter() - start
        return step
