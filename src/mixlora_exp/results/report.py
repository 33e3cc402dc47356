"""The report: one static page with tables, figures, and the record of each number.

Opening it fetches nothing: style and figures are embedded. Links lead to the records by relative
paths.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mixlora_exp.errors import shown
from mixlora_exp.records.files import PACKED, RECORD
from mixlora_exp.results.findings import caption, contrasts, main_block, missing, sentences
from mixlora_exp.results.forest import forest
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES
from mixlora_exp.results.runs import LeftOut, RecordedRun
from mixlora_exp.results.tables.parts import Entry, Table
from mixlora_exp.results.tables.render import seeds
from mixlora_exp.results.verdicts import Verdict

TEMPLATE = "report.html.j2"
SHOWN_LINKS = 3


def _links(cell: Entry, numbers: Mapping[str, int], results: str) -> list[tuple[str, str, str]]:
    """Return (short text, address, name) of an entry's records: the line of a run in the list of
    records, or the file of a benchmark in `results`."""
    found = []
    for name in cell.records:
        if name in numbers:
            found.append((str(numbers[name]), f"#record-{numbers[name]}", name))
        elif name.startswith("bench/"):
            found.append(("record", f"{results}/{quote(name)}", name))
    return found


def _run_entry(run: RecordedRun, number: int, results: str, folder: Path) -> dict[str, Any]:
    origin = run.record["provenance"]
    hardware = origin["hardware"]
    train = run.record["train"]
    place = run.path if run.path.suffix == PACKED else run.path.parent / RECORD
    return {
        "number": number,
        "name": run.name,
        "address": f"{results}/{quote(place.relative_to(folder).as_posix())}",
        "model": MODEL_TITLES.get(run.model, run.model),
        "method": METHOD_TITLES[run.method],
        "trained": ", ".join(run.mix) or "-",
        "seed": run.seed,
        "steps": "-" if train is None else f"{train['steps']:,}",
        "protocols": ", ".join(dict.fromkeys(protocol for _, protocol in run.scores)),
        "tasks": ", ".join(dict.fromkeys(task for task, _ in run.scores)),
        "commit": origin["git"]["commit"][:10],
        "hardware": ", ".join(hardware["gpus"]) or hardware["cpu"],
        "torch": origin["packages"]["torch"],
    }


def _shown(value: Any) -> Any:
    """Return a value for the page; escapes characters in texts from records that change how a line
    reads."""
    # What a macro made is markup, and its values were escaped.
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return shown(value, None) if plain else value


def _breakable(name: str) -> Markup:
    """Return a heading with a place where a narrow column may break a method's name."""
    return Markup(escape(shown(name, None)).replace("Mix", Markup("Mix<wbr>")))


CAPTIONS = {
    "figure4a": "Average accuracy by the coefficient of the router loss, in the paper and here.",
    "figure4b": "Average accuracy by rank, in the paper and here.",
    "figure4c": "Average accuracy over inference time per token of each method.",
    "forest": "Differences to LoRA and to the base model over the tasks above chance (Table 2), "
    "with 95 % intervals; open circles are one seed.",
    "figure5": "Share of the tokens that each expert gets, by task and by layer.",
    "step_sizes": "Average accuracy of LoRA and MixLoRA at three step sizes, with 95 % intervals; "
    "a ring is around the one that held-out rows choose.",
    "learning_curves": "Training loss by step: for each method and step size a band from the "
    "lowest to the highest run on like data, and their mean.",
}


def _figure(path: Path) -> dict[str, str]:
    content = base64.b64encode(path.read_bytes()).decode()
    caption = CAPTIONS.get(path.stem) or CAPTIONS[path.stem.partition("-")[0]]
    return {
        "name": path.stem, "caption": caption, "data": f"data:image/svg+xml;base64,{content}",
    }  # fmt: skip


def page(
    tables: Mapping[int, Table],
    runs: Sequence[RecordedRun],
    figures: Sequence[Path],
    left_out: Sequence[LeftOut],
    verdicts: Sequence[Verdict],
    results: str = "..",
    *,
    folder: Path,
    short: bool = False,
) -> str:
    """Return the page as HTML: first what is known, then everything, folded. `results`: the
    relative address, from the page, of `folder` with `runs/`, `bench/` and `tables/`. `short`:
    of each table its first page alone."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    numbers = {run.name: number for number, run in enumerate(runs, start=1)}
    return environment.get_template(TEMPLATE).render(
        tables=list(tables.values()),
        sentences=sentences(tables, verdicts, runs),
        main=main_block(tables),
        forest=forest(contrasts(tables)),
        forest_words=caption(tables),
        short=short,
        missing=missing(tables),
        runs=[_run_entry(run, number, results, folder) for number, run in enumerate(runs, start=1)],
        figures=[_figure(path) for path in figures],
        left_out=dict.fromkeys((entry.name, entry.reason) for entry in left_out),
        links=lambda cell: _links(cell, numbers, results),
        results=results,
        shown=SHOWN_LINKS,
        seeds=seeds,
        breakable=_breakable,
    )
