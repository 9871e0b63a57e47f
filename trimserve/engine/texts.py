"""Texts of several callers of an encoder in one batch, each with the numbers that it has alone."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from trimserve.arrays import Array
from trimserve.encoder.graph import EncoderGraph, GraphOutput
from trimserve.text.batching import Encoded

# Lengths of the texts that are compared when an engine is opened.
_LENGTHS = (3, 4, 9, 21, 60)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A text that waits for its batch."""

    place: int
    encoded: Encoded
    result: str
    output: "Future[GraphOutput]" = field(default_factory=Future)


class TextBatches:
    """The `Batches` of an engine: callers wait in threads of their own, its thread runs the graph.

    Attributes:
        strict: whether a text's numbers are those it has alone.
        batching: see `EngineMetrics`.
        runs: batches so far.
        texts: texts in all of these.
    """

    def __init__(self, graph: EncoderGraph, *, strict: bool) -> None:
        """Find out whether the graph takes batches.

        Args:
            graph: the encoder's.
            strict: feed texts one by one where their bits differ in a batch.
        """
        self._graph = graph
        agree = texts_agree(graph)
        self._batches = agree or not strict
        self.strict = agree or strict
        self.batching = "batches of texts" if self._batches else "one by one: bits differ in a batch of texts"
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._wake: Callable[[], None] = lambda: None
        self.runs = self.texts = 0

    def anew(self, wake: Callable[[], None]) -> "TextBatches":
        """One like it where nothing waits; `wake` tells the engine that something does."""
        new = copy.copy(self)
        new._lock, new._waiting, new._wake = threading.Lock(), [], wake
        new.runs = new.texts = 0
        return new

    @property
    def size(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    def run(self, encoded: Sequence[Encoded], result: str) -> Iterator[GraphOutput]:
        """See `Batches`; for threads of callers."""
        asked = [_Waiting(place, text, result) for place, text in enumerate(encoded) if text.ids.size]
        with self._lock:
            self._waiting += asked
        self._wake()
        for text in asked:
            yield text.output.result()

    def step(self) -> None:
        """Run a batch with the text that waits longest, and others that are no longer than it."""
        with self._lock:
            if not self._waiting:
                return
            first = self._waiting[0]
            size = first.encoded.ids.size
            # Sorting is stable: of equal lengths the one that came first.
            alike = sorted(
                (t for t in self._waiting if t.result == first.result and t.encoded.ids.size <= size),
                key=lambda text: -text.encoded.ids.size,
            )
            lengths = np.array([text.encoded.ids.size for text in alike], np.int64)
            batch = alike[: self._graph.together(lengths) if self._batches else 1]
            chosen = set(map(id, batch))
            self._waiting = [text for text in self._waiting if id(text) not in chosen]
        try:
            made = self._graph.run_batch(
                np.arange(len(batch)), [text.encoded for text in batch], first.result
            )
        except Exception as error:
            for text in batch:
                text.output.set_exception(error)
            return
        self.runs += 1
        self.texts += len(batch)
        for row, text in enumerate(batch):
            text.output.set_result(_row(made, row, text))

    def fail(self, error: Exception) -> None:
        """Give an error to all that wait."""
        with self._lock:
            failed, self._waiting = self._waiting, []
        for text in failed:
            text.output.set_exception(error)


def texts_agree(graph: EncoderGraph) -> bool:
    """Whether the graph gives a text the same bits alone and among others."""
    kept = graph.folder.vocab.kept_ids
    random = np.random.default_rng(0)
    most = graph.max_tokens or max(_LENGTHS)
    texts = []
    for length in _LENGTHS:
        ids = random.choice(kept, min(length, most)).astype(np.int32)
        texts.append(Encoded(ids, np.zeros_like(ids)))
    texts.sort(key=lambda text: -text.ids.size)
    count = graph.together(np.array([text.ids.size for text in texts], np.int64))
    together = graph.run_batch(np.arange(count), texts[:count], graph.result)
    for row, text in enumerate(texts[:count]):
        alone = graph.run_batch(np.arange(1), [text], graph.result)
        if _row(together, row, _Waiting(0, text, graph.result)).values.tobytes() != alone.values.tobytes():
            return False
    return True


def _row(made: GraphOutput, row: int, text: _Waiting) -> GraphOutput:
    """What a batch says of one text, as if it had been alone."""
    length = text.encoded.ids.size

    def own(values: Array) -> Array:
        return values[row : row + 1, :length].copy() if values.ndim == 3 else values[row : row + 1].copy()

    return GraphOutput(
        np.array([text.place]),
        made.ids[row : row + 1, :length],
        made.mask[row : row + 1, :length],
        own(made.values),
        None if made.hidden is None else own(made.hidden),
    )
