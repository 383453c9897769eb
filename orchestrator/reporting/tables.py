"""What is told about a plan or a report: lines and small tables, as data. A terminal and a notebook
show the same ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """A small table whose first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def holds_words(self, column: int) -> bool:
        """Whether a column is to be read rather than compared."""
        return any(row[column][:1].isalpha() for row in self.rows)

    def of(self, columns: Sequence[int]) -> "Table":
        """The table with these columns alone."""
        chosen = [[row[number] for number in columns] for row in (self.columns, *self.rows)]
        return Table(self.title, chosen[0], chosen[1:])


LEAST_WORDS = 12
"""Characters to which a column of words may shrink."""
TITLES = {"heads": "KV groups", "neurons": "FFN channels"}
"""What people call the coupled groups that files name so."""


def titled(group: str) -> str:
    """A coupled group as people name it; a family's own groups have their own names."""
    return TITLES.get(group, group)


Part = str | Table
"""A line, or a table."""


def narrowed(parts: Iterable[Part], width: int) -> Iterator[Part]:
    """Parts with several tables in place of one whose numbers so many characters have no room for,
    each with the first column and some of the others.
    """
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        needed = [_needed(part, number) for number in range(len(part.columns))]
        chosen, room = [0], width - needed[0]
        for number in range(1, len(needed)):
            if len(chosen) > 1 and room < needed[number]:
                yield part.of(chosen)
                chosen, room = [0], width - needed[0]
            chosen.append(number)
            room -= needed[number]
        yield part.of(chosen)


def _needed(table: Table, column: int) -> int:
    """Characters that a column takes with its edge: of numbers the longest, of words, which go on
    in a next line, a few.
    """
    cells = [table.columns[column], *(row[column] for row in table.rows)]
    longest = max(map(len, cells))
    return 3 + (min(longest, LEAST_WORDS) if column == 0 or table.holds_words(column) else longest)


def text(value: object) -> str:
    """A value as text of a page or a card, or in an attribute's double quotes."""
    return escape(str(value), quote=False).replace('"', "&quot;")


def html_table(
    label: str, style: str, columns: Iterable[str], rows: Iterable[Sequence[object]]
) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    cells = (
        f'<th scope="row">{text(name)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in rest)
        for name, *rest in rows
    )
    body = "</tr><tr>".join(cells)
    return (
        f'<table class="{style}" aria-label="{text(label)}">'
        f"<thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
    )


def html_parts(parts: Iterable[Part]) -> str:
    """Lines and tables for a notebook, which brings the style; all text is escaped."""
    return "".join(_html_of(parts))


def _html_of(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield f"<p>{text(part)}</p>"
        else:
            yield f"<p><strong>{text(part.title)}</strong></p>"
            yield html_table(part.title, "rayprune", part.columns, part.rows)
