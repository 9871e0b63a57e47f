"""The proof that a request has the same tokens alone and among others: bits compared at opening.

What a kernel adds up in which order may depend on how many rows it is given, on this processor and in this
version of ONNX Runtime. So the graph itself is asked: texts alone, among others, read in chunks, and behind
what another text has left must give the same logits and hidden states, bit for bit.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimserve.arrays import Array, Ids
from trimserve.decoding.feeder import Feeder
from trimserve.engine.settings import EngineSettings
from trimserve.generation.generator import Generator
from trimserve.runtime.decoder import Step

logger = logging.getLogger(__name__)
# Lengths of the texts that are compared: of one token, below and above the blocks of the kernels.
_LENGTHS = (1, 7, 19, 40, 131)
_STEPS = 3  # tokens after each
_CUTS = (5, 23, 55)  # where the longer ones are cut into chunks
_MOST_ROWS = 32
# How long the steps of each size are repeated, to know the shortest.
_TIMING_SECONDS = 0.03
# A batch is worth its rows while it gives so much of the most tokens a second.
_WORTH = 0.9


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about a graph.

    Attributes:
        is_strict: whether all that the engine does with it leaves the bits as they are.
        batching: in words, for its users.
        most_rows: sequences that decode together, at most: as told, or as it pays by the steps measured.
        least_rows: rows of every step of one token: a product of one row may have other last bits than one
            of two.
        chunks: whether a prompt is read in chunks.
        reuses_prefixes: whether it may begin with what another one has left.
    """

    is_strict: bool
    batching: str
    most_rows: int
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
    trial = _Trial(generator, settings.max_rows or _MOST_ROWS)
    chunks, prefixes = trial.chunks_agree(), trial.prefixes_agree()
    least = next((rows for rows in (1, 2) if trial.batches_agree(rows)), None)
    logger.info("same bits: batches %s, chunks %s, prefixes %s", least is not None, chunks, prefixes)
    if least is None and settings.strict:
        return "in a batch this graph's results have other last bits than alone"
    most = settings.max_rows or worthwhile_rows(trial.step_seconds)
    words = f"batches of up to {most} rows"
    if least == 2:
        words += ", of 2 at least"
    if settings.strict:
        return Proof(True, words, most, least or 1, chunks, chunks and prefixes)
    if least is None or not chunks or not prefixes:
        words += ", with other last bits than alone"
        return Proof(False, words, most, least or 1)
    return Proof(True, words, most, least)


def worthwhile_rows(step_seconds: Mapping[int, float]) -> int:
    """The least rows that give nearly the most tokens a second.

    Args:
        step_seconds: of a step, by its rows.
    """
    rates = {rows: rows / seconds for rows, seconds in step_seconds.items()}
    enough = _WORTH * max(rates.values())
    return min(rows for rows, rate in rates.items() if rate >= enough)


class _Trial:
    """A few texts of a graph, and the bits that it gives for them.

    Attributes:
        step_seconds: the shortest step of one token, by its rows.
    """

    def __init__(self, generator: Generator, most_rows: int) -> None:
        self._feeder = Feeder(generator.decoder, generator.folder.vocab, generator.cold)
        kept = generator.folder.vocab.kept_ids
        most = (generator.config.context or max(_LENGTHS) + _STEPS) - _STEPS
        lengths = [min(length, most) for length in _LENGTHS if most > 0]
        random = np.random.default_rng(0)
        self._texts = [random.choice(kept, length).astype(np.int32) for length in lengths]
        self._next = random.choice(kept, (len(lengths), _STEPS)).astype(np.int32)
        self._most_rows = most_rows
        # Every text is read whole once; what is compared with it is read into rows behind.
        self._own = max(most_rows, len(lengths)) + 1
        self._rows = generator.decoder.rows(self._own + 1)
        self._rows.resize(self._own + 1, max(lengths) + _STEPS, [])
        self._whole = [self._read(place, [text]) for place, text in enumerate(self._texts)]
        self.step_seconds: dict[int, float] = {}

    def chunks_agree(self) -> bool:
        """Whether texts read in chunks give what whole ones give, in the steps after them, too."""
        for number, text in enumerate(self._texts):
            self._rows.lengths[self._own] = 0
            cut = np.split(text, [at for at in _CUTS if at < text.size - 1])
            if not _same(self._read(self._own, cut), self._whole[number]):
                return False
            if not _same(self._decode(self._own, [number]), self._decode(number, [number])):
                return False
        return True

    def prefixes_agree(self) -> bool:
        """Whether a text that begins like another one gives the same from that one's keys and values on."""
        first, text = self._texts[-2], self._texts[-1].copy()
        shared = min(first.size, text.size) - 2
        if shared < 1:
            return True
        text[:shared] = first[:shared]
        self._rows.copy(len(self._texts) - 2, self._own, shared)
        behind = self._read(self._own, [text[shared:]])
        self._rows.lengths[self._own] = 0
        return _same(behind, self._read(self._own, [text]))

    def batches_agree(self, least: int) -> bool:
        """Whether texts decoded together give what each gives alone; a step has so many rows at least."""
        count = len(self._texts)
        # The first step of each kind would show what is made ready for it once.
        alone = [self._decode_padded(number, least) for number in range(count)]
        for place in range(count, self._most_rows):
            self._rows.copy(place % count, place, self._texts[place % count].size)
        sizes = {min(2**power, self._most_rows) for power in range(self._most_rows.bit_length() + 1)}
        for size in sorted({*sizes, min(3, self._most_rows)}):
            if size < least:
                continue
            numbers = [place % count for place in range(size)]
            if not _same(self._decode(0, numbers), np.concatenate([alone[number] for number in numbers])):
                return False
            end = time.perf_counter() + _TIMING_SECONDS
            while time.perf_counter() < end:  # a neighbour on the machine disturbs some steps, not all
                self._decode(0, numbers)
        return True

    def _decode_padded(self, number: int, least: int) -> Array:
        """A text decoded alone, in a step of so many rows: the others repeat it."""
        if least == 1:
            return self._decode(number, [number])
        first = self._own + 1 - least
        for place in range(first, first + least):
            self._rows.copy(number, place, self._texts[number].size)
        return self._decode(first, [number] * least)[:1]

    def _read(self, place: int, cut: Sequence[Ids]) -> Array:
        """What the graph says behind a text's last token, (1, K + H)."""
        view = self._rows.view(place, 1)
        for part in cut[:-1]:
            self._feeder.feed_prompt(view, part, is_last=False)
        return _bits(self._feeder.feed_prompt(view, cut[-1], is_last=True))

    def _decode(self, first: int, numbers: Sequence[int]) -> Array:
        """What it says behind each of the next tokens of texts that lie side by side, (n, steps, K + H)."""
        view = self._rows.view(first, len(numbers))
        found, seconds = [], []
        for place in range(_STEPS):
            start = time.perf_counter()
            step = self._feeder.feed(view, self._next[list(numbers), place].tolist())
            seconds.append(time.perf_counter() - start)
            found.append(_bits(step))
        view.cut(np.full(len(numbers), _STEPS, np.int64))
        rows = len(numbers)
        self.step_seconds[rows] = min(self.step_seconds.get(rows, np.inf), *seconds)
        return np.stack(found, axis=1)


def _bits(step: Step) -> Array:
    return np.concatenate([step.logits[:, -1], step.hidden[:, -1].astype(np.float32)], axis=1)


def _same(first: Array, second: Array) -> bool:
    return first.tobytes() == second.tobytes()
