"""Serving a decoder by prompt length and batch: time to the first token, time a token; full, compact, exact.

Prompts of 64 and 512 tokens, 1 and 4 requests at once, fp32 and int4, in processes that take turns. The model
is one of `decode_models`; the full one keeps every id in the same runtime. Beside the memory of each process
stand what ONNX Runtime's arenas held in the largest cell and, on a GPU, what NVML counts for the process.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from bench import harness
from bench.arena import arena_bytes
from bench.machine import device_memory
from trimserve.console import human_bytes, table
from trimserve.generation.generator import Generator
from trimserve.loading import load

PROMPTS = (64, 512)
BATCHES = (1, 4)
VARIANTS = {"full": ("full", None), "compact": ("trimmed", "compact"), "exact": ("trimmed", "exact")}


def worker(folder: Path, device: Literal["cpu", "cuda"], threads: int) -> None:
    """Answer requests ``{"prompts", "tokens", "mode"}``: ms to the first token, ms a token, memory."""
    model = load(folder, device=device, threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folder} is no generator")
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        options: dict[str, Any] = {"mode": request["mode"], "temperature": 0.0}
        begin = time.perf_counter_ns()
        model.generate(request["prompts"], max_new_tokens=1, **options)
        middle = time.perf_counter_ns()
        results = model.generate(request["prompts"], max_new_tokens=request["tokens"], **options)
        end = time.perf_counter_ns()
        steps = max(len(result.ids) for result in results) - 1
        answer = {
            "first_ms": (middle - begin) / 1e6,
            "ms": (end - middle - (middle - begin)) / 1e6 / max(1, steps),
            "ids": [list(result.ids) for result in results],
            "memory": asdict(harness.memory()),
            "device_bytes": device_memory(os.getpid()) if device == "cuda" else None,
        }
        print(json.dumps(answer), flush=True)


def measure(name: str, quantize: str | None, work: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """All cells of one model in one number format; returns the row for the result file."""
    words = ["-m", "bench.decode.models", name, "--work", str(work)]
    words += ["--stand", "0.99", "--prompt-tokens", str(max(args.prompt)), "--layers", str(args.layers)]
    made = harness.fresh_process(words + (["--quantize", quantize] if quantize else []))
    neighbours = harness.Neighbours()
    cells = []
    with contextlib.ExitStack() as stack:
        workers = {
            variant: stack.enter_context(harness.Worker(_command(made[folder], args)))
            for variant, (folder, _) in VARIANTS.items()
        }
        for batch in args.batch:
            for length in args.prompt:
                prompts = [" ".join(text.split()[:length]) for text in made["prompts"][:batch]]
                cell = _cell(workers, prompts, args.tokens, args.steps)
                cells.append({"batch": batch, "prompt": length} | cell)
                print(f"{quantize or 'fp32'}, {batch} x {length}", file=sys.stderr)
    largest = [" ".join(text.split()[: max(args.prompt)]) for text in made["prompts"][: max(args.batch)]]
    return {
        "model": name,
        "quantize": quantize,
        "layers": args.layers,
        "threads": args.threads,
        "tokens": args.tokens,
        "cells": cells,
        "others_cpu_share": neighbours.share(),
        "arena_bytes": {
            variant: arena_bytes(
                Path(made[folder]),
                {"prompts": largest, "tokens": args.tokens, "mode": mode},
                device=args.device,
                threads=args.threads,
            )
            for variant, (folder, mode) in VARIANTS.items()
        },
    }


def _command(folder: str, args: Any) -> list[str]:  # noqa: ANN401
    words = ["-m", "bench.serving", "--worker", folder, "--device", args.device]
    return [*words, "--threads", str(args.threads)]


def _cell(
    workers: Mapping[str, harness.Worker], prompts: list[str], tokens: int, steps: int
) -> dict[str, Any]:
    requests = {
        variant: json.dumps({"prompts": prompts, "tokens": tokens, "mode": mode})
        for variant, (_, mode) in VARIANTS.items()
    }
    answers = harness.alternately(workers, requests, 1 + steps)
    timed = {name: found[1:] for name, found in answers.items()}
    return {
        "first_ms": {
            name: asdict(harness.spread([one["first_ms"] for one in found])) for name, found in timed.items()
        },
        "ms": {name: asdict(harness.spread([one["ms"] for one in found])) for name, found in timed.items()},
        "ms_samples": {name: [one["ms"] for one in found] for name, found in timed.items()},
        "time_ratio": {
            name: asdict(
                harness.paired_ratio([one["ms"] for one in timed[name]], [one["ms"] for one in timed["full"]])
            )
            for name in ("compact", "exact")
        },
        "same_ids": all(
            mine["ids"] == theirs["ids"] for mine, theirs in zip(timed["full"], timed["exact"], strict=True)
        ),
        "memory": {name: found[-1]["memory"] for name, found in timed.items()},
        "device_bytes": {name: found[-1]["device_bytes"] for name, found in timed.items()},
    }


HEADER = (
    "batch x prompt",
    "variant",
    "ms to the first",
    "ms a token",
    "to the full model's",
    "anonymous",
    "device (NVML)",
    "arenas, largest cell",
)


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for people, under `HEADER`."""
    return [
        (
            f"{cell['batch']} x {cell['prompt']}" if name == "full" else "",
            name,
            f"{cell['first_ms'][name]['median']:.1f}",
            f"{cell['ms'][name]['median']:.2f}",
            "" if name == "full" else f"{cell['time_ratio'][name]['value']:.2f}",
            human_bytes(cell["memory"][name]["anonymous"] or 0),
            human_bytes(cell["device_bytes"][name]) if cell["device_bytes"][name] else "-",
            _arenas(row["arena_bytes"][name]) if cell is row["cells"][-1] else "",
        )
        for cell in row["cells"]
        for name in VARIANTS
    ]


def _arenas(held: Mapping[str, int]) -> str:
    """Bytes by provider, without the word that all providers' names end in."""
    parts = (f"{name.removesuffix('ExecutionProvider')} {human_bytes(size)}" for name, size in held.items())
    return ", ".join(sorted(parts)) or "-"


def main() -> int:
    """Measure, save a row a number format, print a table each."""
    from bench.decode.models import SHAPES  # ml_dtypes, which who writes the tables may lack

    parser = harness.parser(__doc__ or "", rounds=1, work="checkpoints and exports")
    parser.add_argument("--model", choices=list(SHAPES), default="gemma-3-270m")
    parser.add_argument("--format", nargs="+", choices=("fp32", "int4", "int8"), default=["fp32", "int4"])
    parser.add_argument("--prompt", nargs="+", type=int, default=list(PROMPTS), help="tokens a prompt")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="requests at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an answer (default 32)")
    parser.add_argument("--steps", type=int, default=5, help="answers a cell and variant (default 5)")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape has")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.device, args.threads)
        return 0
    if args.quick:
        args.model, args.prompt, args.batch, args.tokens, args.steps = "tiny", [16, 32], [1, 2], 8, 2
    args.layers = args.layers or SHAPES[args.model].config["num_hidden_layers"]
    rows = []
    for chosen in args.format:
        with harness.scratch_folder("serving", args.work) as work:
            row = measure(args.model, None if chosen == "fp32" else chosen, work, args)
        harness.save_row("serving", row, quick=args.quick, device=args.device)
        print(f"{row['model']}, {chosen}\n{table(HEADER, lines(row))}", file=sys.stderr)
        rows.append(row)
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
