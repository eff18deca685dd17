"""A small table that reads well in a terminal and in a notebook."""

import html
import textwrap


class Table:
    """Rows of named columns.

    >>> print(Table([{"target": "query", "layers": 4}, {"target": "value", "layers": 4}], caption="LoRA"))
    LoRA
    target  layers
    query   4
    value   4

    All rows have the same keys; in a terminal, a column wraps at `width` characters.
    """

    def __init__(self, rows: list[dict], *, caption: str = "", width: int = 48):
        self.rows, self.caption, self._width = rows, caption, width

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def _cells(self) -> list[list[str]]:
        return [list(self.rows[0]) if self.rows else [], *([_text(v) for v in row.values()] for row in self.rows)]

    def __str__(self) -> str:
        grid = [[_wrapped(cell, self._width) for cell in row] for row in self._cells()]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)]
        lines = [self.caption] if self.caption else []
        for row in grid:
            height = max(map(len, row), default=0)
            for cells in zip(*(cell + [""] * (height - len(cell)) for cell in row), strict=True):
                lines.append("  ".join(map(str.ljust, cells, widths)).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            inner = "".join(f"<{tag} {_STYLE}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        head, *body = self._cells()
        caption = (
            f'<caption style="text-align:left;white-space:nowrap">{html.escape(self.caption)}</caption>'
            if self.caption
            else ""
        )
        return f"<table>{caption}{line('th', head)}{''.join(line('td', cells) for cells in body)}</table>"


_STYLE = 'style="text-align:left;vertical-align:top;white-space:pre-wrap;max-width:32em"'


class ShowsAsTable:
    """What has a method `table` shows as that table."""

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _text(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] or [""]
