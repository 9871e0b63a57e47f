"""What the whole command `trimserve profile` costs: seconds by size and workers, memory by length."""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import harness
from bench.profile.data import TOKENIZERS, all_corpora, items, write_items
from trimserve.console import human_bytes

SIZES = (2, 8, 32, 128)  # megabytes; beyond 57 the corpora begin again
SERIES = {
    "1 worker": ("--workers", "1"),
    "2 workers": ("--workers", "2"),
    "Ray, 1 worker": ("--workers", "1", "--engine", "ray"),
    "Ray, 2 workers": ("--workers", "2", "--engine", "ray"),
}
STREAM_MEGABYTES = (32, 128, 512)
MEMORY_TARGET = 500e6

_CLI = """
import json, resource, sys, time
begin = time.perf_counter()
from trimserve.cli.main import main
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - begin, "peak": peak}))
sys.exit(code)
"""


def profile_command(
    name: str, arguments: Iterable[str], folder: Path, stream: Iterable[bytes] = ()
) -> dict[str, Any]:
    """Run `trimserve profile` in a fresh process; its seconds, imports included, and peak resident bytes.

    Raises:
        RuntimeError: it failed; its stderr was passed on.
    """
    model = [
        "-m",
        str(harness.data_folder() / "tokenizers" / name),
        "-o",
        str(folder / "profile.safetensors"),
    ]
    command = [sys.executable, "-c", _CLI, "profile", *arguments, *model]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=harness.ROOT
    ) as process:
        assert process.stdin is not None
        for block in stream:
            process.stdin.write(block)
        output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[3:])} failed")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure_scaling(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of the whole command by tokenizer, engine with workers, and bytes of text."""
    files = {}
    for megabytes in (1, 2) if args.quick else SIZES:
        path = folder / f"all{megabytes}.jsonl"
        files[str(write_items(path, all_corpora(), megabytes * 1_000_000, repeat=True))] = path
    neighbours = harness.Neighbours()
    samples: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {series: {size: [] for size in files} for series in SERIES} for name in TOKENIZERS
    }
    for number in range(1 if args.quick else args.rounds):
        for name in TOKENIZERS:
            for series, options in list(SERIES.items())[:: 1 if number % 2 == 0 else -1]:
                for size, path in files.items():
                    arguments = [str(path), "--text-column", "text", *options]
                    seconds = profile_command(name, arguments, folder)["seconds"]
                    samples[name][series][size].append(seconds)
                    print(f"{name}, {series}, {human_bytes(int(size))}: {seconds:.1f} s", file=sys.stderr)
    medians = {
        name: {
            series: {size: statistics.median(taken) for size, taken in sizes.items()}
            for series, sizes in by_series.items()
        }
        for name, by_series in samples.items()
    }
    share = neighbours.share()
    return {"kind": "scaling", "seconds": medians, "seconds_samples": samples, "others_cpu_share": share}


def measure_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident bytes of a count of stdin, by tokenizer and megabytes."""
    peaks: dict[str, dict[int, int]] = {}
    for name in TOKENIZERS:
        for megabytes in (2, 8) if args.quick else STREAM_MEGABYTES:
            peak = profile_command(name, ["-"], folder, text_stream(megabytes * 1_000_000))["peak"]
            peaks.setdefault(name, {})[megabytes] = peak
            print(f"{name}, {megabytes} MB: {human_bytes(peak)}", file=sys.stderr)
    return {"kind": "memory", "peak_bytes": peaks, "target": MEMORY_TARGET}


def text_stream(size: int) -> Iterator[bytes]:
    """Items of all corpora, again and again, as text of about so many bytes."""
    for corpus in itertools.cycle(all_corpora()):
        for text in items(corpus):
            block = text.encode() + b"\n"
            yield block
            size -= len(block)
            if size <= 0:
                return
