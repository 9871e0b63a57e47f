"""One process of `trimserve bench`: load a folder, then work on texts, a line of JSON each time.

Little but the runtime is imported, so that the memory measured is the runtime's.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimserve.encoder.encoder import Encoder
from trimserve.folder.tasks import EMBEDDING_TASK
from trimserve.loading import load
from trimserve.process import memory
from trimserve.stdout import data_only, data_stream

if TYPE_CHECKING:
    from trimserve.generation.generator import Generator


def main(argv: Sequence[str] | None = None) -> int:
    """Print {load_ms, memory} when the folder is loaded, then a line for each request on stdin.

    A request is ``{"texts": [...]}`` and, for generators, ``max_new_tokens`` and ``mode``.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--memory", choices=("fast", "low"), default="fast")
    args = parser.parse_args(argv)
    with data_only(restore=argv is not None):
        _work(args)
    return 0


def _work(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    model = load(args.folder, device=args.device, threads=args.threads, memory=args.memory)
    _answer({"load_ms": 1e3 * (time.perf_counter() - begin), "memory": asdict(memory())})
    for line in sys.stdin:
        request = json.loads(line)
        found = encode(model, request) if isinstance(model, Encoder) else generate(model, request)
        _answer(found | {"memory": asdict(memory())})


def _answer(document: dict[str, Any]) -> None:
    print(json.dumps(document), file=data_stream(), flush=True)


def encode(model: Encoder, request: dict[str, Any]) -> dict[str, Any]:
    """Embed all texts in one batch, or run the model's head on them; tokenising included.

    Returns:
        ms of the batch, and a digest of the numbers (those of the vocab logits cannot be compared: a
        trimmed model has fewer).
    """
    texts = request["texts"]
    begin = time.perf_counter_ns()
    run = model.encode if model.task == EMBEDDING_TASK else model.forward
    arrays = run(texts, batch_size=len(texts))
    ms = (time.perf_counter_ns() - begin) / 1e6
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"ms": ms, "digest": None if model.task == "fill-mask" else digest.hexdigest()}


def generate(model: "Generator", request: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for the texts, one after the other: a token's time leaves out the first one's.

    Returns:
        ms a token after the first (None if no answer has two), ms to the first token, the ids, the
        share of tokens whose draft stood, and a digest of the answers.
    """
    from trimserve.generation.plan import PLAIN  # an encoder's process needs none of it

    options: dict[str, Any] = {**PLAIN, "mode": request["mode"]}
    rejected, answers = model.stats.rejected, []
    first_ms, token_ms = [], []
    for text in request["texts"]:
        begin = time.perf_counter_ns()
        model.generate(text, max_new_tokens=1, **options)
        middle = time.perf_counter_ns()
        (result,) = model.generate(text, max_new_tokens=request["max_new_tokens"], **options)
        end = time.perf_counter_ns()
        first_ms.append((middle - begin) / 1e6)
        if len(result.ids) > 1:
            token_ms.append((end - middle - (middle - begin)) / 1e6 / (len(result.ids) - 1))
        answers.append(list(result.ids))
    ids = [id_ for answer in answers for id_ in answer]
    return {
        "ms": float(np.mean(token_ms)) if token_ms else None,
        "first_ms": float(np.mean(first_ms)),
        "ids": ids,
        "stood": 1 - (model.stats.rejected - rejected) / max(len(ids), 1),
        "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
    }


if __name__ == "__main__":
    sys.exit(main())
