"""What a sketch proves and reads on held-back documents: bench.certificate's rows ``certificate_proof``.

The corpus's last twentieth is not profiled. The trained model reads it in windows, and each position is a
step to settle: how far its largest kept logit is above the largest cold one (the gap), how far the bound is
above that (the width), what the certificate settles, and which bytes of the cold files that takes in blocks
of 32 steps. The same folder is measured with a sketch of 8 bits and with one of 4.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.decode.case import REAL_MODEL
from bench.decode.models import float32_copy
from trimserve.decoding.stats import ColdReads
from trimserve.exact.certificate import ColdCertificate
from trimserve.exact.sketch import Sketch
from trimserve.exact.sketch_rows import GROUP_ROWS
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.runtime.cold_head import ColdHead

CORPORA = ("gsm8k-en", "medquad-en")
BLOCK = 32
_HELD_BACK = 0.05
_WINDOW = 256
_QUANTILES = np.linspace(0, 1, 41)


def prove(args: argparse.Namespace, corpus: str, work: Path) -> dict[str, Any]:
    """Measure gap, width and bytes on held-back documents of a corpus; returns a row."""
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export
    from trimserve_export.cold_head.sketch import add_sketch

    model = harness.data_folder() / "models" / REAL_MODEL
    if args.float32:
        model = float32_copy(model, work / "model")
    text = (harness.data_folder() / "corpora" / corpus / "text.txt").read_text("utf-8")
    cut = text.index("\n", int(len(text) * (1 - _HELD_BACK)))
    (work / "profiled.txt").write_text(text[:cut], "utf-8")
    vocab = select(profile([work / "profiled.txt"], model, progress=False), coverage=args.coverage)
    export(model, vocab, work / "trimmed", progress=False)
    generator = _load(work / "trimmed", args.threads)
    kept, hidden = _states(generator, text[cut:], args.positions)
    cold = _cold_maxima(generator, hidden)
    fine = _settle(generator, kept, hidden, cold)
    add_sketch(work / "trimmed", 4)
    coarse = _settle(_load(work / "trimmed", args.threads), kept, hidden, cold)
    gaps = kept - cold
    return {
        "corpus": corpus,
        "coverage": args.coverage,
        "kept": len(vocab),
        "vocab_size": vocab.vocab_size,
        "cold_dtype": generator._cold.spec("head").dtype,
        "positions": len(gaps),
        "block": BLOCK,
        "compact_is_true": float((gaps > 0).mean()),
        "gap_quantiles": np.quantile(gaps, _QUANTILES).tolist(),
        "plain_bytes_per_position": generator._cold.head_nbytes / BLOCK,
        **fine,
        "int4": coarse,
    }


def _load(folder: Path, threads: int) -> Generator:
    generator = load(folder, threads=threads)
    if not isinstance(generator, Generator):
        raise TypeError(f"{folder} is no generator")
    return generator


def _states(generator: Generator, text: str, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest kept logit (N,) and the hidden state (N, H) of positions of a text, read in windows."""
    (ids,) = generator.codec.encode([text])
    kept, hidden = [], []
    for start in range(0, min(positions, ids.size - _WINDOW), _WINDOW):
        slotted = generator.folder.vocab.with_slots(ids[None, start : start + _WINDOW])
        rows = generator._cold.embeddings(slotted.cold_ids)
        decoder = generator._decoder
        step = decoder.step(decoder.empty_cache(1), slotted.ids, rows, keep=0)
        kept.append(step.logits[0].max(axis=1))
        hidden.append(np.array(step.hidden[0]))
    return np.concatenate(kept), np.concatenate(hidden)


def _cold_maxima(generator: Generator, hidden: np.ndarray) -> np.ndarray:
    head = ColdHead(generator.folder)
    starts = range(0, len(hidden), BLOCK)
    return np.concatenate([head.maxima(hidden[start : start + BLOCK])[0] for start in starts])


def _settle(generator: Generator, kept: np.ndarray, hidden: np.ndarray, cold: np.ndarray) -> dict[str, Any]:
    """What a folder's sketch proves of these positions, and what its certificate reads to settle more."""
    folder = generator.folder
    nbytes = generator._cold.head_nbytes
    reads = ColdReads(full_bytes=nbytes, row_bytes=nbytes // folder.vocab.head.cold_ids.size)
    sketch = Sketch(folder, generator._cold, generator._decoder.after_head)
    certificate = ColdCertificate(sketch, ColdHead(folder), folder.vocab.head, reads)
    certificate._greedy.asks = lambda: True  # type: ignore[method-assign] # every block, also where few are settled
    widths, open_rows = [], 0
    for start in range(0, len(hidden), BLOCK):
        states, floor = hidden[start : start + BLOCK], kept[start : start + BLOCK]
        upper = sketch.product(states).upper
        widths.append(upper.max(axis=1) - cold[start : start + BLOCK])
        open_rows += GROUP_ROWS * int((upper >= floor[:, None]).sum())
        certificate.challengers(states, floor)
    width, count = np.concatenate(widths), len(kept)
    return {
        "proven": float((kept - cold > width).mean()),
        "settled": reads.certified / count,
        "rows_per_position": reads.rows / count,
        "open_rows_per_position": open_rows / count,
        "bytes_per_position": reads.bytes / count,
        "sketch_bytes": sketch.nbytes,
        "width_quantiles": np.quantile(width, _QUANTILES).tolist(),
        "median_width": float(np.median(width)),
    }


def proof_summary(row: dict[str, Any]) -> str:
    """One corpus for people."""
    gap = row["gap_quantiles"][len(_QUANTILES) // 2]
    lines = [
        f"{row['corpus']}, {row['cold_dtype']}: {row['positions']:,} positions, K = {row['kept']:,}; the "
        f"compact argmax is true at {row['compact_is_true']:.2%}, median gap {gap:.2f}"
    ]
    for name, found in (("int8", row), ("int4", row["int4"])):
        share = found["bytes_per_position"] / row["plain_bytes_per_position"]
        lines.append(
            f"{name}: proven {found['proven']:.2%}, settled with rows {found['settled']:.2%}, "
            f"{found['rows_per_position']:.1f} rows a position, bytes {share:.2f} of the plain check's, "
            f"width {found['median_width']:.2f}; {found['open_rows_per_position']:.0f} rows not proven"
        )
    return "\n".join(lines)
