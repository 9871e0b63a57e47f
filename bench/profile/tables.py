"""The tables of the benchmarks of profiling, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import harness
from bench.profile.worker import VARIANTS
from bench.tables import common as tables
from trimserve.console import human_bytes


def throughput_header(_: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `throughput_lines`."""
    alone, ratio = ("encode alone", "fastokens alone"), ("profile to loop", "without fastokens to loop")
    return ("MB/s", "loop", *alone, "profile", "profile without fastokens", *ratio)


def throughput_lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: median MB/s of each variant, and the ratios to the loop."""
    lines = []
    for name, corpora in row["mb_per_s"].items():
        for corpus, rates in corpora.items():
            ratio = row["ratio"][name][corpus]
            cells = [_median(rates[variant]) for variant in VARIANTS]
            shown = [f"{ratio[variant]['value']:.1f} x" for variant in VARIANTS[3:]]
            lines.append((f"{name}, {corpus}", *cells, *shown))
    return lines


def _median(rates: Sequence[float]) -> str:
    return f"{harness.spread(rates).median:.1f}" if rates else "-"


def throughput_table() -> str:
    """MB/s of counting beside the plain loop, from bench/profile/run.py."""
    row = harness.last_row("profile")
    caption = (
        "Median MB/s of text, tokenizers loaded. Loop: `encode_batch` and a Counter; encode alone: "
        "`encode_batch_fast` without looking at its ids; fastokens alone: the same of fastokens, which knows "
        f"BPE only. {tables.where(row)}."
    )
    return tables.markdown(throughput_header(row), throughput_lines(row)) + f"\n{caption}\n"


def scaling_header(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `scaling_lines`."""
    some = next(iter(next(iter(row["seconds"].values())).values()))
    return ("seconds", *(human_bytes(size) for size in sorted(map(int, some))))


def scaling_lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: seconds of the whole command by tokenizer, engine with workers, and size."""
    return [
        (f"{name}, {series}", *(f"{sizes[size]:.1f}" for size in sorted(sizes, key=int)))
        for name, by_series in row["seconds"].items()
        for series, sizes in by_series.items()
    ]


def scaling_table() -> str:
    """Seconds of the whole command by size and workers, from bench/profile/run.py --scaling."""
    row = harness.last_row("profile_scaling")
    others = row["others_cpu_share"]
    busy = "" if others is None else f" Other processes, Ray's among them, had {others:.0%} of the CPUs."
    caption = (
        "The whole command, start and, for Ray, the start and end of a cluster on this machine included. "
        f"Texts of all corpora, which begin again beyond 57 MB.{busy} {tables.where(row)}."
    )
    return tables.markdown(scaling_header(row), scaling_lines(row)) + f"\n{caption}\n"


def memory_header(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `memory_lines`."""
    return ("peak memory, stream of", *(f"{size} MB" for size in _lengths(row)))


def memory_lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: peak memory by tokenizer and length of the stream."""
    return [
        (name, *(human_bytes(peaks[size]) for size in _lengths(row)))
        for name, peaks in row["peak_bytes"].items()
    ]


def _lengths(row: Mapping[str, Any]) -> list[str]:
    return sorted(next(iter(row["peak_bytes"].values())), key=int)


def memory_table() -> str:
    """Peak memory by length of a stream, from bench/profile/run.py --memory."""
    row = harness.last_row("profile_memory")
    caption = (
        f"Resident, Python and its packages included; texts of all corpora on stdin. {tables.where(row)}."
    )
    return tables.markdown(memory_header(row), memory_lines(row)) + f"\n{caption}\n"


# Kind of row -> the header and the lines of its table.
SHOWN = {
    "throughput": (throughput_header, throughput_lines),
    "scaling": (scaling_header, scaling_lines),
    "memory": (memory_header, memory_lines),
}
TABLES = {"profile": throughput_table, "profile_scaling": scaling_table, "profile_memory": memory_table}
