"""Results that read well in a terminal and in a notebook: a table, and tokens in colour."""

import html
import re
import textwrap
from collections import Counter


class Table:
    """Rows of named columns.

    >>> print(Table([{"target": "query", "layers": 4}, {"target": "value", "layers": 16}], caption="LoRA"))
    LoRA
    target  layers
    query        4
    value       16

    All rows have the same keys. A column of numbers is set to the right; in a terminal, one of text wraps at `width`
    characters.
    """

    def __init__(self, rows: list[dict], *, caption: str = "", width: int = 48):
        self.rows, self.caption, self._width = rows, caption, width

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def _cells(self) -> list[list[str]]:
        return [
            list(self.rows[0]) if self.rows else [],
            *([_text(v) for v in row.values()] for row in self.rows),
        ]

    def _is_number(self) -> list[bool]:
        """For each column, whether all its cells are numbers, perhaps with a unit."""
        columns = zip(*self._cells()[1:], strict=True)
        return [
            all(re.fullmatch(r"-?\d[\d.,]*(e[+-]?\d+)?( ?%| [kMG]i?B)?", cell) for cell in column)
            for column in columns
        ]

    def __str__(self) -> str:
        justify = [str.rjust if number else str.ljust for number in self._is_number()]
        grid = [[_wrapped(cell, self._width) for cell in row] for row in self._cells()]
        widths = [
            max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)
        ]
        lines = [self.caption] if self.caption else []
        for row in grid:
            height = max(map(len, row), default=0)
            for cells in zip(*(cell + [""] * (height - len(cell)) for cell in row), strict=True):
                lines.append(
                    "  ".join(
                        j(cell, w) for j, cell, w in zip(justify, cells, widths, strict=True)
                    ).rstrip()
                )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sides = ["right" if number else "left" for number in self._is_number()]

        def line(tag: str, cells: list[str]) -> str:
            inner = "".join(
                f'<{tag} style="text-align:{side};{_STYLE}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{inner}</tr>"

        head, *body = self._cells()
        caption = (
            f'<caption style="text-align:left;white-space:nowrap;padding:6px 8px">{html.escape(self.caption)}</caption>'
            if self.caption
            else ""
        )
        return f"<table>{caption}{line('th', head)}{''.join(line('td', cells) for cells in body)}</table>"


_STYLE = "vertical-align:top;white-space:pre-wrap;max-width:32em"


class ShowsAsTable:
    """What has a method `table` shows as that table."""

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _text(value) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] or [
        ""
    ]


class TokenView:
    """Rows of (token, id, kind), where kind is "read", "learned" or "padding".

    >>> TokenView([[("▁2", 9, "read"), ("▁4", 7, "learned"), ("<pad>", 0, "padding")]])
    1 read, 1 learned, 1 padding
    ▁2 [▁4] ·

    A terminal shows learned tokens in brackets; a notebook shows colours, and a token's id under the pointer.
    """

    def __init__(self, rows: list[list[tuple[str, int, str]]]):
        self.rows = rows

    def counts(self) -> dict[str, int]:
        """Tokens of each kind."""
        counted = Counter(kind for row in self.rows for _, _, kind in row)
        return {kind: counted[kind] for kind in _COLORS if counted[kind]}

    def _caption(self) -> list[str]:
        return [f"{count:,} {kind}" for kind, count in self.counts().items()]

    def __repr__(self) -> str:
        form = {"read": "{}", "learned": "[{}]", "padding": "·"}
        lines = [" ".join(form[kind].format(token) for token, _, kind in row) for row in self.rows]
        return "\n".join([", ".join(self._caption()), *lines])

    def _repr_html_(self) -> str:
        def box(text: str, kind: str, title: str = "") -> str:
            style = f"{_COLORS[kind]};padding:1px 4px;margin:1px 2px;border-radius:3px;display:inline-block"
            return f'<span style="{style}" title="{html.escape(title)}">{html.escape(text)}</span>'

        legend = " ".join(map(box, self._caption(), self.counts()))
        lines = [
            "".join(box(t if k != "padding" else "·", k, f"{t} {i}") for t, i, k in r)
            for r in self.rows
        ]
        style = 'style="font-family:monospace;line-height:1.7;margin-bottom:0.6em"'
        return f"<p>{legend}</p>" + "".join(f"<div {style}>{line}</div>" for line in lines)


# Each with its own text colour, so that a dark theme changes nothing.
_COLORS = {
    "read": "background:#e3e7eb;color:#3c4650",
    "learned": "background:#1a73e8;color:#ffffff",
    "padding": "background:#fbe3c0;color:#7a4b00",
}
