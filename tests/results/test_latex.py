"""LaTeX tables: they compile, and fit into a paper's column at normal size."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mixlora_exp.results.build import Results
from mixlora_exp.results.tables.registry import registered
from mixlora_exp.results.tables.render import WIDEST, latex

ENGINES = ("tectonic", "pdflatex", "lualatex", "xelatex")
DOCUMENT = r"""\documentclass[10pt]{article}
\usepackage[utf8]{inputenc}
\usepackage{booktabs,array}
\setlength{\textwidth}{3.3in}
\begin{document}
%s
\end{document}
"""


@pytest.mark.parametrize("number", registered())
def test_no_table_is_scaled_or_wider_than_a_column(committed: Results, number: int) -> None:
    text = latex(committed.tables[number])
    assert "resizebox" not in text
    assert "scriptsize" not in text
    for piece in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        for line in piece.splitlines():
            if not line.endswith(r" \\"):
                continue
            cells = line.removesuffix(r" \\").split(" & ")
            printed = [re.sub(r"\$\^\{.*?\}\$|\$|\\", "", cell) for cell in cells[1:]]
            # One column alone may be as wide as it must.
            if len(printed) > 1:
                assert sum(len(cell) + 1 for cell in printed) <= WIDEST


@pytest.mark.slow
def test_the_tables_compile(committed: Results, tmp_path: Path) -> None:
    engine = next((name for name in ENGINES if shutil.which(name)), None)
    if engine is None:
        pytest.skip(f"none of {', '.join(ENGINES)} is installed")
    body = "\n\\clearpage\n".join(latex(table) for table in committed.tables.values())
    (tmp_path / "tables.tex").write_text(DOCUMENT % body, encoding="utf-8")
    words = [engine] if engine == "tectonic" else [engine, "-interaction=nonstopmode"]
    words += ["--keep-logs"] if engine == "tectonic" else ["-halt-on-error"]
    done = subprocess.run([*words, "tables.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    log = (tmp_path / "tables.log").read_text(encoding="utf-8", errors="replace")
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert max(wide, default=0.0) < 1.0
    # What is higher than a page loses its end.
    high = re.findall(r"Float too large for page by ([\d.]+)pt", log)
    assert high == []
