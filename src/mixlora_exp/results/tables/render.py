"""Renders tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from mixlora_exp.errors import shown
from mixlora_exp.results.tables.parts import Entry, Table

CSV_COLUMNS = (
    "table", "block", "label", "column", "kind", "value", "low", "high", "p", "q", "seeds", "items",
    "text", "mark", "at_chance", "records",
)  # fmt: skip
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`"}
ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def plain(text: str) -> str:
    """A text escaped so that Markdown shows it literally: no HTML, code, link or extra column."""
    escaped = "".join(MARKDOWN.get(letter, letter) for letter in shown(text))
    return escaped.replace("](", "]\\(")


def _pipe(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(plain, cells)) + " |\n"


def _shown(cell: Entry) -> str:
    return cell.show() + seeds(cell)


def seeds(cell: Entry) -> str:
    """The number of seeds of an accuracy as a suffix, or an empty text."""
    return f" (n={cell.seeds})" if cell.kind in ("ours", "versus") and cell.seeds else ""


def markdown(table: Table) -> str:
    """The table as Markdown: headings, one table per block, notes."""
    parts = [f"# Table {table.number}: {table.title}\n"]
    for block in table.blocks:
        lines = [_pipe([*block.stub, *block.columns])]
        right = ["---"] * len(block.stub) + ["---:"] * len(block.columns)
        lines.append(_pipe(right))
        lines += [_pipe([*row.label, *map(_shown, row.cells)]) for row in block.rows]
        parts.append(f"\n## {plain(block.heading)}\n\n" + "".join(lines))
        parts += [f"\n{plain(note)}\n" for note in block.notes]
    if table.notes:
        parts.append("\n## Notes\n\n" + "".join(f"- {note}\n" for note in table.notes))
    return "".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else repr(round(float(value), 6))


def csv_text(table: Table) -> str:
    """The table as CSV: one line per entry that is not a dash."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in table.blocks:
        heading = shown(block.heading)
        for row in block.rows:
            label = shown(" | ".join(part for part in row.label if part))
            for column, cell in zip(block.columns, row.cells, strict=True):
                if cell.kind == "dash":
                    continue
                numbers = [_number(v) for v in (cell.value, cell.low, cell.high, cell.p, cell.q)]
                counts = [str(n) if n else "" for n in (cell.seeds, cell.items)]
                writer.writerow(
                    [table.number, heading, label, column, cell.kind, *numbers, *counts,
                     shown(cell.text), cell.mark, "yes" if cell.grey else "",
                     " ".join(cell.records)]
                )  # fmt: skip
    return stream.getvalue()


def _escape(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in shown(text))


def _latex_cell(cell: Entry) -> str:
    if cell.value is None:
        return _escape(cell.text) or "--"
    sign = "+" if cell.signed else ""
    shown = f"{cell.value:{sign},.{cell.digits}f}"
    if cell.low is not None and cell.high is not None:
        low, high = (f"{v:{sign}.{cell.digits}f}" for v in (cell.low, cell.high))
        shown += f"\\,{{\\scriptsize[{low}, {high}]}}"
    if seeds(cell):
        shown += f"\\,{{\\scriptsize n={cell.seeds}}}"
    marks = {"better": r"$^{\uparrow}$", "worse": r"$^{\downarrow}$", "†": r"$^{\dagger}$"}
    return shown.replace("-", "$-$") + marks.get(cell.mark, "")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\" + "\n"


def latex(table: Table) -> str:
    """The table as LaTeX: one `table` environment per block; needs booktabs and graphicx."""
    parts = []
    for index, block in enumerate(table.blocks, start=1):
        columns = "l" * len(block.stub) + "r" * len(block.columns)
        body = [
            "\\begin{table}[t]\n\\centering\n",
            f"\\caption{{{_escape(table.title)}. {_escape(block.heading)}.}}\n",
            f"\\label{{tab:{table.name}-{index}}}\n",
            "\\resizebox{\\textwidth}{!}{%\n",
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n",
            _latex_row([_escape(name) for name in (*block.stub, *block.columns)]),
            "\\midrule\n",
            *(
                _latex_row([*map(_escape, row.label), *map(_latex_cell, row.cells)])
                for row in block.rows
            ),
            "\\bottomrule\n\\end{tabular}}\n\\end{table}\n",
        ]
        parts.append("".join([*(f"% {shown(note)}\n" for note in block.notes), *body]))
    notes = "".join(f"% {note}\n" for note in table.notes)
    return "% Needs \\usepackage{booktabs,graphicx}\n" + notes + "\n".join(parts)
