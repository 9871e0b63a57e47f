"""One process of the decode benchmark: load a folder, then answer requests, a line of JSON each.

Little but the runtime is imported, so that the memory measured is the runtime's. Requests:
``{"prompt", "mode", "tokens", "max_block"}`` generates greedily; ``{"steps", "context"}`` measures the
decoder's step and the cold product apart; ``{"parts"}`` runs body and head of the graph apart.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.process import memory
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.session import DEVICES, Session, open_session

REPEATS = 15


class TimedSession:
    """A session whose runs are timed."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._session = session
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._session, name)
        return partial(self._timed, found) if name.startswith("run") else found

    def _timed(self, run: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        begin = time.perf_counter()
        result = run(*args)
        self.seconds += time.perf_counter() - begin
        return result


class CountingHead(ColdHead):
    """A cold head that counts the sizes of the blocks it checks."""

    def __init__(self, generator: Generator, threads: int) -> None:
        super().__init__(generator.folder, threads=threads)
        self.sizes: Counter[int] = Counter()

    def maxima(self, hidden: Floats) -> tuple[Floats, Ids]:
        """See `ColdHead.maxima`."""
        self.sizes[len(hidden)] += 1
        return super().maxima(hidden)


def main() -> int:
    """Print a line when the folder is loaded, then a line for each line of stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    args = parser.parse_args()
    begin = time.perf_counter()
    model = load(args.folder, threads=args.threads, device=args.device)
    if not isinstance(model, Generator):
        parser.error(f"{args.folder} is no generator")
    answer({"load_ms": 1e3 * (time.perf_counter() - begin)})
    model._decoder._session = cast(Session, TimedSession(model._decoder._session))
    head: CountingHead | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("mode") == "exact" and head is None and len(model._cold):
            head = cast(CountingHead, model._head.get(partial(CountingHead, model, args.threads)))
        if "prompt" in request:
            answer(generate(model, request, head))
        else:
            answer(terms(model, request, head, args.threads))
    return 0


def answer(document: dict[str, Any]) -> None:
    """Write one line for the parent process."""
    print(json.dumps(document), flush=True)


def generate(model: Generator, request: dict[str, Any], head: CountingHead | None) -> dict[str, Any]:
    """Generate one token, then all of them: the difference is the time of decoding alone."""
    options: dict[str, Any] = {"temperature": 0.0} | ({"mode": request["mode"]} if request["mode"] else {})
    options |= {name: request[name] for name in ("max_block", "certify") if name in request}
    first_ms, _ = timed_ms(lambda: model.generate(request["prompt"], max_new_tokens=1, **options))
    before, sizes = _counts(model), Counter(head.sizes) if head else Counter()
    run_before = _session(model).seconds
    total_ms, (result,) = timed_ms(
        lambda: model.generate(request["prompt"], max_new_tokens=request["tokens"], **options)
    )
    after = _counts(model)
    return {
        "ms": total_ms - first_ms,
        "first_ms": first_ms,
        "tokens": len(result.ids),
        "ids": list(result.ids),
        "run_ms": 1e3 * (_session(model).seconds - run_before),
        "drafted": after["drafted"] - before["drafted"],
        "rejected": after["rejected"] - before["rejected"],
        "cold_tokens": after["cold_tokens"] - before["cold_tokens"],
        "cold_reads": {
            name: number - before["cold_reads"][name] for name, number in after["cold_reads"].items()
        },
        "checks": dict(head.sizes - sizes) if head else {},
        "part_ms": {
            name: 1e3 * (seconds - before["seconds"][name]) for name, seconds in after["seconds"].items()
        },
        "memory": asdict(memory()),
    }


def _session(model: Generator) -> TimedSession:
    return cast(TimedSession, model._decoder._session)


def _counts(model: Generator) -> dict[str, Any]:
    counted = ("drafted", "rejected", "cold_tokens", "seconds")
    found = {name: getattr(model.stats, name) for name in counted}
    return found | {"cold_reads": asdict(model.stats.cold_reads)}


def terms(
    model: Generator, request: dict[str, Any], head: CountingHead | None, threads: int
) -> dict[str, Any]:
    """Milliseconds of a decoder step, of the graph's body and head alone, and of the cold product by size."""
    decoder, cold = model._decoder, model._cold
    shape = (max(request["sizes"]), decoder.hidden_size)
    hidden = np.random.default_rng(0).standard_normal(shape, np.float32).astype(decoder.dtype)
    measured: dict[str, Any] = {"step": step_ms(decoder, request["context"])}
    if "body" in request:
        decoder_body = Decoder(open_session(Path(request["body"]), threads=threads))
        measured["body"] = step_ms(decoder_body, request["context"])
    if "head" in request:
        session = open_session(Path(request["head"]), threads=threads)
        measured["head"] = median_ms(lambda: session.run(None, {"hidden_states": hidden[None, :1]}))
    if head is not None:
        measured["cold"] = {
            size: median_ms(partial(ColdHead.maxima, head, hidden[:size])) for size in request["sizes"]
        }
    measured["cold_rows"] = len(cold)
    return measured


def step_ms(decoder: Decoder, context: int) -> float:
    """Milliseconds of a step of one token after `context` tokens."""
    cache = decoder.empty_cache(1)
    decoder.step(cache, np.zeros((1, context), np.int64), decoder.no_rows)
    token = np.zeros((1, 1), np.int64)
    return median_ms(lambda: decoder.step(cache, token, decoder.no_rows))


def median_ms(action: Callable[[], object]) -> float:
    """Median milliseconds of an action, after two calls that are not counted."""
    times = [timed_ms(action)[0] for _ in range(REPEATS + 2)]
    return float(np.median(times[2:]))


def timed_ms(action: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds that an action takes, and its result."""
    begin = time.perf_counter_ns()
    result = action()
    return (time.perf_counter_ns() - begin) / 1e6, result


if __name__ == "__main__":
    sys.exit(main())
