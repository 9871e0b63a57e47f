"""HTML parts of the report: sections, tables, tokens, numbers in words."""

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LONGEST_TOKEN = 32
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
NOTHING = "–"  # noqa: RUF001 - an empty cell


@dataclass(frozen=True, slots=True)
class Row:
    """A table's row: ready HTML; `style` is a CSS class."""

    name: str
    cells: Sequence[str]
    style: str = ""


def safe(text: str) -> str:
    """Escape text, without its control characters."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def section(title: str, lead: str, body: str) -> str:
    """A part of the page: heading, a sentence or two, content (ready HTML)."""
    intro = f'<p class="soft">{safe(lead)}</p>' if lead else ""
    return f"<section><h2>{safe(title)}</h2>{intro}{body}</section>"


def table(header: Sequence[str], rows: Iterable[Row], *, optional: Iterable[int] = ()) -> str:
    """A table of ready HTML; columns in `optional` are left out on phones."""
    hidden = set(optional)
    style = [' class="optional"' if column in hidden else "" for column in range(len(header))]
    head = "".join(f"<th{style[column]}>{name}</th>" for column, name in enumerate(header))
    body = "".join(_row(row, style) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Row, style: Sequence[str]) -> str:
    cells = "".join(f"<td{style[column]}>{cell}</td>" for column, cell in enumerate(row.cells, 1))
    named = f' class="{row.style}"' if row.style else ""
    return f'<tr{named}><th scope="row">{row.name}</th>{cells}</tr>'


def tile(name: str, value: str, note: str) -> str:
    """A number of the heading, what it is and what it is a part of."""
    return f"<div><dt>{safe(name)}</dt><dd>{safe(value)}<span>{safe(note)}</span></dd></div>"


def bar(share: float) -> str:
    """A bar of which a share is filled, 0..1."""
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'


def token(text: str) -> str:
    """A token, all of it to be seen: spaces and control characters as signs, its direction kept inside."""
    shown = text if len(text) <= _LONGEST_TOKEN else text[:_LONGEST_TOKEN] + "…"
    return f"<code><bdi>{''.join(map(_sign, shown))}</bdi></code>"


def _sign(character: str) -> str:
    if character in _VISIBLE:
        return f"<b>{_VISIBLE[character]}</b>"
    if unicodedata.category(character)[0] in "CZ":
        return f"<b>U+{ord(character):04X}</b>"
    return html.escape(character)


def per_thousand(count: float) -> str:
    """How many of 1,000, with two digits.

    Example:
        >>> [per_thousand(count) for count in (0, 0.004, 0.51, 9.83, 571.3)]
        ['0', '< 0.01', '0.51', '9.8', '571']
    """
    if count == 0:
        return "0"
    if count < 0.01:
        return "< 0.01"
    return f"{count:,.0f}" if count >= 100 else f"{count:.2g}"


def times(ratio: float) -> str:
    """The most that something can be faster by.

    Example:
        >>> times(4.789)
        '≤ 4.79 ×'
    """
    return f"≤ {ratio:.2f} ×"  # noqa: RUF001
