"""One process of the throughput benchmark: all variants with one tokenizer, on one corpus after the other.

`python -m bench.profile.worker TOKENIZER ORDER FILE...` prints seconds by corpus and variant as JSON.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench.realdata import data_folder
from trimserve.corpus.corpus import Corpus
from trimserve.counting.encoding import choosing
from trimserve.counting.encoding.encoders import FastEncoder
from trimserve.counting.engine import CorpusCounter
from trimserve.counting.plan import How
from trimserve.errors import TrimserveError
from trimserve.text.tokenizer import load_tokenizer

VARIANTS = ("loop", "encode alone", "fastokens alone", "profile", "profile without fastokens")
_BATCH = 1000
_ROWS = 262_144
# On a busy machine BENCH_CPU_TIME=1 compares CPU seconds of all threads instead of seconds.
clock = time.process_time if os.environ.get("BENCH_CPU_TIME") == "1" else time.perf_counter


class FastokensLoads:
    """Stands in for `choosing.FastEncoder`: loads a tokenizer once, or says that the package is missing."""

    def __init__(self) -> None:
        self._encoder = FastEncoder
        self._loaded: dict[bytes, FastEncoder] = {}
        self.missing = False

    def __call__(self, content: bytes) -> FastEncoder:
        """Give the encoder.

        Raises:
            ImportError: it is to be missing.
        """
        if self.missing:
            raise ImportError("left out")
        if content not in self._loaded:
            self._loaded[content] = self._encoder(content)
        return self._loaded[content]

    def warm(self, content: bytes) -> FastEncoder | None:
        """Load a tokenizer before the clock runs, if fastokens knows its kind, and a second one beside it."""
        try:
            self(content)
            return self._encoder(content)
        except (ImportError, TrimserveError) as error:
            print(error, file=sys.stderr)
            return None


def batches(path: Path) -> Iterator[list[str]]:
    """The texts of a file of records, a thousand at a time."""
    batch = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


def loop(tokenizer: Tokenizer, path: Path) -> Counter[int]:
    """The plain way."""
    counts: Counter[int] = Counter()
    for batch in batches(path):
        for encoding in tokenizer.encode_batch(batch):
            counts.update(encoding.ids)
    return counts


def encode_alone(encode: Callable[[list[str]], object], path: Path) -> float:
    """Seconds that a tokenizer takes, without looking at its ids."""
    seconds = 0.0
    for batch in batches(path):
        begin = clock()
        encode(batch)
        seconds += clock() - begin
    return seconds


def count(tokenizer: Tokenizer, content: bytes, path: Path) -> Any:  # noqa: ANN401
    """Counts of `trimserve profile`, int64 (rows,), with the tokens around each text."""
    counter = CorpusCounter(Corpus([str(path)], "text"), tokenizer, content, _ROWS, How())
    counter.count(lambda _: None)
    block = counter.sums.total
    return block.counts + block.texts * np.bincount(tokenizer.encode("").ids, minlength=_ROWS)


def measure(name: str, order: int, files: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds of each variant by corpus; the variants run backwards in rounds of odd order.

    Raises:
        AssertionError: the counts differ from the loop's.
    """
    file = data_folder() / "tokenizers" / name / "tokenizer.json"
    tokenizer, content = load_tokenizer(file), file.read_bytes()
    tokenizer.encode_batch_fast(["warm", "up"])
    loads = FastokensLoads()
    encoders: dict[str, Callable[[list[str]], object]] = {"encode alone": tokenizer.encode_batch_fast}
    # Of its own, as fastokens remembers the words it met.
    if (fast := loads.warm(content)) is not None:
        encoders["fastokens alone"] = fast.encode
    setattr(choosing, "FastEncoder", loads)  # noqa: B010 - a class to mypy
    result = {}
    for path in files:
        seconds: dict[str, float] = {}
        counts: dict[str, Any] = {}
        for variant in VARIANTS[:: 1 if order % 2 == 0 else -1]:
            loads.missing = variant.endswith("fastokens")
            if variant in encoders:
                seconds[variant] = encode_alone(encoders[variant], path)
            if variant.endswith("alone"):
                continue
            begin = clock()
            counts[variant] = loop(tokenizer, path) if variant == "loop" else count(tokenizer, content, path)
            seconds[variant] = clock() - begin
        expected = np.zeros(_ROWS, np.int64)
        looped = counts.pop("loop")
        expected[list(looped)] = list(looped.values())
        for variant, found in counts.items():
            if not np.array_equal(expected, found):
                raise AssertionError(f"{name} on {path.name}: the counts of {variant} differ")
        result[path.stem] = seconds
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])))
