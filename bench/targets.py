"""The project's targets beside the newest rows: the table of docs/benchmarks.md."""

from bench import harness, memory
from bench.tables import interval, markdown, quiet
from trimserve.report import human_bytes

# Anonymous memory that a running trimmed model may take beside its weights.
_MEMORY_ALLOWANCE = 60e6


def table() -> str:
    """The project's targets beside the newest rows."""
    lines: list[tuple[str, ...]] = []
    for row in harness.newest_rows("decode", "model", "quantize"):
        name = f"{row['model']}, {row['quantize'] or 'fp32'}"
        speed = row["speed"]
        compact = speed["compact_to_full"]["value"] / row["ceiling"]
        lines.append((f"{name}: compact to its ceiling", ">= 0.9", f"{compact:.2f}", _met(compact >= 0.9)))
        exact = speed.get("certified_to_compact", speed["exact_to_compact"])  # the default, where measured
        met = _met(exact["value"] >= 0.85)
        lines.append((f"{name}: exact to compact speed", ">= 0.85", interval(exact), met))
        anonymous = row["memory"]["compact"]["anonymous"]
        allowed = row["moved_bytes"]["trimmed"] + _MEMORY_ALLOWANCE
        sizes = (f"<= {human_bytes(allowed)}", human_bytes(anonymous))
        lines.append((f"{name}: anonymous memory", *sizes, _met(anonymous <= allowed)))
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
