"""The proof that a request has the same tokens alone and among others: bits compared at opening.

What a kernel adds up in which order may depend on how many rows it is given, on this processor and in this
version of ONNX Runtime. So the graph itself is asked: texts alone, among others, read in chunks, and behind
what another text has left must give the same logits and hidden states, bit for bit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimserve.arrays import Array, Ids
from trimserve.decoding.feeder import Feeder
from trimserve.engine.settings import EngineSettings
from trimserve.generation.generator import Generator
from trimserve.runtime.kv_rows import KVRows

logger = logging.getLogger(__name__)
# Lengths of the texts that are compared: of one token, below and above the blocks of the kernels.
_LENGTHS = (1, 7, 19, 40, 131)
_STEPS = 3  # tokens after each
_CHUNK = 5


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about a graph.

    Attributes:
        is_strict: whether all that the engine does with it leaves the bits as they are.
        batching: in words, for its users.
        least_rows: rows of every step of one token: a product of one row may have other last bits than one
            of two.
        chunks: whether a prompt is read in chunks.
        reuses_prefixes: whether it may begin with what another one has left.
    """

    is_strict: bool
    batching: str
    least_rows: int = 1
    chunks: bool = True
    reuses_prefixes: bool = True


def prove(generator: Generator, settings: EngineSettings) -> Proof | str:
    """Compare bits, and settle what the engine may do.

    Args:
        generator: whose graph shares buffers (`Decoder.no_rows_because`).
        settings: the engine's; its `strict` decides what happens where bits differ.

    Returns:
        What may be done, or the reason why sequences must run one by one.
    """
    trial = _Trial(generator, settings.max_rows)
    chunks, prefixes = trial.chunks_agree(), trial.prefixes_agree()
    least_rows = next((rows for rows in (1, 2) if trial.batches_agree(rows)), None)
    logger.info(
        "same bits: in batches %s, in chunks %s, with prefixes %s", least_rows is not None, chunks, prefixes
    )
    if least_rows is None and settings.strict:
        return "in a batch this graph's results have other last bits than alone"
    if not settings.strict:
        agrees = chunks and prefixes and least_rows is not None
        return Proof(
            agrees, "batches" if agrees else "batches, with other last bits than alone", least_rows or 1
        )
    rows = "" if least_rows == 1 else f", of {least_rows} rows at least"
    return Proof(True, f"batches{rows}", least_rows or 1, chunks, chunks and prefixes)


class _Trial:
    """A few texts of a graph, and the bits that it gives for them."""

    def __init__(self, generator: Generator, most_rows: int) -> None:
        self._decoder = generator.decoder
        self._feeder = Feeder(generator.decoder, generator.folder.vocab, generator.cold)
        self._most_rows = most_rows
        kept = generator.folder.vocab.kept_ids
        most = (generator.config.context or max(_LENGTHS) + _STEPS) - _STEPS
        lengths = [min(length, most) for length in _LENGTHS if most > 0]
        random = np.random.default_rng(0)
        self._texts = [random.choice(kept, length).astype(np.int32) for length in lengths]
        self._next = random.choice(kept, (len(lengths), _STEPS)).astype(np.int32)
        self._whole = [self._read(self._rows(1), 0, [text]) for text in self._texts]

    def chunks_agree(self) -> bool:
        """Whether texts read in chunks give what whole ones give, in the steps after them, too."""
        for number, text in enumerate(self._texts):
            cut = [text[start : start + _CHUNK] for start in range(0, text.size, _CHUNK)]
            if len(cut) > 1 and cut[-1].size == 1:
                cut[-2:] = [np.concatenate(cut[-2:])]
            rows = self._rows(1)
            if not _same(self._read(rows, 0, cut), self._whole[number]):
                return False
            if not _same(self._decode(rows, [number], 1), self._alone(number, 1)):
                return False
        return True

    def prefixes_agree(self) -> bool:
        """Whether a text that begins like another one gives the same from that one's keys and values on."""
        first, text = self._texts[-2], self._texts[-1].copy()
        shared = min(first.size, text.size) - 2
        if shared < 1:
            return True
        text[:shared] = first[:shared]
        rows = self._rows(2)
        self._read(rows, 0, [first])
        rows.copy(0, 1, shared)
        return _same(self._read(rows, 1, [text[shared:]]), self._read(self._rows(1), 0, [text]))

    def batches_agree(self, least: int) -> bool:
        """Whether texts decoded together give what each gives alone; a step has so many rows at least."""
        alone = [self._alone(number, least) for number in range(len(self._texts))]
        sizes = {min(2**power, self._most_rows) for power in range(1, self._most_rows.bit_length() + 1)}
        for size in sorted({*sizes, min(3, self._most_rows)}):
            numbers = [place % len(self._texts) for place in range(size)]
            rows = self._rows(max(size, least))
            for place, number in enumerate(numbers):
                self._read(rows, place, [self._texts[number]])
            together = self._decode(rows, numbers, least)
            if not _same(together, np.concatenate([alone[number] for number in numbers])):
                return False
        return True

    def _alone(self, number: int, least: int) -> Array:
        rows = self._rows(least)
        self._read(rows, 0, [self._texts[number]])
        return self._decode(rows, [number], least)

    def _rows(self, count: int) -> KVRows:
        rows = self._decoder.rows(count)
        rows.resize(count, max(text.size for text in self._texts) + _STEPS, [])
        return rows

    def _read(self, rows: KVRows, place: int, cut: Sequence[Ids]) -> Array:
        """What the graph says behind a text's last token, (1, K + H)."""
        view = rows.view(place, 1)
        for part in cut[:-1]:
            self._feeder.feed_prompt(view, part, is_last=False)
        step = self._feeder.feed_prompt(view, cut[-1], is_last=True)
        return np.concatenate([step.logits[:, -1], step.hidden[:, -1].astype(np.float32)], axis=1)

    def _decode(self, rows: KVRows, numbers: Sequence[int], least: int) -> Array:
        """What it says behind each of the next tokens of some texts, (n, steps, K + H)."""
        count = max(len(numbers), least)
        fed = [*numbers, *[0] * (count - len(numbers))]
        found = []
        for place in range(_STEPS):
            step = self._feeder.feed(rows.view(0, count), self._next[fed, place].tolist())
            found.append(np.concatenate([step.logits[:, -1], step.hidden[:, -1].astype(np.float32)], axis=1))
        return np.stack(found, axis=1)[: len(numbers)]


def _same(first: Array, second: Array) -> bool:
    return first.tobytes() == second.tobytes()
