"""What translating token ids to compact ids and cold slots costs, against tokenising the same text.

Both are timed in one process, batch by batch in turn, on the documents that `make demo` profiled.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench import harness
from trimserve.folder import open_folder
from trimserve.report import table
from trimserve.text import Codec

BATCH_SIZES = (1, 32, 256)
TARGET = 0.02


def measure(codec: Codec, texts: list[str], batch_size: int) -> dict[str, float]:
    """Milliseconds to tokenise and to translate all texts, and how many of their tokens are cold."""
    tokenised, translated, tokens, cold = 0, 0, 0, 0
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        begin = time.perf_counter_ns()
        sequences = codec.encode(batch)
        tokenised += time.perf_counter_ns() - begin
        joined = np.concatenate(sequences)  # the full model's ids are joined and padded too
        begin = time.perf_counter_ns()
        slotted = codec.vocab.with_slots(joined)
        translated += time.perf_counter_ns() - begin
        tokens += joined.size
        cold += slotted.cold_tokens
    return {
        "tokenise_ms": tokenised / 1e6,
        "translate_ms": translated / 1e6,
        "tokens": tokens,
        "cold_tokens": cold,
    }


def main() -> int:
    """Measure, save the row, print the table."""
    parser = harness.parser(__doc__ or "", rounds=10)
    parser.add_argument(
        "--demo", type=Path, default=harness.ROOT / "demo-out", help="where `make demo` wrote"
    )
    args = parser.parse_args()
    codec = Codec(open_folder(args.demo / "minilm-stdlib"))
    lines = (args.demo / "docstrings.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    row: dict[str, object] = {"texts": len(texts)}
    shown = []
    for size in BATCH_SIZES:
        runs = [measure(codec, texts, size) for _ in range(1 + (2 if args.quick else args.rounds))][1:]
        spent = {name: [run[name] for run in runs] for name in ("tokenise_ms", "translate_ms")}
        share = harness.ratio(spent["translate_ms"], spent["tokenise_ms"])
        row[f"batch_{size}"] = {**runs[0], **spent, "share": asdict(share)}
        medians = [float(np.median(values)) for values in spent.values()]
        shown.append((size, *(f"{value:.1f}" for value in medians), f"{100 * share.value:.2f} %"))
    harness.save_row("translate", row, quick=args.quick)
    header = ("texts a batch", "tokenise ms", "translate ms", f"share (target {100 * TARGET:.0f} %)")
    harness.report(table(header, shown), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
