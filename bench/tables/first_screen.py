"""The table of README.md's first screen: where trimming shows most; all of it is in docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any

from bench import harness
from bench.tables.common import markdown
from trimserve.console import human_bytes

_ENCODER = "multilingual-e5-small"
_LIBRARY, _LOW = "sentence-transformers, torch", "trimmed, low"
_EXACT = "trimserve, exact"
_UNTRIMMED = ", untrimmed"


def table() -> str:
    """Bytes and memory of an encoder, speed and memory of a decoder beside the fastest untrimmed tool."""
    (encoder,) = (row for row in harness.newest_rows("encoder_grid", "model") if row["model"] == _ENCODER)
    (low,) = (row for row in harness.newest_rows("memory_encoders", "model") if row["model"] == _ENCODER)
    resident = {name: found["resident"] for name, found in low["variants"].items()}
    (race,) = (row for row in harness.newest_rows("peers", "precision") if row["precision"] == "fp32")
    name, fastest = fastest_untrimmed(race["tools"])
    ours = race["tools"][_EXACT]
    lines = [
        (
            f"{_ENCODER}'s shape: graph and weights",
            *(human_bytes(encoder["weight_bytes"][side]) for side in ("full", "trimmed")),
        ),
        (
            f"{_ENCODER}'s shape: memory of the process",
            human_bytes(resident[_LIBRARY]),
            f"{human_bytes(resident[f'fp32, {_LOW}'])} (int8: {human_bytes(resident[f'int8, {_LOW}'])})",
        ),
        (
            f"{race['model']}: ms a token",
            *(f"{one['ms']['median']:.2f}" for one in (fastest, ours)),
        ),
        (
            f"{race['model']}: anonymous memory",
            *(human_bytes(one["memory"]["anonymous"]) for one in (fastest, ours)),
        ),
    ]
    caption = (
        f"fp32. The encoder keeps {encoder['kept']:,} of {encoder['vocab_size']:,} rows, and its full side "
        f"is sentence-transformers in torch; resident memory after {low['texts']} texts, ours with "
        f'`memory="low"` ({low["cpu"]}, {low["date"]}). The decoder keeps {race["kept"]:,} of '
        f"{race['vocab_size']:,}, and its full side is the fastest untrimmed tool ({name}); "
        f"{ours['same_ids']:.0%} of its token ids are the full model's ({race['cpu']}, {race['date']}). "
        f"{race['hardware']}."
    )
    return markdown(("", "full", "trimmed"), lines) + f"\n{caption}\n"


def fastest_untrimmed(tools: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The quickest of the tools that run the whole model, ours among them, and its name."""
    whole = {name: one for name, one in tools.items() if name.endswith(_UNTRIMMED)}
    name = min(whole, key=lambda name: whole[name]["ms"]["median"])
    return name.removesuffix(_UNTRIMMED), whole[name]
