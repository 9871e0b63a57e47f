"""Encoders, full against trimmed, by batch size and text length: time, memory, bytes, time to a first result.

Processes of the two alternate step by step, so that the ratio of their times is fair on a busy machine too.
A step's time holds tokenising. A cell stops at `--steps` steps or, after at least five, when `--seconds` are
over; its row says how many it had.

Memory and the time from nothing to a first embedding are those of other fresh processes, the interpreter and
its imports included. Weights are mapped files, of which only the pages that were looked up are resident:
memory is read after one text and again after 512 from all over the corpus.
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.encoder.models import LENGTHS, MODELS, TEXTS
from trimserve.console import human_bytes, table
from trimserve.folder.manifest import read_manifest, stored_weight_bytes

BATCHES = (1, 8, 32)
_LEAST_STEPS = 5
_MEMORY_BATCH = 32
SIDES = ("full", "trimmed")


def measure(name: str, work: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Measure one model; returns the row for the result file."""
    made = harness.fresh_process(["-m", "bench.encoder.models", name, "--work", str(work)])
    folders = {side: Path(made[side]) for side in SIDES}
    texts = {int(length): found for length, found in made["texts"].items()}
    corpus = made["corpus"][: 64 if args.quick else None]
    starts = _fresh(folders, corpus, 2 if args.quick else args.rounds, args)
    neighbours = harness.Neighbours()
    cells = _grid(folders, texts, args)
    weights = {side: stored_weight_bytes(read_manifest(folder).files) for side, folder in folders.items()}
    memory = {side: _medians([start["memory"] for start in starts[side]]) for side in SIDES}
    removed = weights["full"] - weights["trimmed"]
    saved = memory["full"]["resident"] - memory["trimmed"]["resident"]
    manifest = read_manifest(folders["trimmed"])
    return {
        "model": name,
        "vocab_size": manifest.vocab_size,
        "kept": manifest.kept,
        "threads": args.threads,
        "weight_bytes": weights,
        "folder_bytes": {side: _folder_bytes(folder) for side, folder in folders.items()},
        "removed_bytes": removed,
        "saved_bytes": saved,
        "saved_share": saved / removed,
        "memory": memory,
        "first_memory": {side: _medians([start["first_memory"] for start in starts[side]]) for side in SIDES},
        "memory_texts": len(corpus),
        "memory_samples": {side: [start["memory"] for start in starts[side]] for side in SIDES},
        "first_result_ms": {
            side: asdict(harness.spread([start["first_ms"] for start in starts[side]])) for side in SIDES
        },
        "first_result_ratio": asdict(
            harness.ratio(*([start["first_ms"] for start in starts[side]] for side in reversed(SIDES)))
        ),
        "cells": cells,
        "others_cpu_share": neighbours.share(),
    }


def _worker(folder: Path, args: Any) -> harness.Worker:  # noqa: ANN401
    words = ["-m", "trimserve.benchmark.worker", str(folder.resolve()), "--device", args.device]
    return harness.Worker([*words, "--threads", str(args.threads)])


def _fresh(
    folders: Mapping[str, Path],
    corpus: Sequence[str],
    rounds: int,
    args: Any,  # noqa: ANN401
) -> dict[str, list[dict[str, Any]]]:
    """In fresh processes: ms from their start to a first embedding, memory then and after the corpus."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            with _worker(folders[side], args) as worker:
                first = worker.ask(json.dumps({"texts": corpus[:1]}))
                first_ms = 1e3 * (time.perf_counter() - begin)
                for start in range(0, len(corpus), _MEMORY_BATCH):
                    last = worker.ask(json.dumps({"texts": corpus[start : start + _MEMORY_BATCH]}))
            found[side].append(
                {"first_ms": first_ms, "first_memory": first["memory"], "memory": last["memory"]}
            )
    return found


def _grid(folders: Mapping[str, Path], texts: Mapping[int, list[str]], args: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(folders[side], args)) for side in SIDES}
        cells = []
        for batch in args.batch:
            for length in args.length:
                if batch * length > args.most_tokens:
                    continue
                request = json.dumps({"texts": texts[length][:batch]})
                cells.append({"batch": batch, "length": length} | _cell(workers, request, batch, args))
                print(f"{batch} x {length}: {cells[-1]['time_ratio']['value']:.3f}", file=sys.stderr)
    return cells


def _cell(
    workers: Mapping[str, harness.Worker],
    request: str,
    batch: int,
    args: Any,  # noqa: ANN401
) -> dict[str, Any]:
    harness.alternately(workers, request, 1)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    begin = time.perf_counter()
    for number in range(args.steps):
        if number >= _LEAST_STEPS and time.perf_counter() - begin > args.seconds:
            break
        for side, (answer,) in harness.alternately(workers, request, 1).items():
            times[side].append(answer["ms"])
        workers = {side: workers[side] for side in reversed(list(workers))}
    return {
        "ms": {side: asdict(harness.spread(times[side])) for side in SIDES},
        "ms_samples": {side: [round(ms, 3) for ms in times[side]] for side in SIDES},
        "texts_per_s": {side: 1e3 * batch / float(np.median(times[side])) for side in SIDES},
        "time_ratio": asdict(harness.paired_ratio(times["trimmed"], times["full"])),
    }


def _medians(found: Sequence[dict[str, int | None]]) -> dict[str, int]:
    return {
        field: int(np.median([one[field] or 0 for one in found]))
        for field, value in found[0].items()
        if value is not None
    }


def _folder_bytes(folder: Path) -> int:
    return sum(entry.bytes for entry in read_manifest(folder).files.values())


def summary(row: Mapping[str, Any]) -> str:
    """One model for people."""
    times = [
        (
            f"{cell['batch']} x {cell['length']}",
            *(f"{cell['ms'][side]['median']:.1f}" for side in SIDES),
            *(f"{cell['texts_per_s'][side]:.1f}" for side in SIDES),
            f"{cell['time_ratio']['value']:.3f}",
            f"{cell['time_ratio']['low']:.3f} to {cell['time_ratio']['high']:.3f}",
            cell["ms"]["full"]["count"],
        )
        for cell in row["cells"]
    ]
    header = (
        "batch x tokens",
        "full ms",
        "trimmed ms",
        "full texts/s",
        "trimmed texts/s",
        "ratio",
        "95 %",
        "steps",
    )
    memory = [
        (field, *(human_bytes(row["memory"][side][field]) for side in SIDES))
        for field in row["memory"]["full"]
    ]
    memory.insert(0, ("graph and weights", *(human_bytes(row["weight_bytes"][side]) for side in SIDES)))
    memory.append(("first result, ms", *(f"{row['first_result_ms'][side]['median']:.0f}" for side in SIDES)))
    return "\n".join(
        [
            f"{row['model']}: K = {row['kept']:,} of V = {row['vocab_size']:,}, {row['threads']} threads",
            table(header, times),
            table(("", *SIDES), memory),
            f"resident memory after {row['memory_texts']} texts is less by {row['saved_share']:.0%} of the "
            f"{human_bytes(row['removed_bytes'])} removed",
        ]
    )


def main() -> int:
    """Measure the chosen models, save a row each, print a table each."""
    parser = harness.parser(__doc__ or "", rounds=5, work="checkpoints and exports")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, choices=range(1, TEXTS + 1), default=list(BATCHES))
    parser.add_argument("--length", nargs="+", type=int, choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument(
        "--most-tokens", type=int, default=4096, help="leave out larger batch x length (default 4096)"
    )
    parser.add_argument(
        "--steps", type=int, default=harness.MIN_STEPS, help="timed steps a cell (default 30)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="a cell after five steps (default 10)")
    args = parser.parse_args()
    if args.quick:
        args.model, args.batch, args.length, args.steps = args.model[:1], [1, 8], [16, 128], 5
    rows = []
    for name in args.model:
        with harness.scratch_folder(f"encoder-{name}", args.work) as work:
            row = measure(name, work, args)
        harness.save_row("encoder_grid", row, quick=args.quick, device=args.device)
        print(summary(row), file=sys.stderr)
        rows.append(row | {"cells": [harness.without_samples(cell) for cell in row["cells"]]})
    harness.report("", {"rows": [harness.without_samples(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
