"""Drafts from the text: time a token with and without them, where answers repeat their prompt and where not.

Prompts are documents of a corpus. To "copy", the document stands twice and the second time breaks off in its
middle: the model goes on as it did the first time, as in quotations, edits and extraction. To "continue",
it stands once. Each process alternates between the two ways, so that drift meets both alike. Rows of
`results/text_drafts.jsonl` have what steps of several tokens cost, too.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trimserve.console import table
from trimserve.generation.generator import Generator
from trimserve.loading import load

PROMPTS = ("copy", "continue")
_DOCUMENTS = 6
_DOCUMENT_TOKENS, _NEW_TOKENS = 160, 64
HEADER = ("model", "prompt", "one by one", "from the text", "ratio", "guesses fed", "stood", "same tokens")


def worker(folder: Path, corpus: Path, threads: int) -> dict[str, Any]:
    """Measure one process: milliseconds a token by prompt and way, a document an entry."""
    model = load(folder, threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folder} is no generator")
    documents = _documents(model, corpus)
    found: dict[str, Any] = {}
    model.generate(documents[0][:200], max_new_tokens=4, text_drafts=True)  # what is made ready once
    for kind in PROMPTS:
        milliseconds: dict[bool, list[float]] = {False: [], True: []}
        same, before = [], (model.stats.guessed, model.stats.guesses_stood)
        for number, document in enumerate(documents):
            prompt = document if kind == "continue" else f"{document}\n\n{document[: len(document) // 3]}"
            ids = {}
            for drafts in (False, True) if number % 2 else (True, False):
                begin = time.perf_counter()
                (first,) = model.generate(prompt, max_new_tokens=1, text_drafts=drafts)
                until_first = time.perf_counter() - begin
                begin = time.perf_counter()
                options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
                (result,) = model.generate(prompt, text_drafts=drafts, **options)  # type: ignore[arg-type]
                seconds = time.perf_counter() - begin - until_first
                milliseconds[drafts].append(1e3 * seconds / (len(result.ids) - len(first.ids)))
                ids[drafts] = result.ids
            same.append(ids[False] == ids[True])
        found[kind] = {
            "one_by_one_ms": milliseconds[False],
            "text_ms": milliseconds[True],
            "same": sum(same) / len(same),
            "guessed": model.stats.guessed - before[0],
            "stood": model.stats.guesses_stood - before[1],
        }
    costs = model.measured_rows().seconds
    return {"prompts": found, "step_ms": {str(size): 1e3 * seconds for size, seconds in costs.items()}}


def _documents(model: Generator, corpus: Path) -> list[str]:
    """Pieces of the corpus of so many tokens, from its whole length."""
    text = corpus.read_text("utf-8")
    places = np.linspace(0, len(text) * 0.9, _DOCUMENTS).astype(int)
    pieces = (text[text.find(" ", place) + 1 :][: 8 * _DOCUMENT_TOKENS] for place in places)
    return [model.codec.decode(model.codec.encode([piece])[0][:_DOCUMENT_TOKENS]) for piece in pieces]


def measure(folder: Path, corpus: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Measure a folder in several processes."""
    neighbours = harness.Neighbours()
    command = ["-m", "bench.text_drafts", str(folder), "--threads", str(args.threads)]
    runs = harness.in_turn({"": [*command, "--corpus", str(corpus), "--worker"]}, args.rounds)[""]
    return {
        "model": folder.name,
        "threads": args.threads,
        "corpus": corpus.parent.name,
        "others_cpu_share": neighbours.share(),
        "prompts": {kind: _of_kind([run["prompts"][kind] for run in runs]) for kind in PROMPTS},
        "step_ms": {
            size: float(np.median([run["step_ms"][size] for run in runs]))
            for size in sorted(set.intersection(*(set(run["step_ms"]) for run in runs)), key=int)
        },
        "run_samples": runs,
    }


def _of_kind(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    alone, drafted = ([ms for run in runs for ms in run[way]] for way in ("one_by_one_ms", "text_ms"))
    return {
        "one_by_one_ms": asdict(harness.spread(alone)),
        "text_ms": asdict(harness.spread(drafted)),
        "ratio": asdict(harness.paired_ratio(drafted, alone)),
        "guessed": sum(run["guessed"] for run in runs) / len(runs),
        "stood": sum(run["stood"] for run in runs) / len(runs),
        "same": min(run["same"] for run in runs),
    }


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for people, under `HEADER`."""
    return [
        (
            row["model"],
            kind,
            *(f"{found[way]['median']:.2f}" for way in ("one_by_one_ms", "text_ms")),
            f"{found['ratio']['value']:.2f} ({found['ratio']['low']:.2f} to {found['ratio']['high']:.2f})",
            f"{found['guessed']:.0f}",
            f"{found['stood']:.0f}",
            f"{found['same']:.0%}",
        )
        for kind, found in row["prompts"].items()
    ]


def main() -> int:
    """Measure, save a row a folder, print a table."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument("folders", type=Path, nargs="+", help="trimmed folders of generators")
    parser.add_argument("--corpus", type=Path, required=True, help="a file of text in the folders' domain")
    parser.add_argument("--worker", action="store_true", help="one measurement in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.folders[0], args.corpus, args.threads)))
        return 0
    rows = []
    for folder in args.folders:
        row = measure(folder.resolve(), args.corpus.resolve(), args)
        harness.save_row("text_drafts", row, quick=args.quick)
        rows.append(row)
    print(table(HEADER, [line for row in rows for line in lines(row)]), file=sys.stderr)
    print(json.dumps({"rows": [harness.without_samples(row) for row in rows]}, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
