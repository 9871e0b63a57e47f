"""The certificate of exact mode: what it proves, what it reads, and what that saves.

Two kinds of rows, each in a file of its own:

- ``certificate_proof``: on documents held back from the profile, how far the largest kept logit is above the
  largest cold one (the gap), how far the bound is above it (the width), and the share of positions where
  gap beats width. The same for a sketch of 4 bits in blocks of 32, computed in float64.
- ``certificate``: a model's decoding with and without the certificate, in turn in one process, in blocks and
  token by token; the cold product, the sketch's and the full head's alone, by the number of hidden states;
  and the first two with the files dropped from the page cache before every product.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.decode import REAL_MODEL, make_case
from bench.decode_models import SHAPES
from trimserve.certified import ColdCertificate
from trimserve.coldhead import ColdHead
from trimserve.folder import COLD_NAME
from trimserve.generator import Generator
from trimserve.loading import load
from trimserve.report import human_bytes, table
from trimserve.session import open_session
from trimserve.sketch import SKETCH_DATA_NAME, SKETCH_FILES, Sketch
from trimserve.stats import ColdReads

CORPORA = ("gsm8k-en", "medquad-en")
MODELS = (REAL_MODEL, "gemma-3-270m")
SIZES = (1, 4, 16, 32)
_HELD_BACK = 0.05
_WINDOW = 256
_QUANTILES = np.linspace(0, 1, 41)
_REPEATS = 11
# Variants of decoding: what is asked of the generator.
DECODING: dict[str, dict[str, Any]] = {
    "compact": {"mode": "compact"},
    "plain": {"mode": "exact", "certify": False},
    "certified": {"mode": "exact", "certify": True},
    "plain, block 1": {"mode": "exact", "certify": False, "max_block": 1},
    "certified, block 1": {"mode": "exact", "certify": True, "max_block": 1},
}


def prove(args: argparse.Namespace, corpus: str, work: Path) -> dict[str, Any]:
    """Measure gap and width on held-back documents of a corpus; returns a row."""
    from trimserve.profiling import profile
    from trimserve.selection import select
    from trimserve_export import export

    model = harness.data_folder() / "models" / REAL_MODEL
    text = (harness.data_folder() / "corpora" / corpus / "text.txt").read_text("utf-8")
    cut = text.index("\n", int(len(text) * (1 - _HELD_BACK)))
    (work / "profiled.txt").write_text(text[:cut], "utf-8")
    vocab = select(profile([work / "profiled.txt"], model, progress=False), coverage=args.coverage)
    export(model, vocab, work / "trimmed", progress=False)
    generator = load(work / "trimmed", threads=args.threads)
    if not isinstance(generator, Generator):
        raise TypeError(f"{model} is no generator")
    row = {"corpus": corpus, "coverage": args.coverage, "kept": len(vocab), "vocab_size": vocab.vocab_size}
    return row | _proof(generator, text[cut:], args.positions)


def _proof(generator: Generator, text: str, positions: int) -> dict[str, Any]:
    kept, hidden = _states(generator, text, positions)
    folder, cold = generator.folder, generator._cold
    head = ColdHead(folder)
    sketch = Sketch(folder, cold, generator._decoder.after_head)
    reads = ColdReads()
    certificate = ColdCertificate(sketch, head, folder.vocab, reads)
    cold_maxima, widths = [], []
    for start in range(0, len(hidden), SIZES[-1]):
        states = hidden[start : start + SIZES[-1]]
        largest = head.maxima(states)[0]
        cold_maxima.append(largest)
        widths.append(sketch.product(states).upper.max(axis=1) - largest)
        certificate.challengers(states, kept[start : start + SIZES[-1]])
    gaps, width = kept - np.concatenate(cold_maxima), np.concatenate(widths)
    return {
        "positions": len(gaps),
        "compact_is_true": float((gaps > 0).mean()),
        "proven": float((gaps > width).mean()),
        "settled": reads.certified / len(gaps),
        "rows_per_position": reads.rows / len(gaps),
        "gap_quantiles": np.quantile(gaps, _QUANTILES).tolist(),
        "width_quantiles": np.quantile(width, _QUANTILES).tolist(),
        "int4": _int4(cold.head(cold.cold_ids), hidden.astype(np.float64), kept, kept - gaps),
    }


def _states(generator: Generator, text: str, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest kept logit (N,) and the hidden state (N, H) of positions of a text, read in windows."""
    (ids,) = generator.codec.encode([text])
    kept, hidden = [], []
    for start in range(0, min(positions, ids.size - _WINDOW), _WINDOW):
        slotted = generator.folder.vocab.with_slots(ids[None, start : start + _WINDOW])
        rows = generator._cold.embedding(slotted.cold_ids)
        decoder = generator._decoder
        step = decoder.step(decoder.empty_cache(1), slotted.ids, rows, keep=0)
        kept.append(step.logits[0].max(axis=1))
        hidden.append(np.array(step.hidden[0]))
    return np.concatenate(kept), np.concatenate(hidden)


def _int4(rows: np.ndarray, hidden: np.ndarray, kept: np.ndarray, cold: np.ndarray) -> dict[str, float]:
    """What 4 bits in blocks of 32 would prove, with exact arithmetic and hidden states."""
    norms = np.linalg.norm(hidden, axis=1)
    upper = np.full(len(hidden), -np.inf)
    for start in range(0, len(rows), 8192):
        blocks = rows[start : start + 8192].astype(np.float64).reshape(-1, rows.shape[1] // 32, 32)
        scales = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-30) / 7
        sketched = (np.rint(blocks / scales) * scales).reshape(len(blocks), -1)
        residuals = np.linalg.norm(blocks.reshape(len(blocks), -1) - sketched, axis=1)
        np.maximum(upper, (hidden @ sketched.T + norms[:, None] * residuals).max(axis=1), out=upper)
    return {"proven": float((upper < kept).mean()), "median_width": float(np.median(upper - cold))}


def decode(args: argparse.Namespace, name: str, work: Path) -> dict[str, Any]:
    """Measure a model's decoding and products; returns a row."""
    case = make_case(args, name, None, work)
    trimmed = case.folders["trimmed"]
    samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in DECODING}
    neighbours = harness.Neighbours()
    with case.start("trimmed") as worker:
        for number in range(-1, args.steps):
            for variant in list(DECODING)[:: 1 if number % 2 == 0 else -1]:
                request = {**case.request(max(number, 0)), **DECODING[variant]}
                found = worker.ask(json.dumps(request))
                if number >= 0:
                    samples[variant].append(found)
    token_ms = {v: [s["ms"] / max(s["tokens"] - 1, 1) for s in samples[v]] for v in DECODING}
    ids = [[sample["ids"] for sample in samples[variant]] for variant in DECODING if variant != "compact"]
    parts = harness.fresh_process(
        ["-m", "bench.decode_parts", str(case.folders["full"] / "model.onnx"), str(work / "parts")]
    )
    common = ["-m", "bench.certificate", "--worker", str(trimmed), "--head", parts["head"]]
    common += ["--threads", str(args.threads)]
    products = {
        kind: harness.fresh_process([*common, *flags])
        for kind, flags in (("warm", []), ("dropped", ["--drop"]))
    }
    manifest = json.loads((trimmed / "trimserve.json").read_text("utf-8"))
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return {
        "model": name,
        "kept": manifest["kept"],
        "vocab_size": manifest["vocab_size"],
        "threads": args.threads,
        "tokens": args.tokens,
        "token_ms": {v: asdict(harness.spread(token_ms[v])) for v in DECODING},
        "token_ms_samples": token_ms,
        "ratio": {
            suffix or "blocks": asdict(
                harness.ratio(token_ms[f"certified{suffix}"], token_ms[f"plain{suffix}"])
            )
            for suffix in ("", ", block 1")
        },
        "same_ids": all(other == ids[0] for other in ids),
        "reads": {v: _reads(samples[v]) for v in DECODING if v != "compact"},
        "products_ms": products,
        "sketch": manifest["sketch"],
        "cold_row_bytes": sizes[COLD_NAME],
        "folder_bytes": sum(sizes.values()),
        "folder_bytes_without": sum(size for name, size in sizes.items() if name not in SKETCH_FILES),
        "others_cpu_share": neighbours.share(),
    }


def _reads(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    steps, certified, rows, nbytes = (
        sum(sample["cold_reads"][key] for sample in samples)
        for key in ("steps", "certified", "rows", "bytes")
    )
    tokens = sum(sample["tokens"] for sample in samples)
    return {
        "certified": certified / max(steps, 1),
        "rows_per_token": rows / tokens,
        "bytes_per_token": nbytes / tokens,
    }


def products(folder: Path, head: Path, threads: int, *, drop: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of the products in this process: kind -> number of hidden states -> median."""
    model = load(folder, threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folder} is no generator")
    cold_head = ColdHead(model.folder, threads=threads)
    sketch = Sketch(model.folder, model._cold, model._decoder.after_head, threads=threads)
    hidden = np.random.default_rng(0).standard_normal((SIZES[-1], model._decoder.hidden_size), np.float32)
    hidden = hidden.astype(model._decoder.dtype)
    files = [folder / name for name in (COLD_NAME, SKETCH_DATA_NAME)]
    kinds: dict[str, Callable[[np.ndarray], Any]] = {"cold": cold_head.maxima, "sketch": sketch.product}
    if not drop:
        session = open_session(head, threads=threads)
        kinds["full"] = lambda states: session.run(None, {"hidden_states": states[None]})
    found: dict[str, dict[str, list[float]]] = {kind: {str(size): [] for size in SIZES} for kind in kinds}
    for repeat in range(_REPEATS):
        for size in SIZES:
            for kind, product in kinds.items():
                if drop:
                    drop_pages(files)
                start = time.perf_counter()
                product(hidden[:size])
                if repeat or drop:
                    found[kind][str(size)].append(1e3 * (time.perf_counter() - start))
    return {kind: {size: float(np.median(times)) for size, times in by.items()} for kind, by in found.items()}


def drop_pages(files: Sequence[Path]) -> None:
    """Take files out of this process's page tables and of the system's page cache (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = {str(path.resolve()) for path in files}
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.+)", line)
        if found and found[3] in names:
            start, end = int(found[1], 16), int(found[2], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def proof_summary(row: dict[str, Any]) -> str:
    """One corpus for people."""
    middle = len(_QUANTILES) // 2
    gap, width = row["gap_quantiles"][middle], row["width_quantiles"][middle]
    return (
        f"{row['corpus']}: {row['positions']:,} positions, K = {row['kept']:,}; the compact argmax is true "
        f"at {row['compact_is_true']:.2%}, proven {row['proven']:.2%}, settled with rows "
        f"{row['settled']:.2%}; median gap {gap:.2f}, width {width:.2f}; int4 proves "
        f"{row['int4']['proven']:.1%} with a width of {row['int4']['median_width']:.2f}"
    )


def summary(row: dict[str, Any]) -> str:
    """One model for people."""
    lines = [(name, f"{value['median']:.2f}") for name, value in row["token_ms"].items()]
    warm, dropped = row["products_ms"]["warm"], row["products_ms"]["dropped"]
    measured = [(kind, warm[kind]) for kind in warm] + [(f"{k}, dropped", dropped[k]) for k in dropped]
    product_lines = [(name, *(f"{by[str(size)]:.1f}" for size in SIZES)) for name, by in measured]
    reads = row["reads"]
    share = reads["certified"]["bytes_per_token"] / reads["plain"]["bytes_per_token"]
    return "\n".join(
        [
            f"{row['model']}: K = {row['kept']:,} of {row['vocab_size']:,}, same ids: {row['same_ids']}",
            table(("", "ms a token"), lines),
            table(("product, ms for states", *map(str, SIZES)), product_lines),
            f"settled {reads['certified']['certified']:.2%}, cold bytes a token {share:.2f} of the plain "
            f"check's; folder {human_bytes(row['folder_bytes'])}, without sketch "
            f"{human_bytes(row['folder_bytes_without'])}",
        ]
    )


def main() -> int:
    """Measure, save a row each, print a table each."""
    parser = harness.parser(__doc__ or "", rounds=1)
    parser.add_argument("--corpus", nargs="*", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--model", nargs="*", choices=(*SHAPES, REAL_MODEL), default=list(MODELS))
    parser.add_argument("--coverage", type=float, default=0.99)
    parser.add_argument(
        "--stand", type=float, default=0.99, help="share of drafts to stand, of random models"
    )
    parser.add_argument("--layers", type=int, default=2, help="of random models (default 2)")
    parser.add_argument("--positions", type=int, default=8192, help="held-back positions (default 8192)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="answers a variant (default 10)")
    parser.add_argument("--work", type=Path, help="folder for exports (default: temporary)")
    parser.add_argument("--worker", type=Path, help="measure the products of a folder in this process")
    parser.add_argument("--head", type=Path)
    parser.add_argument("--drop", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(products(args.worker, args.head, args.threads, drop=args.drop)))
        return 0
    rows = []
    jobs: list[tuple[str, Any, Any, str]]
    jobs = [("certificate_proof", prove, proof_summary, corpus) for corpus in args.corpus]
    jobs += [("certificate", decode, summary, name) for name in args.model]
    for kind, measure, describe, subject in jobs:
        work = Path(tempfile.mkdtemp(prefix="trimserve-certificate-", dir=args.work))
        try:
            row = measure(args, subject, work)
            harness.save_row(kind, row, quick=args.quick)
            print(describe(row), file=sys.stderr)
            rows.append(harness.without_samples(row))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
