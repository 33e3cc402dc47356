"""Renders tables as Markdown, CSV and LaTeX: first page, all of it, and data."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from mixlora_exp.errors import shown
from mixlora_exp.results.tables.parts import Block, Entry, Row, Table

CSV_COLUMNS = (
    "table", "block", "label", "column", "kind", "value", "low", "high", "p", "q", "seeds", "items",
    "text", "mark", "at_chance", "records",
)  # fmt: skip
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`"}
ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def plain(text: str) -> str:
    """Return a text escaped so that Markdown shows it literally: no HTML, code, link or extra
    column."""
    escaped = "".join(MARKDOWN.get(letter, letter) for letter in shown(text))
    return escaped.replace("](", "]\\(")


def _pipe(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(plain, cells)) + " |\n"


def _shown(cell: Entry) -> str:
    return cell.show() + seeds(cell)


def seeds(cell: Entry) -> str:
    """Return the number of seeds of an accuracy as a suffix, or an empty text."""
    return f" (n={cell.seeds})" if cell.kind in ("ours", "versus") and cell.seeds else ""


def _block(block: Block, level: str = "##") -> str:
    lines = [_pipe([*block.stub, *block.columns])]
    lines.append(_pipe(["---"] * len(block.stub) + ["---:"] * len(block.columns)))
    lines += [_pipe([*row.label, *map(_shown, row.cells)]) for row in block.rows]
    notes = [f"\n{plain(note)}\n" for note in block.notes]
    return "".join([f"\n{level} {plain(block.heading)}\n\n", *lines, *notes])


def _notes(notes: Sequence[str]) -> str:
    return "\n## Notes\n\n" + "".join(f"- {note}\n" for note in notes) if notes else ""


LEGEND = (
    "In brackets 95 % intervals over items and, where there are several, over seeds. ° not above "
    "the last line: chance, and the most frequent answer of training. Above chance: the average "
    "over the tasks on which more than half of all trained settings under these conditions are, "
    "whatever table shows them, and so is the difference in the last column. Better or worse: "
    "several seeds, and p at most 0.05 after correction for the number of comparisons."
)


def rows_not_run(block: Block) -> int:
    """Return the number of our lines in a block of the paper of which nothing was run."""
    return 0 if block.run else sum(row.label[-1] == "ours" for row in block.rows)


def not_run(table: Table) -> list[str]:
    """Return a sentence on each block of the paper of which nothing was run."""
    return [
        f"{plain(block.heading)}: 0 of {rows} rows run."
        for block in table.blocks
        if (rows := rows_not_run(block))
    ]


def markdown(table: Table) -> str:
    """Return the table's first page as Markdown: all of it, or what is to be read first."""
    title = f"# Table {table.number}: {table.title}\n"
    if not table.summary:
        return title + "".join(map(_block, table.blocks)) + _notes(table.notes)
    left_out = "".join(f"{line} " for line in not_run(table))
    intro = f"\n{left_out}Every line and interval: [details]({table.name}-details.md).\n"
    accuracies = any(cell.kind in ("versus", "ours") and cell.items for cell in table.cells())
    legend = table.legend or (LEGEND if accuracies else table.notes[0])
    return title + intro + "".join(map(_block, table.summary)) + f"\n{legend}\n"


def details(table: Table) -> str:
    """Return everything in the table as Markdown: headings, one table per block, notes."""
    title = f"# Table {table.number} in detail: {table.title}\n"
    return title + "".join(map(_block, table.blocks)) + _notes(table.notes)


def _number(value: float | None) -> str:
    return "" if value is None else repr(round(float(value), 6))


def csv_text(table: Table) -> str:
    """Return the table as CSV: one line per entry that is not a dash."""
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
                     shown(cell.text), cell.mark, "yes" if cell.at_chance else "",
                     " ".join(cell.records)]
                )  # fmt: skip
    return stream.getvalue()


def _escape(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in shown(text))


def _breakable(text: str) -> str:
    """Return a label whose names of settings may break after a dot, an underscore or an equals
    sign."""
    return re.sub(r"(?<=\w)((?:\.|\\_)(?=[a-z])|=(?=\w))", r"\1\\allowbreak{}", _escape(text))


def _latex_cell(cell: Entry) -> str:
    if cell.value is None or (cell.kind == "versus" and cell.text):
        return _escape(cell.text) or "--"
    sign = "+" if cell.signed else ""
    shown = f"{cell.value:{sign},.{cell.digits}f}"
    if cell.low is not None and cell.high is not None:
        low, high = (f"{v:{sign}.{cell.digits}f}" for v in (cell.low, cell.high))
        shown += f" [{low}, {high}]"
    marks = {"better": r"$^{\uparrow}$", "worse": r"$^{\downarrow}$", "†": r"$^{\dagger}$"}
    shown = shown.replace("-", "$-$") + marks.get(cell.mark, "")
    return shown + "$^{\\circ}$" * cell.at_chance


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\" + "\n"


def _label(row: Row) -> str:
    return " ".join(part for part in row.label if part not in ("", "-"))


def _tabulars(block: Block, columns: Sequence[int], height: int) -> list[str]:
    """Return some columns of a block, as one `tabular` or as several of `height` lines each."""
    long = max((len(_label(row)) for row in block.rows), default=0) > LONGEST
    chunks: list[list[str]] = [[]]
    filled = 0
    for row in block.rows:
        if all(row.cells[column].kind == "dash" for column in columns):
            continue
        label = _label(row)
        lines = -(-len(label) // SAFE) or 1
        if chunks[-1] and filled + lines > height:
            chunks.append([])
            filled = 0
        shown = _breakable(label) if long else _escape(label)
        cells = (_latex_cell(row.cells[column]) for column in columns)
        chunks[-1].append(_latex_row([shown, *cells]))
        filled += lines
    stub = ">{\\raggedright}p{1.5in}" if long else "l"
    titles = [_escape(SHORT.get(name, name)) for name in (block.columns[c] for c in columns)]
    head = f"\\begin{{tabular}}{{@{{}}{stub}{'r' * len(columns)}@{{}}}}\n\\toprule\n"
    return [
        "".join(
            [head, _latex_row(["", *titles]), "\\midrule\n", *rows,
             "\\bottomrule\n\\end{tabular}\n"]
        )
        for rows in chunks
        if rows
    ]  # fmt: skip


def latex(table: Table) -> str:
    """Return the table's first page as LaTeX, at normal size in a column of 3.3 inches: a `table`
    for each block, or several where it would be wider or higher than a page. Needs booktabs and
    array."""
    parts = []
    for index, block in enumerate(table.summary or table.blocks, start=1):
        caption = f"{table.title}. {block.heading}."
        height = HIGHEST - -(-len(caption) // LETTERS)
        pieces = [
            piece for columns in _fitting(block) for piece in _tabulars(block, columns, height)
        ]
        for number, piece in enumerate(pieces, start=1):
            several = len(pieces) > 1
            own = f" Part {number} of {len(pieces)}." if several else ""
            body = [
                "\\begin{table}[t]\n\\centering\n\\setlength{\\tabcolsep}{3pt}\n",
                f"\\caption{{{_escape(caption + own)}}}\n",
                f"\\label{{tab:{table.name}-{index}{f'-{number}' if several else ''}}}\n",
                piece,
                "\\end{table}\n",
            ]
            parts.append("".join(body))
    return "% Needs \\usepackage{booktabs,array}\n" + "\n".join(parts)


HIGHEST = 38
"""Lines of a page that a caption and a table may fill."""
LETTERS, SAFE = 44, 18
"""Letters of a caption's line, and fewest of one of a label that is broken into lines."""
SHORT = {"above chance": "above", "average": "avg"}
LONGEST = 23
"""Letters of a label that stay on one line."""
WIDEST = 41
"""Letters and digits that fit into a column of 3.3 inches at 10 points, with gaps of 3 points."""


def _fitting(block: Block) -> list[list[int]]:
    """Return the columns of a block in groups that are no wider than `WIDEST`."""

    def width(column: int) -> int:
        cells = [row.cells[column].show() for row in block.rows]
        title = block.columns[column]
        return max(map(len, [SHORT.get(title, title), *cells])) + 1

    label = min(max((len(_label(row)) for row in block.rows), default=0), LONGEST)
    groups: list[list[int]] = [[]]
    for column in range(len(block.columns)):
        if groups[-1] and label + sum(map(width, [*groups[-1], column])) > WIDEST:
            groups.append([])
        groups[-1].append(column)
    return groups
