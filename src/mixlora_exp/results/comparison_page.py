"""A comparison of runs as one static HTML page, which needs no network.

Texts from records and data reach the page escaped: in the tables by Jinja, and as JSON without `<`,
`>` and `&` that the page's own script writes as text. The page permits no other script and no
address, so that nothing in the data could run or be fetched even if that failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mixlora_exp.results import comparison_figures, figures
from mixlora_exp.results.comparison import Compared
from mixlora_exp.results.comparison_text import (
    contrasts,
    differences_sheet,
    notes,
    scores_sheet,
    settings_sheet,
    title,
)

TEMPLATE, SCRIPT = "comparison.html.j2", "comparison_items.js.j2"
LOAD = (
    "Expert load of side {}: the share of the slots that each expert gets, by layer and task, in "
    "percent, averaged over its seeds. An even load is one colour."
)
CURVES = "Training loss by optimizer step: thick lines are the mean of a side, thin ones its seeds."
FOREST = (
    "Paired differences in points with 95 % intervals; left of zero the first side is better. "
    "Open circles are one seed, which says nothing about others."
)


def _drawn(compared: Compared) -> list[dict[str, str]]:
    """Return the figures with captions, as addresses that contain them."""
    lines = contrasts(compared)
    made = [(FOREST, figures.forest_figure(lines) if lines else None)]
    made.append((CURVES, comparison_figures.curves_figure(compared.sides)))
    made += [(LOAD.format(s.letter), comparison_figures.load_figure(s)) for s in compared.sides]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (caption, figure) in enumerate(made):
            if figure is None:
                continue
            _, path = figures.save(lambda f=figure: f, Path(folder), str(number))
            content = base64.b64encode(path.read_bytes()).decode()
            found.append({"caption": caption, "data": f"data:image/svg+xml;base64,{content}"})
    return found


def _json(value: Any) -> Markup:
    """JSON in which nothing is markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def comparison_page(
    compared: Compared, items: Sequence[Mapping[str, Any]], missing: Sequence[str]
) -> str:
    """Return the page. `items`: from `differing_items`, with `missing`, why there are no
    questions."""
    folder = Path(__file__).parent
    script = (folder / SCRIPT).read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        sides=[title(side) for side in compared.sides],
        sheets=[settings_sheet(compared), scores_sheet(compared), differences_sheet(compared)],
        notes=notes(compared),
        figures=_drawn(compared),
        items=_json(list(items)),
        missing=missing,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
