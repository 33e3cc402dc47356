"""The example notebook: its cells run at tiny size, and it holds what a run of it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = [
    cell
    for cell in json.loads((ROOT / "docs" / "examples" / "routing.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]


def test_the_notebook_runs_with_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    space: dict[str, Any] = {}
    changed = 0
    for number, cell in enumerate(CELLS):
        source = "".join(cell["source"])
        changed += "model=smollm2_135m" in source
        code = source.replace("model=smollm2_135m", "model=tiny")
        exec(compile(code, f"cell {number}", "exec"), space)
    assert changed == 1
    shown = capsys.readouterr().out
    for coefficient, routing in space["found"].items():
        assert routing.experts.shape[0] == len(routing.layers)
        assert f"\n{coefficient} " in shown, "a line of the comparison"


def test_the_notebook_holds_the_output_of_one_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    for cell in CELLS:
        source = "".join(cell["source"])
        outputs = "".join(out["output_type"] for out in cell["outputs"])
        assert ("print(" in source) == ("stream" in outputs)
        assert ("plt.show()" in source) == ("display_data" in outputs)
