"""The tables of docs/matrix.md, from the newest rows of bench/matrix.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import harness
from bench.tables import common as tables

_QUANTISATIONS = ("fp32", "int4", "int8")
_LAYOUTS = ("runtime", "tokenizer", "graph")
_TITLES = {
    "optimum": "`--exporter optimum`",
    "genai": "`--exporter genai`",
    "transformers": "`--exporter transformers`",
    "folder": "Folders of other tools' graphs, with the numbers they have",
}

_SHOWN = {"not available": "no"}


class _Notes:
    """Reasons with their numbers, in the order in which they came."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, outcome: str) -> str:
        """What a cell shows: ok, or refused or not available with the number of the reason."""
        kind, _, reason = outcome.partition(": ")
        if not reason:
            return kind
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"{_SHOWN.get(kind, kind)} ({self.reasons.index(reason) + 1})"


def matrix_table() -> str:
    """A table for each exporter, and the reasons of all of them."""
    notes = _Notes()
    rows = {row["exporter"]: row for row in harness.newest_rows("matrix", "exporter")}
    parts = [_table(name, rows[name], notes) for name in _TITLES if name in rows]
    reasons = "".join(f"{number}. {reason}\n" for number, reason in enumerate(notes.reasons, 1))
    return "\n".join(parts) + f"\nReasons:\n\n{reasons}"


def _table(name: str, row: Mapping[str, Any], notes: _Notes) -> str:
    outcomes: dict[str, str] = row["outcomes"]
    families = list(dict.fromkeys(cell.partition(f"-{name}-")[0] for cell in outcomes))
    formats: Sequence[str] = [""] if name == "folder" else _QUANTISATIONS
    header = ["", *(f"{number} {layout}".strip() for number in formats for layout in _LAYOUTS)]
    lines = []
    for family in families:
        cells = [
            "-".join(filter(None, (family, name, number, layout)))
            for number in formats
            for layout in _LAYOUTS
        ]
        lines.append([family, *(notes.mark(outcomes[cell]) for cell in cells)])
    made = ", ".join(f"{key} {value}" for key, value in row["versions"].items() if key != "name" and value)
    title = f"{_TITLES[name]} ({made})" if made else _TITLES[name]
    return f"{title}:\n\n{tables.markdown(header, lines)}"
