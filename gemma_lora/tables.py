"""Show results that read well in a terminal and in a notebook: tables, and coloured
tokens.

What a table holds is decided where it is made. This module only knows how to show it.
"""

import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterator

# The marks of a check, and their colours in a notebook. A cell that holds one of them
# and nothing else is shown in its colour.
_MARKS = {"✓": "#188038", "✗": "#d93025", "–": "#5f6368"}

_NUMBER = re.compile(r"-?\d[\d.,]*(e[+-]?\d+)?( ?%| [kMG]i?B)?")

_CELL_STYLE = "vertical-align:top;white-space:pre-wrap;max-width:32em"
_CAPTION_STYLE = "text-align:left;white-space:nowrap;padding:6px 8px"


class Table:
    """Rows of named columns.

    >>> rows = [{"target": "query", "layers": 4}, {"target": "value", "layers": 16}]
    >>> print(Table(rows, caption="LoRA"))
    LoRA
    target  layers
    query        4
    value       16
    >>> Table(rows)["layers"], len(Table(rows))
    ([4, 16], 2)

    A column of numbers is aligned right, any other column left. In a terminal, long
    text wraps. In a notebook, a cell that is ✓, ✗ or – has a colour.

    Args:
        rows: Dicts with the same keys, which are the names of the columns.
        caption: A line above the table.
        width: In a terminal, text wraps after this many characters.
    """

    def __init__(self, rows: list[dict], *, caption: str = "", width: int = 48):
        self.rows = rows
        self.caption = caption
        self._width = width

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def __getitem__(self, index: int | str):
        """Return a row by its number, or a column as a list by its name."""
        if isinstance(index, str):
            if index not in self.columns:
                raise KeyError(f"No column is named {index!r}. There are: {self.columns}")
            return [row[index] for row in self.rows]
        return self.rows[index]

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def to_pandas(self):
        """Return the table as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)

    def _body(self) -> list[list[str]]:
        return [[_text(value) for value in row.values()] for row in self.rows]

    def _is_number(self) -> list[bool]:
        """For each column, whether all its cells are numbers, perhaps with a unit."""
        columns = zip(*self._body(), strict=True)
        return [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def __str__(self) -> str:
        """The table as text: columns two spaces apart, long cells on several lines."""
        justify = [str.rjust if number else str.ljust for number in self._is_number()]
        # A cell is a list of lines from here on.
        grid = [
            [_wrapped(cell, self._width) for cell in row] for row in [self.columns, *self._body()]
        ]
        widths = [
            max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)
        ]
        lines = [self.caption] if self.caption else []
        for row in grid:
            height = max((len(cell) for cell in row), default=0)
            padded = [cell + [""] * (height - len(cell)) for cell in row]
            for texts in zip(*padded, strict=True):
                aligned = [
                    align(text, width)
                    for align, text, width in zip(justify, texts, widths, strict=True)
                ]
                lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table as a notebook shows it. Everything in it is escaped."""
        sides = ["right" if number else "left" for number in self._is_number()]

        def line(tag: str, cells: list[str]) -> str:
            shown = [
                f'<{tag} style="text-align:{side};{_CELL_STYLE}">{_cell_html(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            ]
            return f"<tr>{''.join(shown)}</tr>"

        caption = ""
        if self.caption:
            caption = f'<caption style="{_CAPTION_STYLE}">{html.escape(self.caption)}</caption>'
        body = "".join(line("td", cells) for cells in self._body())
        return f"<table>{caption}{line('th', self.columns)}{body}</table>"


def _text(value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` characters; its own line breaks stay.

    >>> _wrapped("one two\\n\\nthree", 4)
    ['one', 'two', '', 'thre', 'e']
    """
    lines = []
    for line in text.splitlines():
        # `wrap` makes no line at all of an empty one.
        lines.extend(textwrap.wrap(line, width) or [""])
    return lines or [""]


def _cell_html(text: str) -> str:
    if text in _MARKS:
        return f'<b style="color:{_MARKS[text]}">{text}</b>'
    return html.escape(text)


class ShowsAsTable:
    """Base of results that have a method `table`: they are shown as that table."""

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def to_pandas(self):
        """Return the table as a pandas DataFrame."""
        return self.table().to_pandas()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class TokenView:
    """Tokens in colour: what training reads, what it learns, and padding.

    >>> TokenView([[("▁2", 9, "read"), ("▁4", 7, "learned"), ("<pad>", 0, "padding")]])
    1 read, 1 learned, 1 padding
    ▁2 [▁4] ·

    A terminal shows learned tokens in brackets. A notebook shows colours, and a token's
    id under the pointer.

    Args:
        rows: Lists of (token, id, kind), where kind is "read", "learned" or "padding".
    """

    def __init__(self, rows: list[list[tuple[str, int, str]]]):
        self.rows = rows

    def counts(self) -> dict[str, int]:
        """Tokens of each kind, without the kinds that do not occur."""
        counted = Counter(kind for row in self.rows for _, _, kind in row)
        return {kind: counted[kind] for kind in _COLORS if counted[kind]}

    def _captions(self) -> list[str]:
        return [f"{count:,} {kind}" for kind, count in self.counts().items()]

    def __repr__(self) -> str:
        form = {"read": "{}", "learned": "[{}]", "padding": "·"}
        lines = [" ".join(form[kind].format(token) for token, _, kind in row) for row in self.rows]
        return "\n".join([", ".join(self._captions()), *lines])

    def _repr_html_(self) -> str:
        legend = " ".join(
            _box(caption, kind)
            for caption, kind in zip(self._captions(), self.counts(), strict=True)
        )
        lines = []
        for row in self.rows:
            boxes = [
                _box("·" if kind == "padding" else token, kind, title=f"{token} {token_id}")
                for token, token_id, kind in row
            ]
            lines.append(f'<div style="{_LINE_STYLE}">{"".join(boxes)}</div>')
        return f"<p>{legend}</p>{''.join(lines)}"


# Each background has its own text colour, so that a dark theme changes nothing.
_COLORS = {
    "read": "background:#e3e7eb;color:#3c4650",
    "learned": "background:#1a73e8;color:#ffffff",
    "padding": "background:#fbe3c0;color:#7a4b00",
}
_LINE_STYLE = "font-family:monospace;line-height:1.7;margin-bottom:0.6em"
_BOX_STYLE = "padding:1px 4px;margin:1px 2px;border-radius:3px;display:inline-block"


def _box(text: str, kind: str, title: str = "") -> str:
    """One token or one word of the legend, on its colour."""
    style = f"{_COLORS[kind]};{_BOX_STYLE}"
    return f'<span style="{style}" title="{html.escape(title)}">{html.escape(text)}</span>'
