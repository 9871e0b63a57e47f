"""The project's targets beside the newest rows: the table of docs/benchmarks.md."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench import harness
from bench.decode.tables import decode_rows
from bench.memory import run as memory
from bench.peers import run as peers
from bench.tables.common import interval, markdown, quiet
from trimserve.console import human_bytes

# Anonymous memory that a running trimmed model may take beside its weights.
_MEMORY_ALLOWANCE = 60e6
# The share of drafts that stands in a model's own domain.
_STAND = 0.99


def table() -> str:
    """The project's targets beside the newest rows."""
    lines = [line for row in decode_rows() for line in _decode_targets(row)]
    lines += _peer_targets()
    lines += _memory_targets()
    for row in harness.newest_rows("encoder_grid", "model"):
        saved = row["saved_share"]
        name = row["model"]
        lines.append(
            (f"{name}: removed bytes gone from memory", ">= 85 %", f"{saved:.0%}", _met(saved >= 0.85))
        )
        ratios = sorted(cell["time_ratio"]["value"] for cell in row["cells"])
        middle = ratios[len(ratios) // 2]
        met = _met(middle <= 1.03) if quiet([row]) else "machine was busy"
        lines.append((f"{name}: time to the full model's, median cell", "<= 1.03", f"{middle:.3f}", met))
    return markdown(("target", "wanted", "measured", ""), lines)


def _decode_targets(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    name = f"{row['model']}, {row['quantize'] or 'fp32'}"
    speed = row["speed"]
    # The default, where measured.
    to_compact = speed.get("certified_to_compact", speed["exact_to_compact"])
    to_full = speed.get("certified_to_full", speed["exact_to_full"])
    if row["stand"] < _STAND:
        met = _met(to_full["value"] >= 0.95)
        yield (
            f"{name}, {row['stand']:.0%} of drafts standing: exact to full speed",
            ">= 0.95",
            interval(to_full),
            met,
        )
        return
    compact = speed["compact_to_full"]["value"] / row["ceiling"]
    yield (f"{name}: compact to its ceiling", ">= 0.9", f"{compact:.2f}", _met(compact >= 0.9))
    yield (
        f"{name}: exact to compact speed",
        ">= 0.85",
        interval(to_compact),
        _met(to_compact["value"] >= 0.85),
    )
    if row["model"] == memory.MODEL and row["quantize"] is None:
        yield (f"{name}: exact to full speed", ">= 2.5", interval(to_full), _met(to_full["value"] >= 2.5))
    anonymous = row["memory"]["compact"]["anonymous"]
    allowed = row["moved_bytes"]["trimmed"] + _MEMORY_ALLOWANCE
    sizes = (f"<= {human_bytes(allowed)}", human_bytes(anonymous))
    yield (f"{name}: anonymous memory", *sizes, _met(anonymous <= allowed))


def _peer_targets() -> list[tuple[str, ...]]:
    """Time a token beside onnxruntime-genai's on the untrimmed model in the same number format."""
    lines: list[tuple[str, ...]] = []
    for row in harness.newest_rows("peers", "precision"):
        for name, tool in row["tools"].items():
            if name.startswith("trimserve") and name != peers.UNTRIMMED and peers.GENAI in tool["time_to"]:
                ratio = tool["time_to"][peers.GENAI]
                label = f"{row['model']}, {row['precision']}: {name}, time to genai's on the untrimmed model"
                lines.append((label, "<= 1", interval(ratio), _met(ratio["value"] <= 1)))
    return lines


def _memory_targets() -> list[tuple[str, ...]]:
    """The target of anonymous memory without the tokenizer's, which is the same before trimming and after."""
    if not (harness.RESULTS / "memory.jsonl").exists():
        return []
    lines: list[tuple[str, ...]] = []
    for row in harness.newest_rows("memory", "model", "quantize"):
        found = row["stages"]["compact answer"]["anonymous"] - memory.added(row)["tokenizer"]
        allowed = row["weight_bytes"] + _MEMORY_ALLOWANCE
        name = f"{row['model']}, {row['quantize'] or 'fp32'}: anonymous memory without the tokenizer's"
        lines.append((name, f"<= {human_bytes(allowed)}", human_bytes(found), _met(found <= allowed)))
    return lines


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"
