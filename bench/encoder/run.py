"""All-MiniLM-L6-v2, full against trimmed to the standard library's docstrings: size, memory, time.

Both are exported by the same exporter and passes and run by the same runtime; the full one keeps every row.
Each process embeds the same corpus, which gives its memory (of the whole process); then single batches of
the two alternate, which gives the times.
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trimserve.console import human_bytes, table
from trimserve.folder.manifest import read_manifest
from trimserve.vocab.map import VocabMap

BATCH_SIZE = 32
WARM_UP, STEPS = 3, 30
# The share of the removed bytes that must be missing from the trimmed process.
SAVED_SHARE = 0.85


def full_folder(model: Path, vocab: VocabMap, target: Path) -> None:
    """Export a model with every row kept, so that the runtime can load the full model too."""
    from trimserve_export import export  # seconds to import

    everything = VocabMap.everything(vocab.vocab_size, vocab.tokenizer_sha256)
    export(model, everything, target, cold=False, overwrite=True)


def compare(full: Path, trimmed: Path, texts: Path, *, rounds: int, threads: int) -> dict[str, Any]:
    """Measure two folders: a pair of fresh processes a round, whose timed batches alternate.

    Args:
        full: folder with every row.
        trimmed: the trimmed folder.
        texts: the corpus to embed, a text a line.
        rounds: processes of each.
        threads: of the runtime.

    Returns:
        The row for the result file: ``full`` and ``trimmed`` with bytes, rows, memory and times, the ratio
        of their times, the largest difference of the embeddings, and the share of the removed bytes saved.
    """
    runs: dict[str, list[dict[str, Any]]] = {"full": [], "trimmed": []}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch, f"{name}.npy") for name in runs}
        commands = {
            name: _command(folder, texts, files[name], threads)
            for name, folder in (("full", full), ("trimmed", trimmed))
        }
        for number in range(rounds):
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
            for name, result in _round(commands).items():
                runs[name].append(result)
        embeddings = [np.load(file) for file in files.values()]
    row: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "threads": threads,
        "texts": len(embeddings[0]),
        "full": _summary(full, runs["full"]),
        "trimmed": _summary(trimmed, runs["trimmed"]),
        "max_abs_diff": float(np.abs(embeddings[0] - embeddings[1]).max()),
    }
    medians = {name: [float(np.median(run["batch_ms"])) for run in runs[name]] for name in runs}
    row["time_ratio"] = asdict(harness.paired_ratio(medians["trimmed"], medians["full"]))
    removed = row["full"]["weight_bytes"] - row["trimmed"]["weight_bytes"]
    saved = row["full"]["memory"]["resident"] - row["trimmed"]["memory"]["resident"]
    return row | {"removed_bytes": removed, "saved_bytes": saved, "saved_share": saved / removed}


def _round(commands: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(harness.Worker(words)) for name, words in commands.items()}
        answers = harness.alternately(workers, "batch", WARM_UP + STEPS)
    timed = {name: [answer["ms"] for answer in answers[name][WARM_UP:]] for name in commands}
    return {name: worker.ready | {"batch_ms": timed[name]} for name, worker in workers.items()}


def _command(folder: Path, texts: Path, embeddings: Path, threads: int) -> list[str]:
    words = ["-m", "bench.encoder.worker", str(folder.resolve()), str(texts.resolve())]
    words += ["--embeddings", str(embeddings), "--threads", str(threads), "--batch-size", str(BATCH_SIZE)]
    return words


def _summary(folder: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    files = {name: entry.bytes for name, entry in manifest.files.items()}
    graphs = tuple(manifest.graphs.values())
    fields = runs[0]["memory"].keys()
    return {
        "rows": manifest.kept,
        "folder_bytes": sum(files.values()),
        "weight_bytes": sum(size for name, size in files.items() if name.startswith(graphs)),
        "memory": {
            field: int(np.median([run["memory"][field] for run in runs]))
            for field in fields
            if runs[0]["memory"][field] is not None
        },
        "resident_samples": [run["memory"]["resident"] for run in runs],
        "batch_ms": asdict(harness.spread([ms for run in runs for ms in run["batch_ms"]])),
        "batch_ms_samples": [[round(ms, 3) for ms in run["batch_ms"]] for run in runs],
        "load_ms": asdict(harness.spread([run["load_ms"] for run in runs])),
        "corpus_s": asdict(harness.spread([run["corpus_s"] for run in runs])),
    }


HEADER = ("all-MiniLM-L6-v2", "full", "trimmed")
_MEMORY = {"resident": "resident memory", "anonymous": "- of it anonymous", "file": "- of it file pages"}


def comparison_lines(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The row as lines of a table under `HEADER`, for people."""
    full, trimmed = row["full"], row["trimmed"]
    weights = [human_bytes(one["weight_bytes"]) for one in (full, trimmed)]
    folders = [human_bytes(one["folder_bytes"]) for one in (full, trimmed)]
    times = [f"{one['batch_ms']['median']:.1f}" for one in (full, trimmed)]
    lines = [
        ("vocab rows", f"{full['rows']:,}", f"{trimmed['rows']:,}"),
        ("graph and weights", weights[0], weights[1]),
        ("whole folder, with cold rows", folders[0], folders[1]),
    ]
    for field, name in _MEMORY.items():
        if field in full["memory"]:
            sizes = [human_bytes(one["memory"][field]) for one in (full, trimmed)]
            lines.append((name, sizes[0], sizes[1]))
    lines.append((f"ms for {row['batch_size']} texts of median length", times[0], times[1]))
    lines.append(("largest difference of an embedding", "", f"{row['max_abs_diff']:g}"))
    return lines


def main() -> int:
    """Measure the folders that `make demo` made, save the row, print the table."""
    parser = harness.parser(__doc__ or "", rounds=10)
    parser.add_argument(
        "--demo", type=Path, default=harness.ROOT / "demo-out", help="where `make demo` wrote"
    )
    args = parser.parse_args()
    folders = [args.demo / "minilm-full", args.demo / "minilm-stdlib"]
    if not all(folder.is_dir() for folder in folders):
        parser.error(f"{args.demo} lacks {folders[0].name} or {folders[1].name}: run `make demo` first")
    rounds = 2 if args.quick else args.rounds
    texts = args.demo / "docs.txt"
    row = compare(folders[0], folders[1], texts, rounds=rounds, threads=args.threads)
    harness.save_row("encoder", row, quick=args.quick)
    harness.report(table(HEADER, comparison_lines(row)), harness.without_samples(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
