"""What the memory of a running trimmed model is made of: interpreter, libraries, tokenizer, graph.

Fresh processes load a folder part by part and generate, in compact mode and then in exact mode; each part is
what it added to anonymous memory, which is private and cannot be dropped. Another process tells how much of
that ONNX Runtime's arenas hold. The tokenizer is the original one and does not shrink with the vocab.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.arena import arena_bytes
from trimserve.console import human_bytes, table

MODEL = "multidomain-qwen2"
STAGES = ("interpreter", "numpy", "onnxruntime", "trimserve", "tokenizer", "graph", "compact answer")
EXACT = "exact answer"
_WORKER = str(harness.ROOT / "bench" / "memory" / "worker.py")


def measure(model: str, quantize: str | None, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One model in one number format; returns the row for the result file."""
    words = ["-m", "bench.decode.models", model, "--work", str(work), "--stand", "0.99"]
    words += ["--prompt-tokens", "32", *(["--quantize", quantize] if quantize else [])]
    made = harness.fresh_process(words)
    folder = Path(made["trimmed"])
    rounds = 1 if args.quick else args.rounds
    # -P: modules of bench/ must not stand before the standard library's of the same name.
    runs = harness.in_turn({"stages": ["-P", _WORKER, str(folder), str(args.threads)]}, rounds)["stages"]
    stages = {
        stage: {part: int(np.median([run[stage][part] for run in runs])) for part in runs[0][stage]}
        for stage in runs[0]
    }
    request = {"prompts": made["prompts"][:1], "tokens": 32, "mode": "compact"}
    parts = harness.fresh_process(
        ["-m", "bench.decode.parts", str(folder / "model.onnx"), str(work / "parts")]
    )
    return {
        "model": model,
        "quantize": quantize,
        "threads": args.threads,
        "weight_bytes": parts["body_bytes"] + parts["head_bytes"],
        "stages": stages,
        "stages_samples": runs,
        "arena_bytes": arena_bytes(folder, request, device="cpu", threads=args.threads),
    }


def added(row: Mapping[str, Any]) -> dict[str, int]:
    """Anonymous bytes that each part added, up to a compact answer; ``exact answer`` is the last one's."""
    stages = row["stages"]
    totals = [0, *(stages[stage]["anonymous"] for stage in (*STAGES, EXACT) if stage in stages)]
    names = [stage for stage in (*STAGES, EXACT) if stage in stages]
    return dict(zip(names, (after - before for before, after in pairwise(totals)), strict=True))


HEADER = (
    "model",
    "Python, numpy, onnxruntime, trimserve",
    "tokenizer",
    "graph and its packed weights",
    "a compact answer",
    "together",
    "arenas hold",
    "exact mode adds",
    "peak at load",
)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows for people, under `HEADER`."""
    found = []
    for row in rows:
        parts = added(row)
        imports = sum(parts[stage] for stage in STAGES[:4])
        together = row["stages"][STAGES[-1]]["anonymous"]
        sizes = [imports, *(parts[stage] for stage in STAGES[4:]), together]
        sizes += [sum(row["arena_bytes"].values()), parts.get(EXACT, 0), row["stages"]["graph"]["peak"]]
        found.append((f"{row['model']}, {row['quantize'] or 'fp32'}", *map(human_bytes, sizes)))
    return found


def main() -> int:
    """Measure, save a row a number format, print the table."""
    parser = harness.parser(__doc__ or "", rounds=3, work="the exports")
    parser.add_argument("--model", default=MODEL, help=f"of bench.decode (default {MODEL})")
    parser.add_argument("--format", nargs="+", choices=("fp32", "int4", "int8"), default=["fp32", "int4"])
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        print("this benchmark reads Linux's counters: left out", file=sys.stderr)
        return 0
    if args.quick:
        args.model, args.format = "tiny", args.format[:1]
    rows: list[Mapping[str, Any]] = []
    for chosen in args.format:
        with harness.scratch_folder("memory", args.work) as work:
            row = measure(args.model, None if chosen == "fp32" else chosen, work, args)
        harness.save_row("memory", row, quick=args.quick)
        rows.append(harness.without_samples(row))
    harness.report(table(HEADER, lines(rows)), {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
