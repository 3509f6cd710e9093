"""Tables in plain text and in HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from textwrap import wrap

WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A table with a title, and reasons for each of its rows.

    Attributes
    ----------
    title
        What is above it.
    header
        The names of the columns.
    rows
        The cells of each row.
    reasons
        For each row, what is said below it in text, and in a column of its own in HTML.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    reasons: Sequence[Sequence[str]] = ()

    def text(self) -> str:
        """Return the table in plain text, long cells wrapped."""
        return "\n".join([self.title, *self._lines()])

    def html(self) -> str:
        """Return the table in HTML."""

        def line(tag: str, row: Sequence[str]) -> str:
            cells = (escape(cell).replace("\n", "<br>") for cell in row)
            return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

        header, rows = [*self.header], [[*row] for row in self.rows]
        if self.reasons:
            header.append("why, and what to do")
            for row, reasons in zip(rows, self.reasons, strict=True):
                row.append("\n".join(reasons))
        body = "".join(line("td", row) for row in rows)
        return (
            f"<table><caption>{escape(self.title)}</caption>"
            f"<thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
        )

    def _lines(self) -> Iterator[str]:
        gap = "  "
        columns = list(zip(self.header, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        longest_words = [max(map(len, " ".join(column).split())) for column in columns]
        while (total := sum(widths) + len(gap) * (len(widths) - 1)) > WIDTH:
            # Words are only broken where nothing else helps
            spare = [width > word for width, word in zip(widths, longest_words, strict=True)]
            i = max(range(len(widths)), key=lambda i: (spare[i], widths[i]))
            widths[i] -= 1
        rule = "-" * total

        def lines(row: Sequence[str]) -> Iterator[str]:
            columns = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
            for parts in zip_longest(*columns, fillvalue=""):
                line = gap.join(
                    part.ljust(width) for part, width in zip(parts, widths, strict=True)
                )
                yield line.rstrip()

        yield rule
        yield from lines(self.header)
        yield rule
        for row, reasons in zip_longest(self.rows, self.reasons, fillvalue=()):
            yield from lines(row)
            for reason in reasons:
                yield from wrap(
                    reason, WIDTH, initial_indent="  because ", subsequent_indent=" " * 10
                )
