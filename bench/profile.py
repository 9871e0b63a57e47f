"""Throughput of `trimserve profile`, beside the loop that people write: `encode_batch` and a Counter.

Both read the same .jsonl file, one item of a real corpus a record, and end with the same counts, which are
compared. The tokenizers are loaded before the clock runs; choosing the encoder on a sample is inside.
`encode alone` is the time of `Tokenizer.encode_batch_fast` without looking at its ids: what no counting
around it can undercut.

`--scaling` measures a command from start to end against the size of the corpus and the number of workers, and
`--memory` the peak memory against the length of a stream. `--check` compares the counts of all corpora and
tokenizers with the loop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trimserve.report import human_bytes, table

DATA = Path(os.environ.get("TRIMSERVE_DATA", harness.ROOT.parent / "shared" / "data"))
TOKENIZERS = ("qwen2", "xlm-roberta", "mbert-cased")
CORPORA = {"medquad": "medquad-en", "law-de": "law-de", "kdconv": "dialogue-zh-kdconv"}
LIMIT = 8_000_000
VARIANTS = ("loop", "encode alone", "profile", "profile without fastokens")
SIZES = (1, 4, 16, 50)
STREAM_MEGABYTES = (32, 128)
MEMORY_TARGET = 500e6
_BATCH = 1000
_LINES = 16
_ROWS = 262_144
# On a busy machine BENCH_CPU_TIME=1 compares CPU seconds of all threads instead of seconds.
clock = time.process_time if os.environ.get("BENCH_CPU_TIME") == "1" else time.perf_counter


def items(corpus: str) -> Iterator[str]:
    """The items of a corpus: blocks between blank lines, or some lines of a block without any."""
    for file in sorted((DATA / "corpora" / corpus).glob("*.txt")):
        if file.name != "SOURCE.txt":
            for block in file.read_text("utf-8").split("\n\n"):
                lines = block.split("\n")
                step = len(lines) if len(block) < 1 << 16 else _LINES
                parts = ("\n".join(lines[start : start + step]) for start in range(0, len(lines), step))
                yield from filter(str.strip, parts)


def write_items(path: Path, corpora: list[str], limit: int) -> int:
    """Write items as records until `limit` bytes; gives the number of bytes of their text."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in (text for corpus in corpora for text in items(corpus)):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= limit:
                break
    return size


def loop(tokenizer: Any, path: Path) -> Counter[int]:  # noqa: ANN401
    """The plain way."""
    counts: Counter[int] = Counter()
    for batch in _batches(path):
        for encoding in tokenizer.encode_batch(batch):
            counts.update(encoding.ids)
    return counts


def _batches(path: Path) -> Iterator[list[str]]:
    batch = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


def _encode_alone(tokenizer: Any, path: Path) -> float:  # noqa: ANN401
    seconds = 0.0
    for batch in _batches(path):
        begin = clock()
        tokenizer.encode_batch_fast(batch)
        seconds += clock() - begin
    return seconds


def _count(tokenizer: Any, content: str, path: Path) -> Any:  # noqa: ANN401
    from trimserve.corpus import Corpus
    from trimserve.counting import How
    from trimserve.counting.engine import CorpusCounter

    counter = CorpusCounter(Corpus([str(path)], "text"), tokenizer, content, _ROWS, How())
    counter.count(lambda _: None)
    block = counter.sums.total
    return block.counts + block.texts * np.bincount(tokenizer.encode("").ids, minlength=_ROWS)


def worker(name: str, files: list[Path], order: int) -> dict[str, Any]:
    """Measure all variants of one tokenizer in this process; seconds by corpus and variant."""
    from trimserve.counting import encoders
    from trimserve.source import load_tokenizer

    file = DATA / "tokenizers" / name / "tokenizer.json"
    tokenizer, content = load_tokenizer(file), file.read_text("utf-8")
    tokenizer.encode_batch_fast(["warm", "up"])
    installed: Callable[..., Any] = encoders.FastEncoder
    loaded: dict[str, Any] = {}

    def kept(content: str) -> Any:  # noqa: ANN401
        if content not in loaded:
            loaded[content] = installed(content)
        return loaded[content]

    def missing(_: str) -> Any:  # noqa: ANN401
        raise ImportError("left out")

    result: dict[str, Any] = {}
    for path in files:
        seconds: dict[str, float] = {}
        for variant in VARIANTS[:: 1 if order % 2 == 0 else -1]:
            setattr(encoders, "FastEncoder", missing if variant.endswith("fastokens") else kept)  # noqa: B010
            if variant == "profile":
                _load_fast(kept, content)
            begin = clock()
            if variant == "loop":
                expected = loop(tokenizer, path)
            elif variant == "encode alone":
                seconds[variant] = _encode_alone(tokenizer, path)
                continue
            else:
                found = _count(tokenizer, content, path)
            seconds[variant] = clock() - begin
        counts = np.zeros(_ROWS, np.int64)
        counts[list(expected)] = list(expected.values())
        if not np.array_equal(counts, found):
            raise AssertionError(f"{name} on {path.name}: the counts differ")
        result[path.stem] = seconds
    return result


def _load_fast(load: Callable[[str], Any], content: str) -> None:
    try:
        load(content)
    except Exception as error:
        print(error, file=sys.stderr)


def measure_throughput(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MB/s of every variant, by tokenizer and corpus."""
    files = [folder / f"{name}.jsonl" for name in CORPORA]
    sizes = {
        path.stem: write_items(path, [CORPORA[path.stem]], LIMIT // (4 if args.quick else 1))
        for path in files
    }
    rounds = 1 if args.quick else args.rounds
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number in range(rounds):
        for name in TOKENIZERS:
            command = [
                "-m",
                "bench.profile",
                "--worker",
                name,
                "--order",
                str(number),
                "--folder",
                str(folder),
            ]
            for corpus, seconds in harness.fresh_process(command).items():
                for variant, value in seconds.items():
                    rate = sizes[corpus] / value / 1e6
                    samples.setdefault(name, {}).setdefault(corpus, {}).setdefault(variant, []).append(rate)
            print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr)
    ratios = {
        name: {
            corpus: {
                variant: asdict(harness.paired_ratio(rates[variant], rates["loop"]))
                for variant in VARIANTS[1:]
            }
            for corpus, rates in corpora.items()
        }
        for name, corpora in samples.items()
    }
    return {"kind": "throughput", "bytes": sizes, "mb_per_s": samples, "ratio": ratios}


def measure_scaling(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole command by tokenizer, workers and megabytes."""
    corpora = sorted(path.name for path in (DATA / "corpora").iterdir() if path.is_dir())
    sizes = {size: folder / f"all{size}.jsonl" for size in (SIZES[:2] if args.quick else SIZES)}
    written = {size: write_items(path, corpora, size * 1_000_000) for size, path in sizes.items()}
    seconds: dict[str, dict[str, dict[int, float]]] = {}
    for name in TOKENIZERS:
        for workers in range(1, (os.cpu_count() or 1) + 1):
            for size, path in sizes.items():
                taken = _command(
                    name, [str(path), "--text-column", "text", "--workers", str(workers)], folder
                )
                seconds.setdefault(name, {}).setdefault(str(workers), {})[written[size]] = taken["seconds"]
                print(f"{name}, {workers} workers, {size} MB: {taken['seconds']:.1f} s", file=sys.stderr)
    return {"kind": "scaling", "seconds": seconds}


def measure_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident bytes of a count of stdin, by tokenizer and megabytes."""
    lengths = (2, 8) if args.quick else STREAM_MEGABYTES
    block = b"".join(text.encode() + b"\n" for text in items("law-de"))[:4_000_000]
    block = block[: block.rfind(b"\n") + 1]
    peaks: dict[str, dict[int, int]] = {}
    for name in TOKENIZERS:
        for megabytes in lengths:
            stream = (block for _ in range(max(1, megabytes * 1_000_000 // len(block))))
            peaks.setdefault(name, {})[megabytes] = _command(name, ["-"], folder, stream)["peak"]
            print(f"{name}, {megabytes} MB: {human_bytes(peaks[name][megabytes])}", file=sys.stderr)
    return {"kind": "memory", "peak_bytes": peaks, "target": MEMORY_TARGET}


_CLI = """
import sys, time
begin = time.perf_counter()
from trimserve.cli.main import main
code = main(sys.argv[1:])
import json, resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - begin, "peak": peak}))
sys.exit(code)
"""


def _command(
    name: str, arguments: list[str], folder: Path, stream: Iterator[bytes] | None = None
) -> dict[str, Any]:
    """Run `trimserve profile` in a fresh process; its seconds, imports included, and peak memory."""
    model = ["-m", str(DATA / "tokenizers" / name), "-o", str(folder / "profile.safetensors")]
    command = [sys.executable, "-c", _CLI, "profile", *arguments, *model]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=harness.ROOT
    ) as process:
        stdin = process.stdin
        for block in stream or ():
            if stdin is not None:
                stdin.write(block)
        output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[3:])} failed")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def check(names: list[str]) -> None:
    """Compare the counts of all corpora with the loop, for each tokenizer.

    Raises:
        AssertionError: they differ.
    """
    from trimserve.profiling import profile
    from trimserve.source import load_tokenizer

    for name in names:
        folder = DATA / "tokenizers" / name
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        for corpus in sorted((DATA / "corpora").iterdir()):
            files = sorted(path for path in corpus.glob("*.txt") if path.name != "SOURCE.txt")
            counted = profile(files, folder, progress=False)
            texts = [file.read_bytes().decode() for file in files]
            expected = Counter(id_ for text in texts for id_ in tokenizer.encode(text).ids)
            counts = np.zeros(counted.vocab_size, np.int64)
            counts[list(expected)] = list(expected.values())
            if not np.array_equal(counts, counted.counts):
                raise AssertionError(f"{name} on {corpus.name}: the counts differ")
            print(f"{name} on {corpus.name}: {counted.tokens:,} tokens, the same counts", file=sys.stderr)


def plot_scaling(row: dict[str, Any], path: Path) -> None:
    """Draw seconds against megabytes, a line for each tokenizer and number of workers."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "trimserve", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for color, (name, by_workers) in zip(("C0", "C1", "C2"), row["seconds"].items(), strict=True):
        for style, (workers, seconds) in zip(("-", "--", ":", "-."), by_workers.items(), strict=False):
            megabytes = [float(size) / 1e6 for size in seconds]
            label = f"{name}, {workers} worker{'s' if workers != '1' else ''}"
            axes.plot(megabytes, list(seconds.values()), style, color=color, marker="o", label=label)
    axes.set(xlabel="corpus, MB", ylabel="seconds, start included", xscale="log", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def throughput_lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: median MB/s of each variant, and the ratios to the loop."""
    lines = []
    for name, corpora in row["mb_per_s"].items():
        for corpus, rates in corpora.items():
            ratio = row["ratio"][name][corpus]
            cells = [f"{harness.spread(rates[variant]).median:.1f}" for variant in VARIANTS]
            shown = [f"{ratio[variant]['value']:.1f} x" for variant in VARIANTS[2:]]
            lines.append((f"{name}, {corpus}", *cells, *shown))
    return lines


HEADER = (
    "MB/s",
    "loop",
    "its encode alone",
    "profile",
    "without fastokens",
    "to the loop",
    "without fastokens",
)


def main() -> int:
    """Measure, save the row, print the table."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument(
        "--scaling", action="store_true", help="cost by size and workers, and docs/scaling.svg"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory by length of a stream")
    parser.add_argument("--check", nargs="*", metavar="TOKENIZER", help="compare the counts of all corpora")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--order", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        files = [args.folder / f"{name}.jsonl" for name in CORPORA]
        print(json.dumps(worker(args.worker, files, args.order)))
        return 0
    if args.check is not None:
        check(args.check or sorted(path.name for path in (DATA / "tokenizers").iterdir() if path.is_dir()))
        return 0
    measure = measure_scaling if args.scaling else measure_memory if args.memory else measure_throughput
    with tempfile.TemporaryDirectory(prefix="trimserve-profile-") as scratch:
        row = measure(Path(scratch), args)
    suffix = "" if row["kind"] == "throughput" else f"_{row['kind']}"
    harness.save_row(f"profile{suffix}", row, quick=args.quick)
    if args.scaling:
        plot_scaling(row, (harness.SCRATCH if args.quick else harness.ROOT / "docs") / "profile-scaling.svg")
    shown = table(HEADER, throughput_lines(row)) if row["kind"] == "throughput" else ""
    harness.report(shown, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
