"""The engine under 1 to 16 clients: tokens a second, time to the first token, gaps between tokens.

Each client asks for one answer after the other, with a prompt that begins with the same tokens as everybody's
(a system prompt) and goes on with its own. Every count of clients has a process of its own; they take turns.
Rows of `results/engine.jsonl` have what the engine says of itself, too: its mean batch, reused tokens, and
whether it was strict. Aims on two cores: 8 clients at least 3 times the tokens a second of one with fp32, 1.4
times with int4; the 95th percentile of the gaps below twice the median.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trimserve.arrays import Ids
from trimserve.console import table
from trimserve.engine import Engine, EngineSettings, Finished, GenerationRequest, Piece
from trimserve.generation.generator import Generator
from trimserve.loading import load

CLIENTS = (1, 2, 4, 8, 16)
_SYSTEM_TOKENS, _OWN_TOKENS, _NEW_TOKENS = 64, 48, 64
_ANSWERS = 4  # of each client
_PERCENTILES = {"p50": 50, "p95": 95}


def worker(folder: Path, clients: int, threads: int) -> dict[str, Any]:
    """Measure one count of clients in this process."""
    model = load(folder, threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folder} is no generator")
    engine = Engine(model, EngineSettings())
    list(engine.submit(_request(model, 0, 0)).events())  # what is made ready once
    times: list[list[list[float]]] = [[] for _ in range(clients)]

    def ask(client: int) -> None:
        for answer in range(_ANSWERS):
            begin = time.perf_counter()
            arrivals = [begin]
            for event in engine.submit(_request(model, client + 1, answer)).events():
                if isinstance(event, Piece):
                    arrivals += [time.perf_counter()] * len(event.ids)
                elif not isinstance(event, Finished):
                    raise event.error
            times[client].append(arrivals)

    begin = time.perf_counter()
    callers = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    seconds = time.perf_counter() - begin
    answers = [arrivals for of_client in times for arrivals in of_client]
    gaps = np.concatenate([np.diff(arrivals[1:]) for arrivals in answers])
    metrics = engine.metrics()
    engine.close()
    return {
        "tokens_per_second": sum(len(arrivals) - 1 for arrivals in answers) / seconds,
        "requests_per_second": len(answers) / seconds,
        "first_token_ms": _percentiles(np.array([arrivals[1] - arrivals[0] for arrivals in answers])),
        "gap_ms": _percentiles(gaps),
        "mean_batch": metrics.decode_rows / max(metrics.decode_steps, 1),
        "cached_tokens": metrics.cached_tokens,
        "prompt_tokens": metrics.prompt_tokens,
        "strict": metrics.strict,
        "batching": metrics.batching,
    }


def _request(model: Generator, client: int, answer: int) -> GenerationRequest:
    vocab = model.folder.vocab
    system = np.random.default_rng(0).choice(vocab.kept_ids, _SYSTEM_TOKENS)
    own: Ids = np.random.default_rng((client, answer)).choice(vocab.kept_ids, _OWN_TOKENS)
    options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    return GenerationRequest(np.concatenate([system, own]).astype(np.int32), options)


def _percentiles(seconds: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(seconds, rank) * 1e3) for name, rank in _PERCENTILES.items()}


def measure(folder: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Measure all counts of clients in turn."""
    counts = CLIENTS[:2] if args.quick else CLIENTS
    neighbours = harness.Neighbours()
    command = ["-m", "bench.engine", str(folder), "--threads", str(args.threads), "--worker"]
    runs = harness.in_turn({str(count): [*command, str(count)] for count in counts}, args.rounds)
    return {
        "model": folder.name,
        "threads": args.threads,
        "others_cpu_share": neighbours.share(),
        "clients": {count: _of_count(found) for count, found in runs.items()},
        "samples": runs,
    }


def _of_count(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speed = asdict(harness.spread([run["tokens_per_second"] for run in runs]))
    best = max(runs, key=lambda run: run["tokens_per_second"])
    return {**best, "tokens_per_second": speed}


def summary(row: Mapping[str, Any]) -> str:
    """One folder for people."""
    header = ("clients", "tokens/s", "first token p50", "p95", "gap p50", "p95", "mean batch", "reused")
    lines = [
        (
            count,
            f"{found['tokens_per_second']['median']:.1f}",
            *(f"{found[name][rank]:.1f}" for name in ("first_token_ms", "gap_ms") for rank in _PERCENTILES),
            f"{found['mean_batch']:.1f}",
            f"{found['cached_tokens'] / found['prompt_tokens']:.0%}",
        )
        for count, found in row["clients"].items()
    ]
    return f"{row['model']}, {row['threads']} threads, ms\n{table(header, lines)}"


def main() -> int:
    """Measure, save a row a folder, print a table a folder."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument("folders", type=Path, nargs="+", help="trimmed folders of generators")
    parser.add_argument("--worker", type=int, help="one measurement in this process, with so many clients")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.folders[0], args.worker, args.threads)))
        return 0
    rows = []
    for folder in args.folders:
        row = measure(folder.resolve(), args)
        harness.save_row("engine", row, quick=args.quick)
        print(summary(row), file=sys.stderr)
        rows.append({key: value for key, value in row.items() if key != "samples"})
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
