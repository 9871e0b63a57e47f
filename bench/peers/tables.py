"""The tables of other tools: on the same model, and what cut tokenizers cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import harness, segmentation
from bench.peers import run as peers
from bench.tables.common import markdown, where

_NOTICED = ("tool", "ms a token", "ms to the first", "anonymous", "same ids")


def race_table() -> str:
    """Other tools in fp32 by what their users notice, from bench.peers; docs/benchmarks.md has it all."""
    (row,) = (row for row in harness.newest_rows("peers", "precision") if row["precision"] == "fp32")
    columns = [
        peers.HEADER.index(name)
        for name in ("tool", "ms a token", "ms to the first", "anonymous", "same ids")
    ]
    lines = [tuple(line[column] for column in columns) for line in peers.lines(row)]
    caption = (
        f"{row['model']}, fp32, K = {row['kept']:,} of {row['vocab_size']:,}; {row['tokens']} tokens an "
        f"answer, processes in turn; same ids as the untrimmed model in this runtime. {where(row)}."
    )
    return f"{markdown(_NOTICED, lines)}\n{caption}\n"


def peers_table() -> str:
    """Other tools on the same model, from bench/peers/run.py."""
    rows = harness.newest_rows("peers", "precision")
    text = "".join(
        f"{row['model']}, {row['precision']}, K = {row['kept']:,} of {row['vocab_size']:,}:\n\n"
        f"{markdown(peers.HEADER, peers.lines(row))}\n"
        for row in rows
    )
    reasons = "".join(f"- {name}: {', '.join(why)}\n" for name, why in sorted(_reasons(rows).items()))
    caption = (
        f"{rows[-1]['tokens']} tokens an answer, processes in turn; same ids as the untrimmed model in this "
        f"runtime. {where(rows[-1])}, {rows[-1]['threads']} threads."
    )
    return f"{text}{caption}\n\nWhat could not take part:\n\n{reasons}"


def _reasons(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Why tools did not take part; a reason that only one number format has names it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row["cannot_run"].items():
            everywhere = all(other["cannot_run"].get(name) == reason for other in rows)
            text = reason if everywhere else f"{row['precision']}: {reason}"
            if text not in found.setdefault(name, []):
                found[name].append(text)
    return found


def segmentation_table() -> str:
    """What cut tokenizers cost, from bench/segmentation.py."""
    rows = harness.newest_rows("segmentation", "model")
    lines = [line for row in rows for line in segmentation.lines(row)]
    texts = ", ".join(f"{row['texts']} of {row['corpus']}" for row in rows)
    missing = "".join(
        f" {tool} on {row['model']}: {reason}" for row in rows for tool, reason in row["cannot_run"].items()
    )
    return markdown(segmentation.HEADER, lines) + f"\nHeld-out texts: {texts}.{missing} {where(rows[-1])}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "peers": peers_table,
    "race": race_table,
    "segmentation": segmentation_table,
}
