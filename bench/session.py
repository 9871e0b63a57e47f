"""What packed copies of the weights cost and give: anonymous memory, file pages and step time of a folder.

Each variant runs in fresh processes of its own that take turns. A step feeds 1, 16 or 128 tokens: decoding, a
checked block, a prompt. docs/runtime.md quotes the newest row of each folder.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import harness
from trimserve.console import table
from trimserve.folder.opening import open_folder
from trimserve.process import available_cpus
from trimserve.runtime.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

TOKENS = (1, 16, 128)
_PAST = 100  # tokens that are in the cache already
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def work(folder: Path, *, prepack: bool, threads: int, steps: int) -> dict[str, Any]:
    """Measure one variant in this process."""
    trimmed = open_folder(folder)
    before = harness.memory()
    session = open_session(trimmed.file(trimmed.manifest.graphs["model"]), threads=threads, prepack=prepack)
    medians = {str(tokens): _median_ms(session, tokens, steps) for tokens in TOKENS}
    after = harness.memory()
    grown = {name: asdict(after)[name] - asdict(before)[name] for name in ("anonymous", "file")}
    return {"ms": medians, "memory": grown}


def _median_ms(session: "ort.InferenceSession", tokens: int, steps: int) -> float:
    feeds = _feeds(session, tokens)
    samples = []
    for _ in range(3 + steps):
        begin = time.perf_counter_ns()
        session.run(None, feeds)
        samples.append((time.perf_counter_ns() - begin) / 1e6)
    return float(np.median(samples[3:]))


def _feeds(session: "ort.InferenceSession", tokens: int) -> dict[str, Any]:
    inputs = {value.name: value for value in session.get_inputs()}
    past = _PAST if any(name.startswith("past_key_values.") for name in inputs) else 0
    rows = inputs["cold_rows"]
    feeds: Mapping[str, Any] = {
        "input_ids": np.full((1, tokens), 5, np.int64),
        "token_type_ids": np.zeros((1, tokens), np.int64),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
        "cold_rows": np.zeros((1, rows.shape[1]), _DTYPES[rows.type]),
        "logits_to_keep": np.array(1, np.int64),
    }
    caches = {
        name: np.zeros((1, value.shape[1], past, value.shape[3]), _DTYPES[value.type])
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    return {name: value for name, value in feeds.items() if name in inputs} | caches


def main() -> int:
    """Measure a folder with and without packed copies."""
    parser = harness.parser(__doc__ or "", rounds=5)
    parser.add_argument("folder", type=Path, help="a trimmed folder of a decoder or an encoder")
    parser.add_argument("--worker", choices=("packed", "mapped"), help="measure one variant, print JSON")
    args = parser.parse_args()
    threads = available_cpus()
    if args.worker:
        steps = 5 if args.quick else 30
        print(json.dumps(work(args.folder, prepack=args.worker == "packed", threads=threads, steps=steps)))
        return 0
    flags = ["--quick"] if args.quick else []
    commands = {
        name: ["-m", "bench.session", str(args.folder), "--worker", name, *flags]
        for name in ("packed", "mapped")
    }
    runs = harness.in_turn(commands, 1 if args.quick else args.rounds)
    row: dict[str, Any] = {"folder": args.folder.name, "threads": threads, "variants": {}}
    for name, results in runs.items():
        ms = {tokens: float(np.median([run["ms"][tokens] for run in results])) for tokens in results[0]["ms"]}
        memory = {
            key: int(np.median([run["memory"][key] for run in results])) for key in results[0]["memory"]
        }
        row["variants"][name] = {"ms": ms, "memory": memory, "samples": results}
    harness.save_row("session", row, quick=args.quick)
    document = {name: {"ms": v["ms"], "memory": v["memory"]} for name, v in row["variants"].items()}
    header = ("weights", *(f"ms, {tokens} tokens" for tokens in TOKENS), "anonymous MB", "file MB")
    lines = [
        (
            name,
            *(f"{value['ms'][str(tokens)]:.2f}" for tokens in TOKENS),
            f"{value['memory']['anonymous'] / 1e6:.0f}",
            f"{value['memory']['file'] / 1e6:.0f}",
        )
        for name, value in document.items()
    ]
    harness.report(table(header, lines), {"folder": row["folder"], "variants": document})
    return 0


if __name__ == "__main__":
    sys.exit(main())
