"""One process of the encoder benchmark: load a folder, embed all texts, say what that took.

Nothing but the runtime is imported, so that the memory measured is the runtime's.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import trimserve
from bench.harness import memory

WARM_UP = 3


def main() -> int:
    """Print one JSON line: load_ms, corpus_s, memory, batch_ms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, help="a text a line")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="timed batches")
    parser.add_argument("--embeddings", type=Path, help="where to save them, as .npy")
    args = parser.parse_args()
    texts = args.texts.read_text("utf-8").splitlines()

    begin = time.perf_counter()
    model = trimserve.load(args.folder, threads=args.threads)
    loaded = time.perf_counter()
    embeddings = model.encode(texts, batch_size=args.batch_size)
    embedded = time.perf_counter()
    used = memory()
    batch = texts[:: max(1, len(texts) // args.batch_size)][: args.batch_size]
    samples = [timed_ms(model, batch) for _ in range(WARM_UP + args.steps)][WARM_UP:]
    if args.embeddings:
        np.save(args.embeddings, embeddings)
    result = {
        "load_ms": 1e3 * (loaded - begin),
        "corpus_s": embedded - loaded,
        "memory": asdict(used),
        "batch_ms": samples,
    }
    print(json.dumps(result))
    return 0


def timed_ms(model: "trimserve.Encoder", batch: list[str]) -> float:
    """Milliseconds that one batch takes, tokenising included."""
    begin = time.perf_counter_ns()
    model.encode(batch, batch_size=len(batch))
    return (time.perf_counter_ns() - begin) / 1e6


if __name__ == "__main__":
    sys.exit(main())
