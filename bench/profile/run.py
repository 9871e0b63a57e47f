"""Throughput of `trimserve profile`, beside the loop that people write: `encode_batch` and a Counter.

Both read the same .jsonl file, one item of a real corpus a record, and end with the same counts, which are
compared. The tokenizers are loaded before the clock runs; choosing the encoder on a sample is inside.
`encode alone` is the time of `Tokenizer.encode_batch_fast` without looking at its ids, and `fastokens alone`
the same of fastokens: what counting everything that they encode cannot undercut.

`--scaling` measures a command from start to end against the size of the corpus and the number of workers, on
this machine and on a Ray cluster of it, and `--memory` the peak memory against the length of a stream.
`--check` compares the counts of all corpora and tokenizers with the loop.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.profile import tables as profile_tables
from bench.profile.commands import measure_memory, measure_scaling
from bench.profile.data import CORPORA, TOKENIZERS, all_corpora, text_files, write_items
from bench.profile.worker import VARIANTS
from trimserve.console import table

LIMIT = 8_000_000


def measure_throughput(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MB/s of every variant, by tokenizer and corpus."""
    files = {name: folder / f"{name}.jsonl" for name in CORPORA}
    limit = LIMIT // (4 if args.quick else 1)
    sizes = {name: write_items(path, [CORPORA[name]], limit) for name, path in files.items()}
    rounds = 1 if args.quick else args.rounds
    rates: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {corpus: {variant: [] for variant in VARIANTS} for corpus in CORPORA} for name in TOKENIZERS
    }
    for number in range(rounds):
        for name in TOKENIZERS:
            command = ["-m", "bench.profile.worker", name, str(number), *map(str, files.values())]
            for corpus, seconds in harness.fresh_process(command).items():
                for variant, taken in seconds.items():
                    rates[name][corpus][variant].append(sizes[corpus] / taken / 1e6)
            print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr)
    ratios = {
        name: {corpus: _ratios(by_variant) for corpus, by_variant in by_corpus.items()}
        for name, by_corpus in rates.items()
    }
    return {"kind": "throughput", "bytes": sizes, "mb_per_s": rates, "ratio": ratios}


def _ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        variant: asdict(harness.paired_ratio(rates[variant], rates["loop"]))
        for variant in VARIANTS[1:]
        if rates[variant]
    }


def check(names: Sequence[str]) -> None:
    """Compare the counts of all corpora with the loop, for each tokenizer.

    Raises:
        AssertionError: they differ.
    """
    from trimserve.profiles.profiling import profile
    from trimserve.text.tokenizer import load_tokenizer

    for name in names:
        folder = harness.data_folder() / "tokenizers" / name
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        for corpus in all_corpora():
            files = text_files(harness.data_folder() / "corpora" / corpus)
            counted = profile(files, folder, progress=False)
            texts = [file.read_bytes().decode() for file in files]
            expected = Counter(id_ for text in texts for id_ in tokenizer.encode(text).ids)
            counts = np.zeros(counted.vocab_size, np.int64)
            counts[list(expected)] = list(expected.values())
            if not np.array_equal(counts, counted.counts):
                raise AssertionError(f"{name} on {corpus}: the counts differ")
            print(f"{name} on {corpus}: {counted.tokens:,} tokens, the same counts", file=sys.stderr)


def main() -> int:
    """Measure, save the row, print the table."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument("--scaling", action="store_true", help="seconds by size and workers")
    parser.add_argument("--memory", action="store_true", help="peak memory by length of a stream")
    parser.add_argument("--check", nargs="*", metavar="TOKENIZER", help="compare the counts of all corpora")
    args = parser.parse_args()
    if args.check is not None:
        check(
            args.check
            or sorted(path.name for path in (harness.data_folder() / "tokenizers").iterdir() if path.is_dir())
        )
        return 0
    measure = measure_scaling if args.scaling else measure_memory if args.memory else measure_throughput
    with tempfile.TemporaryDirectory(prefix="trimserve-profile-") as scratch:
        row = json.loads(json.dumps(measure(Path(scratch), args)))
    name = {"scaling": "profile_scaling", "memory": "profile_memory"}.get(row["kind"], "profile")
    harness.save_row(name, row, quick=args.quick)
    header, lines = profile_tables.SHOWN[row["kind"]]
    harness.report(table(header(row), lines(row)), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
