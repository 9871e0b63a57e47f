"""What translating token ids to compact ids and cold slots costs, against tokenising the same text.

Both are timed in one process, batch by batch in turn, on the documents that `make demo` profiled.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from bench import harness
from trimserve.console import table
from trimserve.folder.opening import open_folder
from trimserve.text.batching import join
from trimserve.text.codec import Codec

BATCH_SIZES = (1, 32, 256)
STEPS = ("tokenise_ms", "translate_ms", "translate_and_pad_ms")
TARGET = 0.02


def measure(codec: Codec, texts: list[str], batch_size: int) -> dict[str, float]:
    """Milliseconds to tokenise, to translate, and to translate and pad all texts; their tokens."""
    spent = dict.fromkeys(STEPS, 0)
    tokens = cold = 0
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        sequences = codec.encode(batch)
        ids = join(sequences).ids
        steps: dict[str, Callable[[], object]] = {
            "tokenise_ms": partial(codec.encode, batch),
            "translate_ms": partial(codec.vocab.with_slots, ids),
            "translate_and_pad_ms": partial(codec.slots, sequences),
        }
        for name, step in steps.items():
            begin = time.perf_counter_ns()
            step()
            spent[name] += time.perf_counter_ns() - begin
        tokens += len(ids)
        cold += codec.vocab.with_slots(ids).cold_tokens
    return {name: elapsed / 1e6 for name, elapsed in spent.items()} | {"tokens": tokens, "cold_tokens": cold}


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
        spent = {name: [run[name] for run in runs] for name in STEPS}
        share = harness.ratio(spent["translate_ms"], spent["tokenise_ms"])
        row[f"batch_{size}"] = {**runs[0], **spent, "share": asdict(share)}
        medians = [float(np.median(values)) for values in spent.values()]
        shown.append((size, *(f"{value:.1f}" for value in medians), f"{100 * share.value:.2f} %"))
    harness.save_row("translate", row, quick=args.quick)
    share_name = f"translate / tokenise (target {100 * TARGET:.0f} %)"
    header = ("texts a batch", "tokenise ms", "translate ms", "translate and pad ms", share_name)
    harness.report(table(header, shown), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
