"""Tables of numbers with their spread, as text, Markdown, CSV or LaTeX."""

import csv
import io
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: Characters of a line of text, if the terminal is not wider.
_LEAST_WIDTH = 80
#: Characters of a row label, at least, where there are too many columns for one line.
_LABEL_WIDTH = 21


@dataclass(frozen=True)
class Number:
    """A mean, and its standard deviation if there is one."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Range:
    """An interval."""

    low: float
    high: float


Cell = str | Number | Range | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its name.
        cells: Text, numbers, or None where there is nothing.
        over: Heading that it shares with its neighbours; empty: none.
        is_text: Whether the cells are text, which is left-aligned.
    """

    heading: str
    cells: Sequence[Cell]
    over: str = ""
    is_text: bool = False


#: Columns of equal length; the first one labels the rows.
Table = list[Column]

#: Paragraphs and tables, one below the other.
Document = list[str | Table]


def rendered(document: Document, form: str) -> str:
    """The document as `text`, `markdown` or `latex`, with a line break at its end."""
    table, paragraph = {
        "text": (_text, _wrapped),
        "markdown": (_markdown, _escaped_markdown),
        "latex": (_latex, _escaped_latex),
    }[form]
    blocks = [paragraph(part) if isinstance(part, str) else table(part) for part in document]
    text = blocks[0]
    for (one, other), block in zip(itertools.pairwise(document), blocks[1:], strict=True):
        are_lines = form == "text" and isinstance(one, str) and isinstance(other, str)
        text += ("\n" if are_lines else "\n\n") + block
    return text + "\n"


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """A line of names, and a line for each record; there is at least one, all have these names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _plain(cell: Cell) -> str:
    """A cell as text; numbers have two decimals."""
    match cell:
        case Number(mean, None):
            return f"{mean:z.2f}"
        case Number(mean, sd):
            return f"{mean:z.2f} ± {sd:.2f}"
        case Range(low, high):
            return f"{low:z.2f} to {high:z.2f}"
    return cell or "-"


def _width() -> int:
    return max(_LEAST_WIDTH, shutil.get_terminal_size().columns)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _LEAST_WIDTH, break_long_words=False, break_on_hyphens=False)


def _text(table: Table) -> str:
    """Aligned columns; columns that do not fit the terminal follow in further blocks."""
    labels, *columns = table
    laid = [_laid_out(column) for column in columns]
    room = _width() - sum(column.width for column in laid)
    names = [_folded(_plain(cell), max(room, _LABEL_WIDTH), "  ") for cell in labels.cells]
    width = max(len(line) for lines in [[labels.heading], *names] for line in lines)
    blocks = _side_by_side(laid, _width() - width)
    return "\n\n".join(_block(labels.heading, names, width, block) for block in blocks)


@dataclass(frozen=True)
class _LaidOut:
    """A column as lines of equal width, with the space on its left."""

    over: str
    head: list[str]
    body: list[str]

    @property
    def width(self) -> int:
        return len(self.body[0])


def _laid_out(column: Column) -> _LaidOut:
    body = [_plain(cell) for cell in column.cells]
    if any(isinstance(cell, Number) and cell.sd is not None for cell in column.cells):
        body = _in_line(column.cells)
    head = _folded(column.heading, max(12, *map(len, body)))
    width = max(map(len, [*head, *body, 12 * " " if column.over else ""]))
    sign = "<" if column.is_text else ">"
    lines = [f"  {line:{sign}{width}}" for line in [*head, *body]]
    return _LaidOut(column.over, lines[: len(head)], lines[len(head) :])


def _in_line(cells: Sequence[Cell]) -> list[str]:
    """Numbers with padding behind those without a standard deviation, so that means align."""
    pairs = [_plain(cell).partition(" ± ") for cell in cells]
    width = max(len(spread) for _, _, spread in pairs)
    return [f"{mean}{sign or '   '}{spread:>{width}}" for mean, sign, spread in pairs]


def _folded(text: str, width: int, indent: str = "") -> list[str]:
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return lines or [""]


def _side_by_side(columns: Sequence[_LaidOut], room: int) -> list[list[_LaidOut]]:
    """Divides columns into blocks that fit into `room`, each with one shared heading.

    If all columns fit, they are one block.
    """
    if sum(column.width for column in columns) <= room:
        return [list(columns)]
    blocks: list[list[_LaidOut]] = [[]]
    for column in columns:
        width = sum(other.width for other in blocks[-1])
        belongs = not blocks[-1] or blocks[-1][-1].over in ("", column.over)
        if blocks[-1] and (width + column.width > room or not belongs):
            blocks.append([])
        blocks[-1].append(column)
    return blocks


def _block(heading: str, names: list[list[str]], width: int, columns: Sequence[_LaidOut]) -> str:
    lines = []
    if any(column.over for column in columns):
        runs = itertools.groupby(columns, key=lambda column: column.over)
        over = "".join(f"{name:^{sum(column.width for column in run)}}" for name, run in runs)
        lines.append(" " * width + over)
    depth = max(len(column.head) for column in columns)
    for level in range(depth):
        parts = [_line_of(column.head, level - depth + len(column.head)) for column in columns]
        parts = [part or " " * column.width for part, column in zip(parts, columns, strict=True)]
        lines.append(f"{heading if level == depth - 1 else '':{width}}" + "".join(parts))
    for number, name in enumerate(names):
        cells = "".join(column.body[number] for column in columns)
        lines += [f"{name[0]:{width}}{cells}", *name[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _line_of(lines: Sequence[str], number: int) -> str:
    return lines[number] if number >= 0 else ""


def _markdown(table: Table) -> str:
    headings = [", ".join(filter(None, (c.heading, c.over))) for c in table]
    lines = [headings, ["---" if column.is_text else "---:" for column in table]]
    lines += [
        [_escaped_markdown(_plain(cell)) for cell in row]
        for row in zip(*(column.cells for column in table), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped_markdown(text: str) -> str:
    """Text with Markdown's special characters escaped; underscores inside words are none."""
    return re.sub(r"[\\`*|<~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _latex(table: Table) -> str:
    """A tabular in the style of booktabs."""
    kinds = "".join("l" if column.is_text else "r" for column in table)
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule"]
    if any(column.over for column in table):
        lines += _latex_over(table)
    lines += [_latex_row(column.heading for column in table), r"\midrule"]
    lines += map(_latex_row, zip(*(column.cells for column in table), strict=True))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_over(table: Table) -> Iterator[str]:
    """The row of shared headings, and the rules below them."""
    names, rules, first = [], [], 1
    for over, run in itertools.groupby(table, key=lambda column: column.over):
        last = first + len(list(run)) - 1
        names.append(rf"\multicolumn{{{last - first + 1}}}{{c}}{{{_escaped_latex(over)}}}")
        if over:
            rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
        first = last + 1
    yield rf"{' & '.join(names)} \\"
    yield " ".join(rules)


def _latex_row(cells: Iterable[Cell]) -> str:
    return rf"{' & '.join(map(_latex_cell, cells))} \\"


def _latex_cell(cell: Cell) -> str:
    match cell:
        case Number(mean, None):
            return f"${mean:z.2f}$"
        case Number(mean, sd):
            return rf"${mean:z.2f} \pm {sd:.2f}$"
        case Range(low, high):
            return f"${low:z.2f}$ to ${high:z.2f}$"
        case None:
            return "--"
    return _escaped_latex(cell)


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}  # fmt: skip


def _escaped_latex(text: str) -> str:
    """Text with LaTeX's special characters escaped; two hyphens do not become a dash."""
    return "".join(_LATEX.get(c, c) for c in text).replace("--", "-{}-")
