"""The certificate of exact mode: what it proves, what it reads, and what that saves.

Two kinds of rows, each in a file of its own:

- ``certificate_proof``: see `bench.certificate.proof`.
- ``certificate``: a model's decoding with and without the certificate, in turn, in blocks and token by token;
  the same with the cold files dropped from the page cache before every check; and the cold product, the
  sketches' and the full head's alone, by the number of hidden states, with cached pages and without.

A checkpoint in bfloat16 has cold rows of two bytes a number, one in float32 of four, of which the sketch
saves more: ``--float32`` stores the trained model's rows so.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.certificate.proof import CORPORA, proof_summary, prove
from bench.certificate.worker import SIZES
from bench.decode.case import REAL_MODEL, Case, make_case
from bench.decode.models import SHAPES
from trimserve.console import human_bytes, table
from trimserve.files.tensors import read_header
from trimserve.folder.names import COLD_NAME, MANIFEST_NAME, SKETCH_FILES

MODELS = (REAL_MODEL, "gemma-3-270m")
# Variants of decoding: what is asked of the generator.
DECODING: dict[str, dict[str, Any]] = {
    "compact": {"mode": "compact"},
    "plain": {"mode": "exact", "certify": False},
    "certified": {"mode": "exact", "certify": True},
    "plain, block 1": {"mode": "exact", "certify": False, "max_block": 1},
    "certified, block 1": {"mode": "exact", "certify": True, "max_block": 1},
}
# Those that are also measured with the cold files dropped before every check.
DROPPED = ("plain", "certified")
# Of a row ``certificate``, what the figure of these two shows: a row of a file of its own.
_PAGES = ("model", "cold_dtype", "threads", "tokens", "token_ms", "dropped_token_ms", "others_cpu_share")


def decode(args: argparse.Namespace, name: str, work: Path) -> dict[str, Any]:
    """Measure a model's decoding and products; returns a row."""
    float32 = args.float32 and name == REAL_MODEL
    case = make_case(args, name, None, _made(args, name) or work, float32=float32)
    trimmed = case.folders["trimmed"]
    neighbours = harness.Neighbours()
    samples, dropped = _answers(case, args.steps, work)
    token_ms = {variant: _token_ms(found) for variant, found in samples.items()}
    dropped_ms = {variant: _token_ms(found) for variant, found in dropped.items()}
    exact = [samples[variant] for variant in DECODING if variant != "compact"] + list(dropped.values())
    times = _products(case, work)
    warm = times["warm"]
    manifest = json.loads((trimmed / MANIFEST_NAME).read_text("utf-8"))
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return {
        "model": name,
        "kept": manifest["kept"],
        "vocab_size": manifest["vocab_size"],
        "cold_dtype": read_header(trimmed / COLD_NAME)[0]["embedding"].dtype,
        "threads": args.threads,
        "tokens": args.tokens,
        "token_ms": {variant: asdict(harness.spread(found)) for variant, found in token_ms.items()},
        "token_ms_samples": token_ms,
        "dropped_token_ms": {variant: asdict(harness.spread(found)) for variant, found in dropped_ms.items()},
        "dropped_token_ms_samples": dropped_ms,
        "ratio": {
            "blocks": _ratio(token_ms["certified"], token_ms["plain"]),
            ", block 1": _ratio(token_ms["certified, block 1"], token_ms["plain, block 1"]),
            "dropped": _ratio(dropped_ms["certified"], dropped_ms["plain"]),
            "check_to_full_head": _ratio(warm["sketch"]["1"], warm["full"]["1"]),
        },
        "same_ids": all(
            [sample["ids"] for sample in found] == [sample["ids"] for sample in exact[0]] for found in exact
        ),
        "reads": {variant: _reads(samples[variant]) for variant in DECODING if variant != "compact"},
        "products_ms": {
            pages: {
                kind: {size: float(np.median(found)) for size, found in by_size.items()}
                for kind, by_size in kinds.items()
            }
            for pages, kinds in times.items()
        },
        "sketch": manifest["sketch"],
        "cold_row_bytes": sizes[COLD_NAME],
        "folder_bytes": sum(sizes.values()),
        "folder_bytes_without": sum(size for name, size in sizes.items() if name not in SKETCH_FILES),
        "others_cpu_share": neighbours.share(),
    }


def _made(args: argparse.Namespace, name: str) -> Path | None:
    """The folder where `bench.decode --prepare --work` left this model, if it did."""
    stand = args.coverage if name == REAL_MODEL else args.stand
    folder: Path | None = args.made and args.made / f"{name}-{stand}"
    return folder if folder and folder.exists() and not args.float32 else None


_Answers = dict[str, list[dict[str, Any]]]


def _answers(case: Case, steps: int, work: Path) -> tuple[_Answers, _Answers]:
    """The answers of each variant, with cached pages and with the files dropped before each check.

    These are a copy: pages that another process has mapped stay in the page cache.
    """
    samples: _Answers = {variant: [] for variant in DECODING}
    dropped: _Answers = {variant: [] for variant in DROPPED}
    copy = shutil.copytree(case.folders["trimmed"], work / "dropped", dirs_exist_ok=True)
    words = ["-m", "bench.certificate.worker", str(copy), "--threads", str(case.threads)]
    with case.start("trimmed") as worker, harness.Worker(words) as dropper:
        for number in range(-1, steps):
            asked = [
                *((variant, worker, samples) for variant in DECODING),
                *((variant, dropper, dropped) for variant in DROPPED),
            ]
            for variant, process, kept in asked[:: 1 if number % 2 == 0 else -1]:
                request = {**case.request(max(number, 0)), **DECODING[variant]}
                found = process.ask(json.dumps(request))
                if number >= 0:
                    kept[variant].append(found)
    return samples, dropped


def _token_ms(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [answer["ms"] / max(answer["tokens"] - 1, 1) for answer in answers]


def _ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    return asdict(harness.ratio(numerator, denominator))


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


def _products(case: Case, work: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Times of the products with and without cached pages, each in a process of its own."""
    trimmed = case.folders["trimmed"].resolve()
    full = str(case.folders["full"] / "model.onnx")
    parts = harness.fresh_process(["-m", "bench.decode.parts", full, str(work / "parts")])
    coarse = _with_four_bits(trimmed, work / "coarse")
    words = ["-m", "bench.certificate.worker", str(trimmed), "--threads", str(case.threads)]
    words += ["--products", parts["head"], "--coarse", str(coarse)]
    return {
        pages: harness.fresh_process([*words, *flags])
        for pages, flags in (("warm", []), ("dropped", ["--drop"]))
    }


def _with_four_bits(trimmed: Path, folder: Path) -> Path:
    """The same folder with a sketch of 4 bits; what that leaves alone is hard-linked where possible."""
    from trimserve_export.cold_head.sketch import add_sketch

    folder.mkdir()
    for path in trimmed.iterdir():
        if path.name in (MANIFEST_NAME, *SKETCH_FILES):
            shutil.copyfile(path, folder / path.name)
            continue
        try:
            os.link(path, folder / path.name)
        except OSError:  # another file system
            shutil.copyfile(path, folder / path.name)
    add_sketch(folder, 4)
    return folder


def summary(row: dict[str, Any]) -> str:
    """One model for people."""
    lines = [(name, f"{value['median']:.2f}") for name, value in row["token_ms"].items()]
    dropped_ms = row["dropped_token_ms"].items()
    lines += [(f"{name}, files dropped", f"{value['median']:.2f}") for name, value in dropped_ms]
    warm, dropped = row["products_ms"]["warm"], row["products_ms"]["dropped"]
    measured = [(kind, warm[kind]) for kind in warm] + [(f"{k}, dropped", dropped[k]) for k in dropped]
    product_lines = [(name, *(f"{by[str(size)]:.1f}" for size in SIZES)) for name, by in measured]
    reads = row["reads"]
    share = reads["certified"]["bytes_per_token"] / reads["plain"]["bytes_per_token"]
    return "\n".join(
        [
            f"{row['model']}, {row['cold_dtype']}: K = {row['kept']:,} of {row['vocab_size']:,}, same ids: "
            f"{row['same_ids']}",
            table(("", "ms a token"), lines),
            table(("product, ms for states", *map(str, SIZES)), product_lines),
            f"settled {reads['certified']['certified']:.2%}, cold bytes a token {share:.2f} of the plain "
            f"check's; folder {human_bytes(row['folder_bytes'])}, without sketch "
            f"{human_bytes(row['folder_bytes_without'])}",
        ]
    )


def main() -> int:
    """Measure, save a row each, print a table each."""
    parser = harness.parser(__doc__ or "", rounds=1, work="exports")
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
    parser.add_argument("--float32", action="store_true", help="store the trained model's rows in float32")
    parser.add_argument(
        "--made", type=Path, metavar="FOLDER", help="where `bench.decode --prepare --work` left its models"
    )
    args = parser.parse_args()
    if args.quick:
        args.corpus, args.model, args.positions, args.steps = args.corpus[:1], ["tiny"], 512, 2
    rows = []
    jobs: list[tuple[str, Any, Any, str]]
    jobs = [("certificate_proof", prove, proof_summary, corpus) for corpus in args.corpus]
    jobs += [("certificate", decode, summary, name) for name in args.model]
    for kind, measure, describe, subject in jobs:
        with harness.scratch_folder("certificate", args.work) as work:
            row = measure(args, subject, work)
        harness.save_row(kind, row, quick=args.quick)
        if kind == "certificate":
            harness.save_row("certificate_pages", {key: row[key] for key in _PAGES}, quick=args.quick)
        print(describe(row), file=sys.stderr)
        rows.append(harness.without_samples(row))
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
