"""One process of the encoder benchmark: load a folder, embed all texts, say what that took, time batches.

Little but the runtime is imported, so that the memory measured is the runtime's.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trimserve.encoder.encoder import Encoder
from trimserve.loading import load
from trimserve.process import memory


def main() -> int:
    """Print a line {load_ms, corpus_s, memory}, then a line {ms} for each line of stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, help="a text a line")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--embeddings", type=Path, help="where to save them, as .npy")
    args = parser.parse_args()
    texts = args.texts.read_text("utf-8").split("\n")[:-1]

    begin = time.perf_counter()
    model = load(args.folder, threads=args.threads)
    if not isinstance(model, Encoder):
        parser.error(f"{args.folder} is no encoder")
    loaded = time.perf_counter()
    embeddings = model.encode(texts, batch_size=args.batch_size)
    embedded = time.perf_counter()
    used = asdict(memory())
    if args.embeddings:
        np.save(args.embeddings, embeddings)
    answer({"load_ms": 1e3 * (loaded - begin), "corpus_s": embedded - loaded, "memory": used})
    batch = middle(sorted(texts, key=len), args.batch_size)
    for _ in sys.stdin:
        answer({"ms": timed_ms(model, batch)})
    return 0


def answer(document: dict[str, Any]) -> None:
    """Write one line for the parent process."""
    print(json.dumps(document), flush=True)


def middle(texts: list[str], count: int) -> list[str]:
    """The `count` texts around the median."""
    start = max(0, (len(texts) - count) // 2)
    return texts[start : start + count]


def timed_ms(model: Encoder, batch: list[str]) -> float:
    """Milliseconds that one batch takes, tokenising included."""
    begin = time.perf_counter_ns()
    model.encode(batch, batch_size=len(batch))
    return (time.perf_counter_ns() - begin) / 1e6


if __name__ == "__main__":
    sys.exit(main())
